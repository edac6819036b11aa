"""The main job on the shipped example: a style and an object disappear from a real text-to-image
model, the rest stays as it was, and then they come back.

    make demo

Runs the very commands a user would type, shows what they say, and leaves everything it made
under build/demo/.
"""

import hashlib
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from examples.emoji.canvas import OBJECTS, STYLES
from examples.emoji.judging import Caption, Verdict, all_pairs, proportion, verdict
from examples.emoji.networks import load_judge
from sepme_cli.checkpoints.reader import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import draw_pictures
from sepme_cli.evaluation.sheets import contact_sheet

MODEL = Path("examples/emoji-sd.safetensors")
OUT = Path("build/demo")
STYLE, OBJECT = "ink", "cat"
SHOWN = [("cat", "ink"), ("dog", "ink"), ("rocket", "ink"), ("cat", "noto"), ("cat", "twemoji")]
SHOWN += [("dog", "noto"), ("rocket", "twemoji"), ("owl", "mono")]


def sepme(*words: str) -> None:
    """Run one sepme command, showing it as it would be typed."""
    print(f"\n$ sepme {shlex.join(words)}", flush=True)
    subprocess.run([Path(sys.executable).with_name("sepme"), *words], check=True)


def protect() -> list[str]:
    """Everything else that the model knows, as --protect options."""
    names = {
        "style": [s for s in STYLES if s != STYLE],
        "object": [o for o in OBJECTS if o != OBJECT],
    }
    return [w for k, words in names.items() for name in words for w in ("--protect", f"{k}:{name}")]


def draw(path: Path, captions: list[Caption]) -> torch.Tensor:
    seeds = [caption.style * 100 + caption.object for caption in captions]
    with open_checkpoint(path) as checkpoint:
        model = StableDiffusion.of(checkpoint, torch.device("cpu"))
        return draw_pictures(model, [c.text for c in captions], seeds, guidance=3.0)


def erase_and_restore() -> dict[str, Path]:
    """The story in five commands. Returns the three checkpoints it leaves."""
    style, thing, clean, back = (
        str(OUT / name)
        for name in ("style.sepme", "object.sepme", "clean.safetensors", "back.safetensors")
    )
    everything = protect()
    print("(--protect is given every other style and object that this small model knows)")
    sepme(
        "erase",
        str(MODEL),
        "--concept",
        STYLE,
        "--as",
        "style",
        "-o",
        style,
        "--force",
        *everything,
    )
    sepme(
        "erase",
        str(MODEL),
        "--concept",
        OBJECT,
        "--as",
        "object",
        "-o",
        thing,
        "--force",
        *everything,
    )
    sepme("apply", str(MODEL), style, thing, "-o", clean, "--force")
    sepme("inspect", clean)
    sepme("revert", clean, style, thing, "--base", str(MODEL), "-o", back, "--force")
    same = (
        hashlib.sha256(Path(back).read_bytes()).digest()
        == hashlib.sha256(MODEL.read_bytes()).digest()
    )
    print(f"\nback.safetensors is {'' if same else 'NOT '}byte for byte the original")
    return {"before": MODEL, "after": Path(clean), "restored": Path(back)}


def counted(right: torch.Tensor) -> str:
    """ "0/24 (0-14%)": the count and its 95% interval."""
    found = proportion(right)
    low, high = (round(100 * bound) for bound in found.interval)
    return f"{found.hits}/{found.n} ({low}-{high}%)"


def table(verdicts: dict[str, Verdict], captions: list[Caption]) -> Table:
    """Judged accuracy, before, after and restored, by what was asked for."""
    style = torch.tensor([c.names(STYLE) for c in captions])
    thing = torch.tensor([c.names(OBJECT) for c in captions])
    shown = Table(title="Recognised by the judge, with 95% intervals")
    for heading in ("asked for", *verdicts):
        shown.add_column(heading)
    for label, of, rows in (
        (f"style {STYLE} (erased)", "style", style),
        (f"object {OBJECT} (erased)", "object", thing),
        ("every other style", "style", ~style & ~thing),
        ("every other object", "object", ~style & ~thing),
        (f"other objects in {STYLE} style", "object", style & ~thing),
    ):
        shown.add_row(label, *(counted(v.of(of)[rows]) for v in verdicts.values()))
    return shown


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    checkpoints = erase_and_restore()
    captions = all_pairs(["{O} in {s} style"])
    print("\nDrawing every style with every object, three times, and judging …", flush=True)
    judge = load_judge()
    pictures = {name: draw(path, captions) for name, path in checkpoints.items()}
    verdicts = {name: verdict(judge, drawn, captions) for name, drawn in pictures.items()}
    Console().print(table(verdicts, captions))
    chosen = [[c.names(o) and c.names(s) for c in captions].index(True) for o, s in SHOWN]
    contact_sheet(
        torch.stack([drawn[chosen] for drawn in pictures.values()]),
        OUT / "before-after-restored.png",
        rows=list(pictures),
        columns=[f"{o}, {s}" for o, s in SHOWN],
        scale=2,
    )
    print(f"\nLook at {OUT}/before-after-restored.png; the patches and checkpoints lie beside it.")


if __name__ == "__main__":
    main()
