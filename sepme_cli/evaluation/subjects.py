"""Which concepts are looked at, and what each is."""

from collections.abc import Mapping, Sequence

from sepme_cli.erasure.prompts import AsKind, Kind, kinds
from sepme_cli.erasure.words import same_name
from sepme_cli.errors import UsageError
from sepme_cli.evaluation.judges import Judge, knows
from sepme_cli.evaluation.protocol import Subject

Word = tuple[str, AsKind]
"""A word and what it is said to be."""

RETAINED = 4
"""How many words of each kind are looked at where nobody said which."""


def choose_subjects(
    erased: Sequence[Word], retain: Sequence[Word], offered: Sequence[Word], judge: Judge
) -> tuple[tuple[Subject, ...], tuple[str, ...]]:
    """The concepts erased and those that must stay, and warnings.

    retain: all of these. offered: some of these where nothing is to be retained, or else some of
    what the judge can tell. Raises UsageError for a word that is both erased and retained.
    """
    warnings: list[str] = []
    gone = [Subject(name, _kind(name, said, judge, warnings), "erased") for name, said in erased]
    taken = {same_name(subject.name) for subject in gone}
    if both := [name for name, _ in retain if same_name(name) in taken]:
        raise UsageError(
            f"{', '.join(map(repr, both))} cannot be retained: the patches erase it",
            expected="concepts that are not erased",
            found=", ".join(both),
        )
    if retain:
        stay = [(name, _kind(name, said, judge, warnings)) for name, said in retain]
    else:
        stay = list(_some(offered, judge, taken, warnings))
    kept = [Subject(name, kind, "retained") for name, kind in dict.fromkeys(stay)]
    for subject in (*gone, *kept):
        if not knows(judge, subject.name, subject.kind):
            warnings.append(
                f"the judge knows no {subject.kind} {subject.name!r}: how often it is generated "
                "cannot be measured"
            )
    return (*gone, *kept), tuple(warnings)


def _some(
    offered: Sequence[Word], judge: Judge, taken: set[str], warnings: list[str]
) -> Sequence[tuple[str, Kind]]:
    """At most RETAINED words of each kind, from all over what there is."""
    found: Mapping[Kind, list[str]] = {kind: [] for kind in kinds("any")}
    for name, said in offered:
        found[_kind(name, said, judge, warnings)].append(name)
    chosen: list[tuple[str, Kind]] = []
    for kind in kinds("any"):
        words = found[kind] or judge.labels(kind)
        words = [word for word in words if same_name(word) not in taken]
        count = min(RETAINED, len(words))
        chosen += [(words[i * len(words) // count], kind) for i in range(count)]
    return chosen


def _kind(name: str, said: AsKind, judge: Judge, warnings: list[str]) -> Kind:
    if said != "any":
        return said
    known = [kind for kind in kinds("any") if knows(judge, name, kind)]
    if len(known) == 1:
        return known[0]
    warnings.append(
        f"{name!r} is treated as a style; use --as object for an erased object, and "
        f"object:{name} for a retained one"
    )
    return "style"
