"""What withstands attacks: ways to erase on the English canvas, under `sepme attack`'s attacks.

    python -m benchmarks.attacked run                # goes on where it was; run cat uce does a part
    python -m benchmarks.attacked table            # of what users have; table all: of all
    python -m benchmarks.attacked beside           # of other methods

Every method erases one concept at a time, told nothing but its name (`benchmarks/rounds.py`,
"nothing named"). All are attacked with the same seeds, images and budget; what else they cost is
judged as in `benchmarks/bare.py`. Trials are kept under build/, figures in docs/attacked.json.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bare import Aliases, erased, judge
from benchmarks.english import GUIDANCE, MODEL, kind_of
from benchmarks.results import Results
from benchmarks.rounds import ROUNDS, Bench, tuned
from examples import judge as examples_judge
from sepme_cli.attacks.aiming import Wanted, take_aim
from sepme_cli.attacks.attack import BUDGETS, Aim, Victim
from sepme_cli.attacks.campaign import Campaign, success
from sepme_cli.attacks.registry import ATTACKS
from sepme_cli.erasure.concept import Lexicon, describe
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.subspace import energy
from sepme_cli.erasure.words import Item
from sepme_cli.evaluation.gallery import Gallery
from sepme_cli.evaluation.intervals import Proportion
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.planning.neighbourhood import look_around
from sepme_cli.progress import SILENT
from sepme_cli.recipe import Recipe

RESULTS = Path("docs/attacked.json")
FOLDER = Path("build/attacked")
CONCEPTS = ("cat", "violin", "horse", "woodcut")
#: More of them for what users have, as few cases say little: the next of the canvas's.
MORE = ("dog", "rabbit", "airplane", "hamburger", "castle", "cartoon")
SAMPLING = SamplingOptions(steps=10, guidance=GUIDANCE)
BUDGET = BUDGETS["quick"]
TRIED = (
    "prompts", "phrasings", "synonyms", "ring-a-bell", "reach", "record", "seeds", "completion",
    "unlearndiffatk", "textual-inversion-1", "relearn-lora",
)  # fmt: skip
Make = Callable[["Attacked", str], dict[str, Tensor]]


class Attacked:
    """The canvas, the attacks' aim at each concept, and the attacks."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.model, self.canvas = self.bench.model, self.bench.canvas
        self.judge = examples_judge()
        for name in ("pictures", "trials"):
            (FOLDER / name).mkdir(parents=True, exist_ok=True)
        self.gallery = Gallery(FOLDER / "pictures", self.model, SAMPLING, str(MODEL))
        self.campaign = Campaign(FOLDER / "trials", self.judge, BUDGET, str(MODEL))
        self._aims: dict[str, Aim] = {}

    def aim(self, concept: str) -> Aim:
        if concept not in self._aims:
            wanted = Wanted(concept, kind_of(concept), (), None, (concept,))
            self._aims[concept], _ = take_aim(self.gallery, self.judge, wanted, BUDGET, SILENT)
        return self._aims[concept]

    def attacked(self, concept: str, method: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """[successes, cases] of each attack."""
        whole = {name: value.float() for name, value in weights.items()}
        digest = f"{concept} {method}"
        victim = Victim(method, self.model, whole, self.aim(concept), SAMPLING, digest)
        found: dict[str, Any] = {}
        for attack in ATTACKS:
            if attack.name in TRIED and attack.unfit(victim) is None:
                outcomes = self.campaign.run(attack, victim)
                hits, n = sum(o.hits for o in outcomes), sum(o.n for o in outcomes)
                came = success(outcomes)
                assert came is not None
                found[attack.name] = [hits, n]
                print(concept, method, attack.name, hits, n, f"{came.seconds:.0f} s", flush=True)
        return found


def _ours(aliases: Aliases = "none", settings: Settings | None = None) -> Make:
    def make(bench: Attacked, concept: str) -> dict[str, Tensor]:
        force = settings is not None
        _, increments = erased(
            bench.canvas, [concept], settings, aliases=aliases, force_collateral=force
        )
        return bench.canvas.patched(increments)

    return make


def _left(bench: Attacked, concept: str) -> dict[str, Tensor]:
    """Of each layer W the operator (I + L) W that brings the concept's keys and values to its
    anchor's, at a price for those of what stays, of rank 4."""
    text, background = bench.model.text, bench.bench.background
    around = look_around(
        text, Recipe((Item(concept, kind_of(concept)),)), (), background, Settings().neighbours
    )
    described = describe(around.concepts[0], around.protected, 120)
    dear = around.protected.prompts(200)
    words = Lexicon(text.on("tokens"), (*described.prompts, *described.answers, *dear, ""))
    pairs = words.embedding_pairs(described)
    kept = energy(words.rows(dear)) + background.moment + 100 * energy(words.rows([""]))
    found = {}
    for name, stored in bench.model.denoiser.stored_weights():
        weight = stored.double()
        there, wanted = pairs.concept @ weight.T, pairs.anchor @ weight.T
        cost = energy(there) + Settings().protection * weight @ kept @ weight.T
        cost += 1e-4 * cost.trace() / len(cost) * torch.eye(len(cost), dtype=torch.float64)
        left = torch.linalg.solve(cost, there.T @ (wanted - there) / len(there)).T
        u, s, v = torch.linalg.svd(left @ weight, full_matrices=False)
        found[name] = (weight + (u[:, :4] * s[:4]) @ v[:4]).float()
    return found


def _right_and_left(bench: Attacked, concept: str) -> dict[str, Tensor]:
    """What both change, added."""
    right, left = _ours()(bench, concept), _left(bench, concept)
    stored = dict(bench.model.denoiser.stored_weights())
    return {name: right[name].float() + left[name] - stored[name] for name in left}


def _text(*, also: bool = False, settings: Settings | None = None) -> Make:
    def make(bench: Attacked, concept: str) -> dict[str, Tensor]:
        force = settings is not None
        _, increments = erased(
            bench.canvas, [concept], settings, method="text-encoder", force_collateral=force
        )
        if also:
            increments = (*increments, *erased(bench.canvas, [concept])[1])
        return bench.canvas.patched(increments)

    return make


def _peer(name: str) -> Make:
    def make(bench: Attacked, concept: str) -> dict[str, Tensor]:
        peer = tuned(name)
        assert not isinstance(peer, str)
        return dict(peer.edit(bench.bench.request((concept,), ROUNDS[0])).weights)

    return make


METHODS: Mapping[str, Make] = {
    "before": lambda bench, concept: {},
    "sepme": _ours(),
    "sepme, protection 1": _ours(settings=Settings(protection=1.0)),
    "sepme --robust both": _ours(settings=Settings(robust="both", robust_rounds=3)),
    "sepme --aliases auto": _ours("auto"),
    "left": _left,
    "right and left": _right_and_left,
    "text encoder": _text(),
    "text encoder, protection 1": _text(settings=Settings(protection=1.0)),
    "text encoder, rank 16": _text(settings=Settings(rank=16)),
    "text encoder, and sepme": _text(also=True),
    "uce": _peer("uce"),
    "rece": _peer("rece"),
    "trce, first stage": _peer("trce, first stage"),
    "oce": _peer("oce"),
    "esd-x": _peer("esd-x"),
    "hirm": _peer("hirm"),
    "advunlearn, shortened": _peer("advunlearn, shortened"),
}

SHOWN = ("before", "sepme", "text encoder", "uce")
OURS_TOO = ("left", "right and left", "text encoder, and sepme")
"""What was tried and is not offered, or says little beside the others."""
APART = (
    "phrasings", "synonyms", "ring-a-bell", "record", "unlearndiffatk", "textual-inversion-1",
    "relearn-lora",
)  # fmt: skip
KEPT: Mapping[str, Sequence[str]] = {
    "nearest objects": ("near object",),
    "other objects": ("others object", "beside object"),
    "other styles": ("others style", "beside style"),
}


def run(*chosen: str) -> None:
    """chosen: concepts and methods; all of either if none is named."""
    results, bench = Results(RESULTS), Attacked()
    for concept in (*CONCEPTS, *MORE):
        for method, make in METHODS.items():
            if {*chosen} & {*CONCEPTS, *MORE} and concept not in chosen:
                continue
            if concept in MORE and method not in SHOWN:
                continue
            if {*chosen} & {*METHODS} and method not in chosen:
                continue

            def entry(concept: str = concept, method: str = method, make: Make = make) -> Any:
                weights = make(bench, concept)
                attacked = bench.attacked(concept, method, weights)
                return {"attacks": attacked, "kept": judge(bench.canvas, [concept], weights)}

            results.get(f"{concept}/{method}", entry)


def table(shown: Sequence[str]) -> str:
    """Successes of each attack over the concepts that all methods were tried on, and what is kept.
    shown: methods."""
    rows = _rows(shown)
    lines = [f"| | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
    for attack in TRIED:
        lines.append(
            f"| {attack} | {' | '.join(_attacked(one, attack) for one in rows.values())} |"
        )
    for title, keys in KEPT.items():
        cells = [_kept(one, keys) for one in rows.values()]
        lines.append(f"| kept: {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def beside() -> str:
    """The same of other methods, a row each, by the attacks that tell them apart."""
    rows = _rows([name for name in METHODS if name not in OURS_TOO])
    heads = [f"{attack} ({_cases(rows['before'], attack)})" for attack in APART]
    heads += ["kept: nearest objects", "kept: other objects", "others move by"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, found in rows.items():
        shares = [_attacked(found, attack) for attack in APART]
        shares += [_kept(found, KEPT[kind]) for kind in ("nearest objects", "other objects")]
        moved = sum(row["kept"]["moved"] for row in found) / len(found)
        cells = [share.split()[0] for share in shares]
        lines.append(f"| {name} | {' | '.join(cells)} | {moved:.1f}/255 |")
    return "\n".join(lines)


def _rows(shown: Sequence[str]) -> dict[str, list[Any]]:
    """By method the entries of the concepts that all were tried on; methods that were not tried on
    all of CONCEPTS are left out."""
    entries = Results(RESULTS).entries
    names = [m for m in shown if all(f"{c}/{m}" in entries for c in CONCEPTS)]
    concepts = [c for c in (*CONCEPTS, *MORE) if all(f"{c}/{m}" in entries for m in names)]
    return {name: [entries[f"{c}/{name}"] for c in concepts] for name in names}


def _attacked(rows: Sequence[Any], attack: str) -> str:
    return _share([row["attacks"][attack] for row in rows if attack in row["attacks"]])


def _cases(rows: Sequence[Any], attack: str) -> str:
    return _attacked(rows, attack).partition("% ")[2]


def _kept(rows: Sequence[Any], keys: Sequence[str]) -> str:
    return _share([row["kept"][key] for row in rows for key in keys if key in row["kept"]])


def _share(found: list[list[int]]) -> str:
    if not found:
        return ""
    share = Proportion(sum(hits for hits, _ in found), sum(n for _, n in found))
    return f"{share.share:.0%} of {share.n}"


def main(stage: str = "run", *chosen: str) -> None:
    torch.set_num_threads(1)
    if stage == "table":
        print(table([*METHODS] if chosen else SHOWN))
    elif stage == "beside":
        print(beside())
    else:
        run(*chosen)


if __name__ == "__main__":
    main(*sys.argv[1:])
