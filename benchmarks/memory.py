"""What sparing memory spares: the peak of one step of the optimisation, with and without.

    python -m benchmarks.full_size sd1 build/full/sd1.safetensors
    python -m benchmarks.memory build/full/sd1.safetensors [PIXELS] [BATCH]

Each in a process of its own, on the CPU in fp32, with attention fused where memory is spared and
plain where it is not. What a step takes is its peak less what the loaded networks take. Results:
docs/memory.json.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path("docs/memory.json")
_CONCEPT = ["a picture by Monet"]


def step(path: Path, pixels: int, batch: int, *, frugal: bool) -> dict[str, Any]:
    """One prediction with increments, forwards and backwards, in this process."""
    import torch

    from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
    from sepme_cli.diffusion.models import StableDiffusion
    from sepme_cli.diffusion.predictor import EditedPredictor

    torch.set_num_threads(1)
    with open_checkpoint(path) as checkpoint:
        model = StableDiffusion.of(checkpoint, torch.device("cpu"), frugal=frugal)
        predict = EditedPredictor(model.denoiser, model.text.condition(_CONCEPT))
        up = {
            n: torch.zeros(len(t.weight), 4, requires_grad=True)
            for n, t in model.denoiser.targets.items()
        }
        basis = torch.randn(4, checkpoint.width)
        noisy = torch.randn(batch, *model.latent_shape(pixels))
        _ = model.denoiser.network
        loaded, started = _peak(), time.perf_counter()
        steps, prompts = torch.full((batch,), 500), torch.zeros(batch, dtype=torch.long)
        predict(noisy, steps, prompts, up, basis).pow(2).mean().backward()
    return {
        "loaded_mib": loaded / 2**20,
        "step_mib": (_peak() - loaded) / 2**20,
        "seconds": time.perf_counter() - started,
    }


def _peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(path: Path, pixels: int = 256, batch: int = 4) -> None:
    found: dict[str, Any] = {"model": path.stem, "pixels": pixels, "batch": batch}
    for name in ("kept", "spared"):
        command = [sys.executable, "-m", "benchmarks.memory", "step", name]
        done = subprocess.run(
            [*command, str(path), str(pixels), str(batch)], stdout=subprocess.PIPE, check=True
        )
        found[name] = json.loads(done.stdout)
    found["ratio"] = found["spared"]["step_mib"] / found["kept"]["step_mib"]
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    if sys.argv[1] == "step":
        _, _, how, model, *numbers = sys.argv
        print(json.dumps(step(Path(model), *map(int, numbers), frugal=how == "spared")))
    else:
        main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
