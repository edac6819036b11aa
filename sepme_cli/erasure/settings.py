"""The hyper-parameters of erasing; `docs/decisions/0004` and `docs/results.md` argue for the
defaults."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from patch_spec import limits

if TYPE_CHECKING:  # whose YAML `sepme --help` can do without
    from sepme_cli.strict_yaml import Scalar

#: Numbers below these make no sense.
_LEAST = {
    "steps": 1, "rank": 1, "batch_size": 1, "pictures": 2, "sampling_steps": 1,
    "neighbours": 0, "lr": 0, "norm": 0, "guidance": 0,
    "insistence": 0, "protection": 0, "ridge": 0,
    "background": 0, "collateral": 0, "erase_scale": 0, "robust_rounds": 1,
    "pruned_share": 0, "pruned_steps": 0,
}  # fmt: skip
_MOST = {"rank": limits.RANK, "robust_rounds": 3, "pruned_share": 1, "pruned_steps": 1}
#: Against attacks, a concept can be erased in more than its own phrases.
Robust = Literal["none", "phrasings", "embeddings", "both"]
_CHOICES = {"robust": get_args(Robust)}
#: What older patches do not record; those made without it have the bytes that they had.
_NEWER = ("robust", "robust_rounds")
#: What concept-prune alone reads, and its patches alone record.
OF_PRUNING = ("pruned_share", "pruned_steps")


@dataclass(frozen=True)
class AllowedValues:
    """What a hyper-parameter may be. least, most: of a number; choices: of a text, if not any."""

    kind: type
    least: float = -limits.SAFE_INTEGER
    most: float = limits.SAFE_INTEGER
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class CostWeights:
    """What acting on a direction costs, beside the concept's own energy there.

    insistence: for the energy of each other concept. protection: for that of what is protected.
    ridge: for every direction, as a share of the concepts' mean energy a direction, so that what
    nobody looked at stays too.
    """

    insistence: float = 3.0
    protection: float = 10.0
    ridge: float = 1e-4


@dataclass(frozen=True)
class Settings(CostWeights):
    """Hyper-parameters of the method; the paper is SepME, arXiv 2402.05947.

    Attributes:
        insistence: Weight of the other concepts; see `CostWeights`.
        protection: Weight of what is protected.
        ridge: Weight of every direction.
        steps: Maximum number of optimisation steps per concept.
        lr: Learning rate of Adam, on coefficients of unit scale.
        threshold: tau, the momentum of L_cor at which a concept counts as erased.
        rank: Maximum rank of a concept's increment.
        seed: Random seed of noise and batches.
        batch_size: Images per optimisation step.
        momentum: alpha in L_mom.
        norm: lambda, the weight of the increment's norm.
        pictures: Number of images that the original model generates of a concept.
        sampling_steps: Sampling steps for each of them.
        guidance: Scale of their classifier-free guidance.
        start: Share of the closed form that the optimisation starts from; 0 is the paper's start.
        background: Weight of ordinary captions, relative to protected names.
        collateral: Bound on the relative change of 95% of held-out captions; protection grows until
            it holds.
        erase_scale: How far a concept moves to its anchor; 1 is all the way: what is protected
            holds some of its tokens back, and others make up for them.
        neighbours: Number of nearest words that are protected for each concept.
        robust: What to erase of a concept against attacks, beside its own phrases: "phrasings",
            the end of the text in many more of them (TRCE); "embeddings", those that best restore
            its keys and values (RECE); or "both". Not with the paper's loss: it begins there.
        robust_rounds: How often such embeddings are looked for, each time through what was erased
            by then.
        pruned_share: Share of a row's weights that concept-prune may make zero at a step; 0 is its
            authors': 0.01 for a style, 0.02 for anything else.
        pruned_steps: Share of the sampling steps, from the first on, that concept-prune looks at.
    """

    steps: int = 200
    lr: float = 0.02
    threshold: float = 0.4
    rank: int = 4
    seed: int = 0
    batch_size: int = 32
    momentum: float = 0.9
    norm: float = 1e-3
    pictures: int = 32
    sampling_steps: int = 20
    guidance: float = 3.0
    start: float = 1.0
    background: float = 1.0
    collateral: float = 0.7
    erase_scale: float = 1.3
    neighbours: int = 8
    robust: Robust = "none"
    robust_rounds: int = 1
    pruned_share: float = 0.0
    pruned_steps: float = 0.2

    @property
    def more_phrasings(self) -> bool:
        """Whether the end of the text is erased in many more phrasings."""
        return self.robust in ("phrasings", "both")

    @property
    def derived_rounds(self) -> int:
        """How often embeddings that restore a concept are looked for."""
        return self.robust_rounds if self.robust in ("embeddings", "both") else 0

    @property
    def recorded(self) -> dict[str, Any]:
        """What a patch records: all that its method may read, and newer ones where they say
        something."""
        said = asdict(self)
        left_out = (*OF_PRUNING, *(_NEWER if self.robust == "none" else ()))
        return {name: said[name] for name in said if name not in left_out}

    @classmethod
    def of(cls, said: "Mapping[str, Scalar]") -> "Settings":
        """The defaults but for what is said, as `allowed` allows it."""
        return replace(cls(), **dict[str, Any](said))

    @classmethod
    def allowed(cls) -> Mapping[str, AllowedValues]:
        """What each of them may be."""
        return {
            name: AllowedValues(
                type(default),
                _LEAST.get(name, -limits.SAFE_INTEGER),
                _MOST.get(name, limits.SAFE_INTEGER),
                _CHOICES.get(name, ()),
            )
            for name, default in ((f.name, f.default) for f in fields(cls))
        }
