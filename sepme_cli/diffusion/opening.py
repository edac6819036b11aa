"""Opening a model: its checkpoint, text encoders from elsewhere, and a device for its networks."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from sepme_cli.arguments import as_path, as_places
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.lent import lend_text_encoders
from sepme_cli.diffusion.devices import DTYPES, Work, choose_device
from sepme_cli.diffusion.loading import unet_parameters
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.places import Place
from sepme_cli.progress import SILENT, Progress


@contextmanager
def opened_model(
    model: Place,
    options: ModelOptions = ModelOptions(),
    work: Work = "sampling",
    *,
    images: int = 1,
    check: Callable[[Checkpoint], None] = lambda checkpoint: None,
    progress: Progress = SILENT,
) -> Iterator[StableDiffusion]:
    """The networks of a model, on the device that was chosen for the work.

    images: how many pass through the UNet at once. check: raises where the checkpoint will not do,
    before anything is looked for elsewhere.
    Raises what opening a checkpoint raises, UsageError for a device or dtype that is not there,
    UnsupportedError for text encoders that are none.
    """
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(model, progress))
        check(checkpoint)
        lend_text_encoders(checkpoint, as_places(options.text_encoders), stack)
        on = choose_device(
            work, options, unet=unet_parameters(checkpoint), images=images, progress=progress
        )
        yield StableDiffusion.of(
            checkpoint,
            on.device,
            DTYPES[on.dtype],
            prediction=options.prediction,
            tokenizer=as_path(options.tokenizer),
            t5=options.t5,
            frugal=on.frugal,
            progress=progress,
        )
