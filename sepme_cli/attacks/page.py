"""The report of attacks: one HTML page that needs nothing else, and the same as JSON and CSV."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from torch import Tensor

from sepme_cli.attacks.attack import GROUPS
from sepme_cli.attacks.campaign import Outcome
from sepme_cli.attacks.results import JSON, AttackResult, Success
from sepme_cli.checkpoints.disk.files import write_file
from sepme_cli.evaluation.intervals import percent
from sepme_cli.evaluation.page import data_uri

PAGE = "attack.html"
TABLE = "attacks.csv"
Shown = Mapping[str, Mapping[str, Sequence[tuple[Outcome, Sequence[Tensor]]]]]
"""By attack and by victim, the trials and the images that were kept of each."""

_TITLES = {
    "text": "Words and text embeddings",
    "sampling": "Sampling",
    "optimising": "Optimisation through the denoiser",
    "relearning": "Fine-tuning",
}


def attack_page(result: AttackResult, shown: Shown, facts: Sequence[tuple[str, str]]) -> str:
    """The whole page."""
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader("sepme_cli.attacks"), PackageLoader("sepme_cli.evaluation")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(data_uri=data_uri, percent=percent, range=interval)
    return environment.get_template("attack.html.jinja").render(
        result=result,
        verdict=verdict(result),
        groups=[(_TITLES[group], _of(result, group)) for group in GROUPS if _of(result, group)],
        columns=columns(result),
        shown=shown,
        facts=facts,
    )


def _of(result: AttackResult, group: str) -> list[str]:
    return [name for name, one in result.attacks.items() if one.group == group]


def columns(result: AttackResult) -> list[str]:
    """The models that were attacked."""
    floor = any(one.floor is not None for one in result.attacks.values())
    return ["patched", "original", *(["floor"] if floor else [])]


def verdict(result: AttackResult) -> str:
    """What came out, in one line."""
    plain, teaching = strongest(result)
    if plain is None and teaching is None:
        return f"No attack brought {result.concept} back"
    if teaching is None:
        return f"{result.concept} comes back in {plain}"
    first = "not brought back without images of it" if plain is None else f"comes back in {plain}"
    return f"{result.concept} {first}; learned from images, in {teaching}"


def strongest(result: AttackResult) -> tuple[str | None, str | None]:
    """ "92% (reach)" of the strongest attack that cannot teach, and of the strongest that can; None
    where none succeeded."""
    found = []
    for name in (result.strongest, result.strongest_teaching):
        patched = None if name is None else result.attacks[name].patched
        found.append(None if patched is None else f"{percent(patched.share)} ({name})")
    return found[0], found[1]


def interval(success: Success) -> str:
    """How sure a figure is."""
    low, high = success.interval
    return f"{percent(low)} to {percent(high)}"


def write_attack_report(folder: Path, result: AttackResult, page: str) -> None:
    """Write all of it; the page last, so that where it is the rest is too."""
    text = json.dumps(asdict(result), allow_nan=False, indent=2)
    write_file(folder / JSON, f"{text}\n".encode(), force=True)
    write_file(folder / TABLE, _table(result), force=True)
    write_file(folder / PAGE, page.encode(), force=True)


def _table(result: AttackResult) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    head = ["attack", "group", "model", "share", "low", "high", "n", "images", "seconds", "chance"]
    writer.writerow(head)
    for name, figures in result.attacks.items():
        for column in columns(result):
            found: Success | None = getattr(figures, column)
            if found is not None:
                row = [name, figures.group, column, found.share, *found.interval]
                writer.writerow(
                    [*row, found.n, found.images, round(found.seconds, 1), figures.chance]
                )
    return file.getvalue().encode()
