"""The hyper-parameters of erasing, with the defaults that `docs/results.md` argues for."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, beside the model and the prompts.

    steps: most optimisation steps a concept may take. lr: Adam's rate on coefficients of unit
    scale. threshold: tau, the momentum of L_cor at which a concept counts as erased. rank: most
    directions of a concept's increment. seed: of noise and batches. batch_size: moments a step.
    momentum: alpha in L_mom. norm: lambda, the weight of the increment's norm.
    pictures: how many the original model draws of the concept. sampling_steps, guidance: how it
    draws them. start: how much of the closed form's answer the optimisation starts from, 0 being
    the paper's. tolerance, insistence, protection, ridge: see `Weighing`.
    device: cpu, cuda, mps; None picks the best there is. dtype: what the networks compute in.
    """

    steps: int = 200
    lr: float = 0.02
    threshold: float = 0.1
    rank: int = 16
    seed: int = 0
    batch_size: int = 32
    momentum: float = 0.9
    norm: float = 1e-3
    pictures: int = 32
    sampling_steps: int = 20
    guidance: float = 3.0
    start: float = 1.0
    tolerance: float = 1e-2
    insistence: float = 1e3
    protection: float = 100.0
    ridge: float = 1e-4
    device: str | None = None
    dtype: str = "fp32"

    def recorded(self) -> dict[str, int | float | str | bool | None]:
        """What a manifest keeps of them: all but the device, which decides nothing."""
        return {name: value for name, value in asdict(self).items() if name != "device"}

    @classmethod
    def allowed(cls) -> Mapping[str, type]:
        """What a recipe may say of them, and of which type: of all but the device, which is the
        machine's."""
        return {f.name: type(f.default) for f in fields(cls) if f.name != "device"}
