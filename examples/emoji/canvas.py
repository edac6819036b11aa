"""The canvas itself: 24 objects, each drawn in eight styles by different artists.

The artwork comes from npm packages of permissively licensed emoji sets (credits in README.md
beside this file). ``python -m examples.emoji.canvas`` fetches them with ``npm pack``, renders
every object in every style and writes ``build/emoji/canvas.npz``.

The objects were chosen once, by the picture distance between the two most alike styles of each
object (``fluent`` and ``gloss``), so that a style can be told at 64 pixels.
"""

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

BUILD = Path("build/emoji")
SIZE = 64

#: style word -> (npm package, version). The word is what prompts call the style.
STYLES: dict[str, tuple[str, str]] = {
    "twemoji": ("twemoji", "1.2.5"),
    "noto": ("noto", "1.2.9"),
    "blob": ("noto-v1", "1.2.5"),
    "fluent": ("fluent-emoji-flat", "1.2.6"),
    "ink": ("fluent-emoji-high-contrast", "1.2.6"),
    "gloss": ("fluent-emoji", "1.2.7"),
    "emojione": ("emojione", "1.2.3"),
    "mono": ("emojione-monotone", "1.2.1"),
}

#: object word -> icon name in every package.
OBJECTS: dict[str, str] = {
    "airplane": "airplane",
    "apple": "red-apple",
    "banana": "banana",
    "cactus": "cactus",
    "carrot": "carrot",
    "castle": "castle",
    "cat": "cat-face",
    "clock": "alarm-clock",
    "crown": "crown",
    "dog": "dog-face",
    "elephant": "elephant",
    "fish": "fish",
    "frog": "frog",
    "guitar": "guitar",
    "house": "house",
    "octopus": "octopus",
    "owl": "owl",
    "penguin": "penguin",
    "rocket": "rocket",
    "rose": "rose",
    "snail": "snail",
    "strawberry": "strawberry",
    "turtle": "turtle",
    "whale": "whale",
}


def load_icons(style: str, cache: Path = BUILD / "npm") -> dict:
    """The icon set of one style, fetched from the npm registry on first use."""
    package, version = STYLES[style]
    archive = cache / f"iconify-json-{package}-{version}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        spec = f"@iconify-json/{package}@{version}"
        subprocess.run(["npm", "pack", "--silent", spec], cwd=cache, check=True)
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None
        return json.load(member)


def draw_icon(icons: dict, name: str, size: int) -> "Image":
    """One icon on nothing, as an RGBA picture of size by size."""
    import resvg_py
    from PIL import Image

    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
        f'width="{size}" height="{size}" color="black">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def render(icons: dict, name: str, size: int = SIZE) -> np.ndarray:
    """One icon on white. Returns uint8 [size, size, 3]."""
    from PIL import Image

    drawn = draw_icon(icons, name, size)
    ground = Image.new("RGB", (size, size), "white")
    ground.paste(drawn, (0, 0), drawn)
    return np.asarray(ground)


def load_canvas(path: Path = BUILD / "canvas.npz") -> np.ndarray:
    """Every picture, rendered on first use. Returns uint8 [style, object, SIZE, SIZE, 3]."""
    if not path.exists():
        pictures = [
            [render(icons, name) for name in OBJECTS.values()]
            for icons in (load_icons(style, path.parent / "npm") for style in STYLES)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, pictures=np.asarray(pictures))
    return np.load(path)["pictures"]


if __name__ == "__main__":
    print("canvas:", load_canvas().shape)
