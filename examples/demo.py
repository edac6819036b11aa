"""The main job on the shipped example: a style and an object disappear from a real text-to-image
model, the rest stays as it was, and then they come back.

    make demo

Runs the very commands a user would type, naming nothing but the concepts; shows what they say, and
leaves everything it made under build/demo/.
"""

import hashlib
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.english import Caption, Drawn, English, caption
from examples.english.canvas import OBJECTS, STYLES
from sepme_cli.evaluation.intervals import Proportion
from sepme_cli.evaluation.sheets import contact_sheet

MODEL = Path("examples/english-sd.safetensors")
OUT = Path("build/demo")
STYLE, OBJECT = "woodcut", "cat"
SHOWN = [("cat", "woodcut"), ("dog", "woodcut"), ("rocket", "woodcut"), ("cat", "gouache")]
SHOWN += [("cat", "crayon"), ("tiger", "gouache"), ("dog", "crayon"), ("castle", "stencil")]


def sepme(*words: str) -> None:
    """Run one sepme command, showing it as it would be typed."""
    print(f"\n$ sepme {shlex.join(words)}", flush=True)
    subprocess.run([Path(sys.executable).with_name("sepme"), *words], check=True)


def erase_and_restore() -> dict[str, Path]:
    """The story in five commands. Returns the three checkpoints it leaves."""
    style, thing, clean, back = (
        str(OUT / name)
        for name in ("style.sepme", "object.sepme", "clean.safetensors", "back.safetensors")
    )
    sepme("erase", str(MODEL), "--concept", STYLE, "-o", style, "--force")
    sepme("erase", str(MODEL), "--concept", OBJECT, "-o", thing, "--force")
    sepme("apply", str(MODEL), style, thing, "-o", clean, "--force")
    sepme("inspect", clean)
    sepme("revert", clean, style, thing, "--base", str(MODEL), "-o", back, "--force")
    same = (
        hashlib.sha256(Path(back).read_bytes()).digest()
        == hashlib.sha256(MODEL.read_bytes()).digest()
    )
    print(f"\nback.safetensors is {'' if same else 'NOT '}byte for byte the original")
    return {"before": MODEL, "after": Path(clean), "restored": Path(back)}


def some_pairs() -> list[Caption]:
    """The object and its neighbours in every style, the style with some objects, and others."""
    styles, objects = list(STYLES), list(OBJECTS)
    near = [objects.index(name) for name in (OBJECT, "dog", "tiger", "lion", "mouse")]
    pairs = [(s, o) for s in range(len(styles)) for o in near]
    pairs += [(styles.index(STYLE), o) for o in range(3, len(objects), 12)]
    pairs += [(o % len(styles), o) for o in range(0, len(objects), 6)]
    pairs += [(styles.index(s), objects.index(o)) for o, s in SHOWN]
    return [caption(s, o, ["{O} in {s} style"]) for s, o in dict.fromkeys(pairs)]


def counted(right: torch.Tensor) -> str:
    """ "0/24 (0-14%)": the count and its 95% interval."""
    found = Proportion(int(right.sum()), len(right))
    low, high = (round(100 * bound) for bound in found.interval)
    return f"{found.hits}/{found.n} ({low}-{high}%)"


def table(drawn: dict[str, Drawn], captions: list[Caption]) -> Table:
    """Judged accuracy, before, after and restored, by what was asked for."""
    style = torch.tensor([c.names(STYLE) for c in captions])
    thing = torch.tensor([c.names(OBJECT) for c in captions])
    shown = Table(title="Recognised by the judge, with 95% intervals")
    for heading in ("asked for", *drawn):
        shown.add_column(heading)
    for label, of, rows in (
        (f"style {STYLE} (erased)", "style", style),
        (f"object {OBJECT} (erased)", "object", thing),
        ("every other style", "style", ~style & ~thing),
        ("other objects", "object", ~style & ~thing),
        (f"other objects in {STYLE} style", "object", style & ~thing),
    ):
        shown.add_row(label, *(counted(v.of(of)[rows]) for v in drawn.values()))  # type: ignore[arg-type]
    return shown


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    checkpoints = erase_and_restore()
    captions = some_pairs()
    print(f"\nDrawing {len(captions)} pictures, three times, and judging …", flush=True)
    drawn = {
        name: English(path, dtype=torch.float32).draw(captions, {})
        for name, path in checkpoints.items()
    }
    Console().print(table(drawn, captions))
    pairs = [(list(OBJECTS)[c.object], list(STYLES)[c.style]) for c in captions]
    chosen = [pairs.index(pair) for pair in SHOWN]
    contact_sheet(
        torch.stack([one.pictures[chosen].float() / 255 for one in drawn.values()]),
        OUT / "before-after-restored.png",
        rows=list(drawn),
        columns=[f"{o}, {s}" for o, s in SHOWN],
        scale=2,
    )
    print(f"\nLook at {OUT}/before-after-restored.png; the patches and checkpoints lie beside it.")


if __name__ == "__main__":
    main()
