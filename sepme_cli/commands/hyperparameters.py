"""The hyper-parameters of erasing that the command line offers; a recipe can say all of them."""

from typing import Annotated

import typer

from patch_spec import limits

#: Their names, as `Settings` has them.
HYPERPARAMETERS = (
    "steps", "lr", "threshold", "rank", "seed", "batch_size", "pictures", "sampling_steps",
    "neighbours",
)  # fmt: skip

Steps = Annotated[int, typer.Option(min=1, metavar="N", help="At most so many steps.")]
LearningRate = Annotated[float, typer.Option(metavar="X", help="Learning rate.")]
Threshold = Annotated[
    float,
    typer.Option(
        metavar="X",
        help="Stop when the correlation with the concept, 1 at the start, is down to this.",
    ),
]
Rank = Annotated[
    int,
    typer.Option(min=1, max=limits.RANK, metavar="N", help="At most this rank for an increment."),
]
Seed = Annotated[int, typer.Option(metavar="N", help="The same seed gives the same patch.")]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Noisy pictures a step.")]
Pictures = Annotated[
    int,
    typer.Option(
        min=2, metavar="N", help="How many pictures of a concept MODEL draws to learn from."
    ),
]
SamplingSteps = Annotated[
    int, typer.Option(min=1, metavar="N", help="Steps in which it draws each.")
]
Neighbours = Annotated[
    int,
    typer.Option(
        "--protect-neighbours",
        min=0,
        metavar="N",
        help="Of 3,000 common words, also protect the N nearest to each concept.",
    ),
]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, rather than being left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
