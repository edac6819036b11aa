"""The hyper-parameters of erasing that the command line offers; a recipe can say all of them."""

from typing import Annotated

import typer

from patch_spec import limits
from sepme_cli.erasure.settings import Robust

#: Their names, as `Settings` has them.
HYPERPARAMETERS = (
    "steps", "lr", "threshold", "rank", "seed", "batch_size", "pictures", "sampling_steps",
    "neighbours", "robust", "robust_rounds",
)  # fmt: skip

Steps = Annotated[
    int, typer.Option(min=1, metavar="N", help="Maximum number of optimisation steps.")
]
LearningRate = Annotated[float, typer.Option(metavar="X", help="Learning rate.")]
Threshold = Annotated[
    float,
    typer.Option(
        metavar="X",
        help="Stop when the correlation with the original concept, 1 at the start, has fallen "
        "to this.",
    ),
]
Rank = Annotated[
    int,
    typer.Option(min=1, max=limits.RANK, metavar="N", help="Maximum rank of an increment."),
]
Seed = Annotated[
    int, typer.Option(metavar="N", help="Random seed; the same seed gives the same patch.")
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Images per optimisation step.")]
Pictures = Annotated[
    int,
    typer.Option(
        min=2,
        metavar="N",
        help="Number of images of each concept that MODEL generates to optimise on.",
    ),
]
SamplingSteps = Annotated[
    int, typer.Option(min=1, metavar="N", help="Sampling steps for each of these images.")
]
Neighbours = Annotated[
    int,
    typer.Option(
        "--protect-neighbours",
        min=0,
        metavar="N",
        help="Also protect the N of 3,000 common words that are nearest to each concept.",
    ),
]
RobustOption = Annotated[
    Robust,
    typer.Option(
        "--robust",
        help="Also erase what attacks on the concept use: phrasings, the end of the text in many "
        "more of them; embeddings, those that best restore it; or both. Little was gained where it "
        "was measured, and other prompts change more.",
    ),
]
RobustRounds = Annotated[
    int,
    typer.Option(
        min=1,
        max=3,
        metavar="N",
        help="How often to look for such embeddings, each time through what is erased by then.",
    ),
]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, rather than being left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
