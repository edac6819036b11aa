"""The artwork: objects in families with near neighbours, each in eight styles.

A style is a treatment of the whole picture, as what people want out of a checkpoint is: a ground,
an outline, what becomes of colours (`treatments`). The drawings under it are the first canvas's
emoji sets (credits in ``examples/emoji/README.md``). Style words are ones that the language knows
and that say something of the look; none is the name of an artist.
"""

import numpy as np

from ..emoji.canvas import SIZE, draw_icon, load_icons
from .treatments import SCALE, TREATMENTS, placed
from .words import BUILD

#: style word -> the first canvas's name of the set that it is made from.
STYLES: dict[str, str] = {
    "cartoon": "twemoji",
    "gouache": "noto",
    "crayon": "twemoji",
    "collage": "fluent",
    "stencil": "ink",
    "airbrush": "gloss",
    "enamel": "twemoji",
    "woodcut": "mono",
}

#: family -> objects, each by its icon name, or "word=icon-name" where they differ.
FAMILIES: dict[str, str] = {
    "cats": "cat=cat-face lion tiger=tiger-face leopard",
    "dogs": "dog=dog-face poodle wolf fox",
    "farm": "cow=cow-face pig=pig-face goat sheep=ewe horse=horse-face rooster duck",
    "wild": "bear panda koala monkey=monkey-face elephant camel deer unicorn",
    "small": "mouse=mouse-face rabbit=rabbit-face bat squirrel=chipmunk",
    "birds": "bird eagle owl penguin dove",
    "reptiles": "frog turtle snake lizard crocodile dragon=dragon-face",
    "sea": "fish whale=spouting-whale dolphin shark octopus squid crab shrimp",
    "insects": "ant bee=honeybee beetle=lady-beetle butterfly spider scorpion snail",
    "fruit": "apple=red-apple pear banana orange=tangerine lemon peach cherries grapes "
    "strawberry watermelon pineapple kiwi=kiwi-fruit",
    "vegetables": "carrot corn=ear-of-corn cucumber eggplant tomato potato avocado mushroom "
    "pepper=hot-pepper",
    "plants": "cactus tree=deciduous-tree evergreen=evergreen-tree palm=palm-tree rose "
    "tulip sunflower leaf=maple-leaf",
    "baked": "bread croissant cake=birthday-cake cookie doughnut pancakes",
    "meals": "pizza hamburger hot_dog=hot-dog taco french_fries=french-fries sushi "
    "spaghetti salad=green-salad popcorn egg=cooking cheese=cheese-wedge",
    "sweets": "candy chocolate=chocolate-bar ice_cream=ice-cream",
    "drinks": "coffee=hot-beverage beer=beer-mug wine=wine-glass milk=glass-of-milk",
    "cars": "car=automobile taxi bus truck=delivery-truck ambulance tractor firetruck=fire-engine",
    "wheels": "bicycle motorcycle train=locomotive tram=tram-car",
    "ships": "ship=passenger-ship sailboat canoe anchor",
    "flight": "airplane helicopter rocket satellite balloon",
    "buildings": "house castle church mosque school factory bank tent temple=shinto-shrine",
    "landscape": "mountain volcano island=desert-island rainbow cloud tornado snowflake fire "
    "wave=water-wave moon=crescent-moon sun star",
    "instruments": "guitar violin trumpet saxophone drum piano=musical-keyboard",
    "tools": "hammer wrench pick knife=kitchen-knife scissors sword=dagger shield gear",
    "electronics": "computer=desktop-computer laptop telephone smartphone=mobile-phone "
    "television camera radio microphone headphones=headphone",
    "clothes": "shirt=t-shirt dress jeans hat=top-hat crown shoe=mans-shoe boot=womans-boot "
    "glasses sunglasses backpack handbag umbrella ring lipstick",
    "home": "chair=seat bed bathtub toilet door candle flashlight key=old-key lock=locked "
    "clock=alarm-clock watch hourglass=hourglass-done bell",
    "paper": "book=closed-book newspaper envelope scroll map=world-map pencil "
    "pen=fountain-pen paintbrush briefcase",
    "sports": "football=american-football basketball baseball soccer=soccer-ball bowling "
    "skate=ice-skate trophy dice=game-die",
    "science": "microscope telescope thermometer bomb",
    "figures": "ghost alien skull clown=clown-face snowman santa=santa-claus princess",
}


def parse(word: str) -> tuple[str, str]:
    name, _, icon = word.partition("=")
    return name.replace("_", " "), icon or name


#: object word -> icon name.
OBJECTS: dict[str, str] = {
    name: icon for words in FAMILIES.values() for name, icon in map(parse, words.split())
}


def render(style: str, icons: dict, name: str) -> np.ndarray:
    """One object in one style. Returns uint8 [SIZE, SIZE, 3]."""
    drawn = placed(draw_icon(icons, name, SCALE * SIZE))
    return np.asarray(TREATMENTS[style](drawn).resize((SIZE, SIZE)))


def load_canvas() -> np.ndarray:
    """Every picture, rendered on first use. Returns uint8 [style, object, SIZE, SIZE, 3]."""
    path = BUILD / "canvas.npz"
    if not path.exists():
        sets = {name: load_icons(name) for name in dict.fromkeys(STYLES.values())}
        pictures = [
            [render(style, sets[name], icon) for icon in OBJECTS.values()]
            for style, name in STYLES.items()
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, pictures=np.asarray(pictures))
    pictures = np.load(path)["pictures"]
    assert pictures.shape == (len(STYLES), len(OBJECTS), SIZE, SIZE, 3), "delete the old canvas"
    return pictures


if __name__ == "__main__":
    print("canvas:", load_canvas().shape)
