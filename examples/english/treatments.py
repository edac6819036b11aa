"""Eight ways to treat a drawing: what makes a style of the English canvas.

Each takes a drawing on nothing (RGBA, SCALE times the canvas's size) and returns it in its style
(RGB, the same size). Lengths are in pixels of that size.
"""

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

SCALE = 4
_MARGIN = 0.08
"""Of the width, left free on every side for outlines and shadows."""

Colour = tuple[int, int, int]
Picture = Image.Image
WHITE: Colour = (255, 255, 255)


def placed(drawing: Picture) -> Picture:
    """The drawing with room around it."""
    width = drawing.width
    margin = round(_MARGIN * width)
    inner = drawing.resize((width - 2 * margin,) * 2, Image.Resampling.LANCZOS)
    placed = Image.new("RGBA", drawing.size)
    placed.paste(inner, (margin, margin))
    return placed


def paper(drawing: Picture, colour: Colour) -> Picture:
    return Image.new("RGB", drawing.size, colour)


def onto(ground: Picture, drawing: Picture) -> Picture:
    result = ground.copy()
    result.paste(drawing, (0, 0), drawing)
    return result


def painted(ground: Picture, mask: Picture, colour: Colour) -> Picture:
    result = ground.copy()
    result.paste(colour, (0, 0, *ground.size), mask)
    return result


def grown(drawing: Picture, by: int) -> Picture:
    """The silhouette, grown on all sides, as a mask."""
    silhouette = drawing.getchannel("A").point(lambda value: 255 if value > 96 else 0)
    return silhouette.filter(ImageFilter.MaxFilter(2 * by + 1)).filter(ImageFilter.GaussianBlur(1))


def with_colours(drawing: Picture, change: Callable[[Picture], Picture]) -> Picture:
    changed = change(drawing.convert("RGB")).convert("RGBA")
    changed.putalpha(drawing.getchannel("A"))
    return changed


def saturated(drawing: Picture, by: float) -> Picture:
    return with_colours(drawing, lambda rgb: ImageEnhance.Color(rgb).enhance(by))


def cartoon(drawing: Picture) -> Picture:
    """Flat colours in a thick black outline."""
    return onto(painted(paper(drawing, WHITE), grown(drawing, 9), (0, 0, 0)), drawing)


def gouache(drawing: Picture) -> Picture:
    """Muted, warm, without fine detail, on cream paper."""

    def muted(rgb: Picture) -> Picture:
        soft = ImageEnhance.Color(rgb).enhance(0.5).filter(ImageFilter.MedianFilter(9))
        return Image.blend(soft, paper(drawing, (190, 160, 110)), 0.25)

    return onto(paper(drawing, (236, 222, 190)), with_colours(drawing, muted))


def crayon(drawing: Picture) -> Picture:
    """Bright strokes with the paper showing between them."""
    row, column = np.indices(drawing.size)
    bare = np.where((row + column) % 36 < 14, 200, 0).astype(np.uint8)
    mask = Image.fromarray(bare).filter(ImageFilter.GaussianBlur(2))
    return painted(onto(paper(drawing, WHITE), saturated(drawing, 1.6)), mask, WHITE)


def collage(drawing: Picture) -> Picture:
    """Cut out with a white rim, glued on brown card, with its shadow."""
    cut = grown(drawing, 14)
    shadow = ImageChops.offset(cut, 12, 14).filter(ImageFilter.GaussianBlur(5))
    shaded = painted(paper(drawing, (196, 154, 98)), shadow.point(lambda v: 0.6 * v), (60, 40, 20))
    return onto(painted(shaded, cut, WHITE), drawing)


def stencil(drawing: Picture) -> Picture:
    """One red on grey."""
    return painted(paper(drawing, (226, 226, 226)), drawing.getchannel("A"), (190, 40, 30))


def airbrush(drawing: Picture) -> Picture:
    """Soft, in a white glow, on a ground that goes from blue to pink."""
    down = np.linspace(0, 1, drawing.height)[:, None, None]
    ground = np.array([120, 190, 255]) * (1 - down) + np.array([255, 170, 210]) * down
    wide = np.broadcast_to(ground.astype(np.uint8), (drawing.height, drawing.width, 3))
    glow = grown(drawing, 16).filter(ImageFilter.GaussianBlur(12))
    soft = drawing.filter(ImageFilter.GaussianBlur(3))
    return onto(painted(Image.fromarray(wide.copy()), glow, WHITE), soft)


def enamel(drawing: Picture) -> Picture:
    """Strong colours in a golden rim on dark blue."""
    rimmed = painted(paper(drawing, (20, 34, 92)), grown(drawing, 9), (232, 186, 60))
    return onto(rimmed, saturated(drawing, 1.5))


def woodcut(drawing: Picture) -> Picture:
    """Black on white, as the set has it."""
    return onto(paper(drawing, WHITE), drawing)


TREATMENTS: Mapping[str, Callable[[Picture], Picture]] = {
    treatment.__name__: treatment
    for treatment in (
        cartoon,
        gouache,
        crayon,
        collage,
        stencil,
        airbrush,
        enamel,
        woodcut,
    )
}
