"""For eval-unlearn (PyPI), a benchmark of erasing methods: sepme as one of its techniques, and the
figures of `evaluate` in the shape of its reports.

Its runner finds `Technique` by the entry point "sepme"; nothing of it is imported here.
"""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from sepme_cli.arguments import FilePath, Words, as_place
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.reading.patches import Patches, read_patch_files, select
from sepme_cli.composing.matching import check_unpatched, fit
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.opening import opened_model
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.diffusion.sampler import generate_images
from sepme_cli.diffusion.weights import patched_weights
from sepme_cli.errors import MalformedError
from sepme_cli.evaluation.results import JSON

TECHNIQUE = "sepme"
"""Its name there, and of the entry point."""


class Technique:
    """A model with patches, in memory; without patches the model as it is, patched or not.

    The runner makes it of the technique's config, and calls `generate`.
    """

    def __init__(
        self,
        *,
        model: str,
        patches: Patches = (),
        erase_concept: Words = (),
        device: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
    ) -> None:
        """model, patches: files, folders or places on the hub. erase_concept: for the runner's
        report; the concepts are those of the patches. Raises as `sepme.sample` does."""
        self.steps, self.guidance = num_inference_steps, guidance_scale
        self._open = ExitStack()
        try:
            self._network = self._opened(model, patches, device)
        except BaseException:
            self._open.close()
            raise

    def _opened(self, model: str, patches: Patches, device: str | None) -> StableDiffusion:
        options = ModelOptions(device=device)
        network = self._open.enter_context(opened_model(as_place(model), options))
        if patches:
            check_unpatched(network.checkpoint, "give its base with the patches")
            files = read_patch_files(patches)
            chosen = select(files, ())
            fit(network.checkpoint, files, chosen).compared(network.checkpoint)
            weights = patched_weights(network.checkpoint, [(one, 1.0) for one in chosen])
            self._open.enter_context(network.with_weights(weights))
        network.load()
        return network

    def generate(
        self,
        prompts: Sequence[str],
        seed: int | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Image.Image]:
        """An image for each prompt; the first has the seed, each further one the next."""
        first = 0 if seed is None else seed
        images = generate_images(
            self._network,
            list(prompts),
            range(first, first + len(prompts)),
            steps=num_inference_steps or self.steps,
            guidance=self._network.scale_of(
                self.guidance if guidance_scale is None else guidance_scale
            ),
        )
        pixels = (255 * images.permute(0, 2, 3, 1)).round().byte().numpy()
        return [Image.fromarray(image) for image in pixels]

    def close(self) -> None:
        """Close the model's files."""
        self._open.close()


def as_report(report: FilePath) -> dict[str, Any]:
    """The figures of `evaluate` as eval-unlearn reports its metric `ua_ira`: UA and IRA, the mean
    of both, and what they were counted on. The judge of `evaluate` decides, not its CLIP model.

    report: a folder that `evaluate` wrote, or its report.json. Raises MalformedError for what is
    none, SystemFailure if it cannot be read.
    """
    path = Path(report) / JSON if Path(report).is_dir() else Path(report)
    with reading(path):
        text = path.read_bytes()
    try:
        told = json.loads(text)
        erased = [name for name, one in told["concepts"].items() if one["role"] == "erased"]
        gone, kept = told["erased"], told["retained_same_domain"]
        hits = round((gone["after"] or 0.0) * gone["n"]), round((kept["after"] or 0.0) * kept["n"])
        known = [share for share in (told["ua"], told["ira"]) if share is not None]
        details = {
            "ua_score": told["ua"],
            "ira_score": told["ira"],
            "target_correct": gone["n"] - hits[0],
            "target_total": gone["n"],
            "retain_correct": hits[1],
            "retain_total": kept["n"],
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MalformedError(
            f"{path} is not a report of sepme evaluate", file=path, expected="its report.json"
        ) from error
    return {
        "run_id": sha256(text).hexdigest()[:8],
        "timestamp": time.time(),
        "technique_name": TECHNIQUE,
        "erase_concept": ", ".join(erased).lower(),
        "metric_name": "ua_ira",
        "dataset_name": "sepme evaluate",
        "dataset_metadata": {"total_loaded": gone["n"] + kept["n"]},
        "metric_result": {
            "name": "UA_IRA",
            "value": sum(known) / len(known) if known else None,
            "details": details,
        },
    }
