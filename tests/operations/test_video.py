"""Video models whose UNets read text as an image model's does."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
    UNetMotionModel,
)
from safetensors.torch import load_file
from torch import Tensor

import sepme_cli as sepme
from patch_spec.increment import Increment
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from tests.operations.test_patched import bits, same
from tests.small_model import SMALL, small_parts, small_unet, write_folder
from tests.synthetic import make_patch, operator

FRAMES, ROWS = 2, 5


def video_unet(width: int) -> UNet3DConditionModel:
    """ModelScope's and ZeroScope's kind: it reads the text of Stable Diffusion 2.x."""
    torch.manual_seed(3)
    return UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=width,
        attention_head_dim=8,
    ).eval()


@pytest.fixture
def sd2_patch(tmp_path: Path) -> tuple[Path, Increment]:
    """A patch made on Stable Diffusion 2.x, an operator on its text."""
    model = write_folder(small_parts("sd2"), tmp_path / "sd2")
    with open_checkpoint(model) as checkpoint:
        base = checkpoint.base()
    increment = operator(base, "Monet", seed=1, size=0.5)
    return make_patch(tmp_path / "monet.sepme", base, increment), increment


def moved(rows: Tensor, increment: Increment) -> Tensor:
    assert increment.shift is not None
    shift = np.ldexp(increment.shift.astype(np.float64), increment.shift_exponent)
    way = torch.from_numpy(shift @ increment.basis.astype(np.float64))
    return (rows.double() @ (torch.eye(len(way)) + way).T).float()


@torch.no_grad()
def test_a_patch_of_sd2_fits_a_video_model(
    sd2_patch: tuple[Path, Increment], tmp_path: Path
) -> None:
    """And does there to a prompt what it does on the model that it was made from."""
    patch, increment = sd2_patch
    width = SMALL["sd2"].width
    unet = video_unet(width)
    unet.save_pretrained(tmp_path / "video" / "unet")
    sepme.apply(tmp_path / "video", patch, tmp_path / "out")
    patched = UNet3DConditionModel.from_pretrained(tmp_path / "out" / "unet").eval()
    rows = torch.randn(1, ROWS, width)
    noisy = torch.randn(1, 4, FRAMES, 8, 8)
    before, expected = (unet(noisy, 500, read).sample for read in (rows, moved(rows, increment)))
    found = patched(noisy, 500, rows).sample
    change = (expected - before).norm()
    assert change > 1e-3 * before.norm()
    assert (found - expected).norm() < 2e-3 * change
    # Attention between frames reads no text.
    temporal = [n for n in unet.state_dict() if ".temp_attentions." in n or "transformer_in" in n]
    assert temporal
    assert all(torch.equal(unet.state_dict()[n], patched.state_dict()[n]) for n in temporal)
    sepme.revert(tmp_path / "out", patch, base=tmp_path / "video", output=tmp_path / "back")
    file = Path("unet") / "diffusion_pytorch_model.safetensors"
    first, back = (load_file(tmp_path / name / file) for name in ("video", "back"))
    assert all(torch.equal(first[name], back[name]) for name in first)


def test_a_video_pipeline_in_memory(sd2_patch: tuple[Path, Increment]) -> None:
    width = SMALL["sd2"].width
    unet = video_unet(width)
    torch.manual_seed(0)
    pipeline = TextToVideoSDPipeline(
        vae=AutoencoderKL(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ).eval(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(),
    )
    rows = torch.randn(1, ROWS, width)

    def draw() -> Any:
        return pipeline(
            prompt_embeds=rows,
            negative_prompt_embeds=rows * 0,
            num_frames=FRAMES,
            height=16,
            width=16,
            num_inference_steps=1,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames

    original, before = bits(unet), draw()
    with sepme.patched(pipeline, sd2_patch[0]):
        assert not torch.equal(draw(), before)
    assert same(bits(unet), original) and torch.equal(draw(), before)


def test_animatediff_on_a_patched_model(tmp_path: Path) -> None:
    """Its motion modules go on top of Stable Diffusion 1.x, whose patch is in it then."""
    small = SMALL["sd1"]
    unet = small_unet(small)
    unet.save_pretrained(tmp_path / "sd1")
    with open_checkpoint(tmp_path / "sd1") as checkpoint:
        base = checkpoint.base()
    patch = make_patch(tmp_path / "p.sepme", base, operator(base, "Monet", seed=1, size=0.5))
    sepme.apply(tmp_path / "sd1", patch, tmp_path / "out")
    torch.manual_seed(1)
    adapter = MotionAdapter(
        block_out_channels=small.channels,
        motion_layers_per_block=1,
        motion_num_attention_heads=8,
    )
    written = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    video = UNetMotionModel.from_unet2d(unet, adapter).eval()
    pipeline = AnimateDiffPipeline(
        vae=AutoencoderKL(),
        text_encoder=None,
        tokenizer=None,
        unet=video,
        motion_adapter=adapter,
        scheduler=DDIMScheduler(),
    )
    original = bits(video)
    with sepme.patched(pipeline, patch):
        inside = video.state_dict()
        changed = [n for n in written if not torch.equal(written[n], unet.state_dict()[n])]
        assert changed
        assert all(torch.equal(inside[name], written[name]) for name in changed)
        rest = {n for n in inside if n not in changed}
        now = bits(video)
        assert all(torch.equal(now[n], original[n]) for n in rest & original.keys())
    assert same(bits(video), original)


def test_a_patch_of_the_text_encoder_travels_to_a_video_model(tmp_path: Path) -> None:
    """Of Stable Diffusion 2.x to ModelScope's kind, which reads prompts with the same encoder."""
    parts = small_parts("sd2")
    image = write_folder(parts, tmp_path / "sd2")
    sepme.erase(image, "style:Monet", method="text-encoder", output=tmp_path / "monet.sepme")
    video_unet(SMALL["sd2"].width).save_pretrained(tmp_path / "video" / "unet")
    for place in ("text_encoder", "vae"):
        shutil.copytree(image / place, tmp_path / "video" / place)
    (tmp_path / "video" / "model_index.json").write_text('{"_class_name": "TextToVideoSDPipeline"}')
    made = {}
    for name in ("sd2", "video"):
        sepme.apply(tmp_path / name, tmp_path / "monet.sepme", tmp_path / f"{name}-out")
        before, after = (
            load_file(folder / "text_encoder" / "model.safetensors")
            for folder in (tmp_path / name, tmp_path / f"{name}-out")
        )
        made[name] = {n: v for n, v in after.items() if not torch.equal(v, before[n])}
        sepme.revert(
            tmp_path / f"{name}-out", base=tmp_path / name, output=tmp_path / f"{name}-back"
        )
        back = load_file(tmp_path / f"{name}-back" / "text_encoder" / "model.safetensors")
        assert all(torch.equal(back[n], before[n]) for n in before)
    assert made["sd2"] and made["sd2"].keys() == made["video"].keys()
    assert all(torch.equal(value, made["video"][name]) for name, value in made["sd2"].items())
    unets = [
        load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
        for name in ("video", "video-out")
    ]
    assert all(torch.equal(value, unets[1][name]) for name, value in unets[0].items())
