"""What a model is and what it predicts: told by what counts, and the source is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.copies import unpatched_copies
from sepme_cli.checkpoints.reading.prediction import recorded_prediction
from sepme_cli.checkpoints.structure.detection import detect
from sepme_cli.checkpoints.structure.folders import model_folder
from tests.checkpoints.test_families import FULL, REFINER, SD2, SMALL, XL, entries, unet_only
from tests.layouts import cast_to, write_folder
from tests.synthetic import Shape, checkpoint_tensors, make_checkpoint, write_safetensors

UNET = "model.diffusion_model."
BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
BIAS_IN_DIFFUSERS = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"

#: Single tensors that merging and training leave in files of other models, with their shapes.
LEFTOVERS: dict[str, tuple[int, ...]] = {
    f"{UNET}label_emb.0.0.weight": (1280, 2816),
    f"{UNET}input_blocks.4.1.transformer_blocks.1.norm1.weight": (640,),
    f"{UNET}input_blocks.4.1.transformer_blocks.1.attn1.to_k.weight": (640, 640),
    f"{UNET}input_blocks.99.1.proj_in.weight": (320, 320),
    f"{UNET}input_blocks.98.1.proj_in.weight": (320, 320, 1, 1),
    "conditioner.embedders.0.model.logit_scale": (),
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
    "conditioner.embedders.1.model.text_projection": (1280, 1280),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
    "cond_stage_model.model.logit_scale": (),
    "control_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "lora_unet_down_blocks_0_attentions_0.lora_down.weight": (4, 320),
    "double_blocks.0.img_attn.qkv.weight": (9, 3),
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (9, 3),
    "transformer_blocks.0.attn.add_k_proj.weight": (9, 3),
    f"{UNET}input_blocks.1.1.time_stack.0.attn2.to_k.weight": (320, 768),
    "conv_in.weight": (320, 4, 3, 3),
    "down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3),
    "input_blocks.0.0.weight": (320, 4, 3, 3),
}


@pytest.mark.parametrize("leftover", LEFTOVERS)
@pytest.mark.parametrize("shape", [SMALL, FULL, SD2, XL, REFINER], ids=lambda s: s.family)
def test_a_leftover_of_another_model_decides_nothing(leftover: str, shape: Shape) -> None:
    whole = {n: v.shape for n, (_, v) in checkpoint_tensors(shape).items()}
    for tensors in (entries(whole), unet_only(shape)):
        expected = detect(tensors)
        assert expected[0].name == shape.family
        for first in (True, False):
            stray = entries({leftover: LEFTOVERS[leftover]})
            both = stray | tensors if first else tensors | stray
            assert detect(both) == expected


def test_all_leftovers_together_decide_nothing_of_a_whole_file() -> None:
    for shape in (FULL, SD2, XL):
        whole = {n: v.shape for n, (_, v) in checkpoint_tensors(shape).items()}
        of_sd1 = {n: s for n, s in LEFTOVERS.items() if "proj_in" not in n and "label" not in n}
        assert detect(entries(whole | of_sd1))[0].name == shape.family


def with_bias(spread: float) -> dict[str, tuple[str, np.ndarray]]:
    bias = (np.arange(320) % 2 * 2 - 1) * spread
    return {UNET + BIAS: ("F32", bias.astype("<f4"))}


def single(
    path: Path, family: str = "sd1", metadata: Any = None, more: Any = None, yaml: str = ""
) -> Path:
    shape = {"sd1": SMALL, "sd2": SD2, "sdxl": XL}[family]
    if yaml:
        (path / "m.yaml").write_text(yaml)
    tensors = checkpoint_tensors(shape) | (more or {})
    return write_safetensors(path / "m.safetensors", tensors, metadata)


def folder(path: Path, prediction: str | None = None, metadata: Any = None) -> Path:
    model = write_folder(path / "model", checkpoint_tensors(), metadata=metadata)
    if prediction is not None:
        (model / "scheduler").mkdir()
        said = {"prediction_type": prediction}
        (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(said))
    return model


LDM = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n"
SGM = "model:\n  target: sgm.models.diffusion.DiffusionEngine\n  params:\n"
SCALING = "        target: sgm.modules.diffusionmodules.denoiser_scaling."
MODELSPEC = "modelspec.prediction_type"
METADATA = f"{MODELSPEC} in its metadata"
#: How a model is made; what it predicts, and what says so.
MODELS: dict[str, tuple[Callable[[Path], Path], str, str | None]] = {
    "nothing": (single, "epsilon", None),
    "nothing, XL": (lambda p: single(p, "sdxl"), "epsilon", None),
    **{
        f"modelspec {said}, {family}": (
            lambda p, said=said, family=family: single(p, family, {MODELSPEC: said}),
            expected,
            METADATA,
        )
        for family in ("sd1", "sd2", "sdxl")
        for said, expected in (
            *(("v", "velocity"), ("v_prediction", "velocity"), ("V", "velocity")),
            *(("epsilon", "epsilon"), ("eps", "epsilon")),
        )
    },
    "kohya": (
        lambda p: single(p, metadata={"ss_v_parameterization": "True"}),
        "velocity",
        "ss_v_parameterization in its metadata",
    ),
    "kohya, no": (
        lambda p: single(p, metadata={"ss_v_parameterization": "False"}),
        "epsilon",
        "ss_v_parameterization in its metadata",
    ),
    "yaml": (lambda p: single(p, yaml=LDM + '    parameterization: "v"\n'), "velocity", "m.yaml"),
    "yaml, bare": (lambda p: single(p, yaml=LDM + "    parameterization: v"), "velocity", "m.yaml"),
    "yaml, eps": (
        lambda p: single(p, "sd2", yaml=LDM + "    parameterization: eps\n"),
        "epsilon",
        "m.yaml",
    ),
    "yaml that says nothing": (lambda p: single(p, "sd2", yaml=LDM), "epsilon", "m.yaml"),
    "yaml of XL": (
        lambda p: single(p, "sdxl", yaml=f"{SGM}{SCALING}VScaling\n"),
        "velocity",
        "m.yaml",
    ),
    "yaml of XL, eps": (
        lambda p: single(p, "sdxl", yaml=f"{SGM}{SCALING}EpsScaling\n"),
        "epsilon",
        "m.yaml",
    ),
    "another yaml": (lambda p: single(p, yaml="concepts: [parameterization]\n"), "epsilon", None),
    "a tensor": (
        lambda p: single(p, "sdxl", more={"v_pred": ("F32", np.ones(0, "<f4"))}),
        "velocity",
        "its tensor v_pred",
    ),
    "bias": (
        lambda p: single(p, "sd2", more=with_bias(0.3)),
        "velocity",
        f"the spread of {UNET}{BIAS}",
    ),
    "bias, eps": (
        lambda p: single(p, "sd2", more=with_bias(0.02)),
        "epsilon",
        f"the spread of {UNET}{BIAS}",
    ),
    "bias of SD 1": (lambda p: single(p, more=with_bias(0.3)), "epsilon", None),
    "metadata before yaml and bias": (
        lambda p: single(
            p,
            "sd2",
            {MODELSPEC: "epsilon"},
            with_bias(0.3),
            LDM + '    parameterization: "v"',
        ),
        "epsilon",
        METADATA,
    ),
    "yaml before bias": (
        lambda p: single(p, "sd2", more=with_bias(0.3), yaml=LDM),
        "epsilon",
        "m.yaml",
    ),
    "folder": (
        lambda p: folder(p, "v_prediction"),
        "velocity",
        "scheduler/scheduler_config.json",
    ),
    "folder before metadata": (
        lambda p: folder(p, "epsilon", {MODELSPEC: "v"}),
        "epsilon",
        "scheduler/scheduler_config.json",
    ),
    "folder without a scheduler": (
        lambda p: folder(p, None, {MODELSPEC: "v"}),
        "velocity",
        METADATA,
    ),
    "the UNet's folder": (
        lambda p: folder(p, "v_prediction") / "unet",
        "velocity",
        "scheduler/scheduler_config.json",
    ),
}


def told(path: Path, look: Callable[[Checkpoint], Any] = recorded_prediction) -> Any:
    with open_checkpoint(path) as checkpoint:
        return look(checkpoint)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_predicted_and_what_says_so(name: str, tmp_path: Path) -> None:
    make, prediction, source = MODELS[name]
    found = told(make(tmp_path))
    assert (found.prediction, found.source, found.unknown) == (prediction, source, ())


def test_one_unet_predicts_the_same_in_either_naming(tmp_path: Path) -> None:
    unet = write_folder(tmp_path / "model", checkpoint_tensors(SD2)) / "unet"
    (path,) = unet.glob("*.safetensors")
    for spread, prediction in ((0.3, "velocity"), (0.02, "epsilon")):
        from tests.layouts import parts

        bias = {BIAS_IN_DIFFUSERS: with_bias(spread)[UNET + BIAS]}
        write_safetensors(path, parts(checkpoint_tensors(SD2), SD2)["unet"] | bias)
        for place in (path, unet, unet.parent):
            found = told(place)
            assert found.prediction == prediction
            assert found.source == f"the spread of {BIAS_IN_DIFFUSERS}"


def test_what_is_said_and_not_known_is_passed_over_and_told(tmp_path: Path) -> None:
    model = single(tmp_path, metadata={MODELSPEC: "flow"}, yaml=LDM + "    parameterization: x0")
    found = told(model)
    assert (found.prediction, found.source) == ("epsilon", None)
    assert found.unknown == (f"{METADATA} says 'flow'", "m.yaml says 'x0'")


#: Files beside a model's weights, and whether they may be copies of them.
BESIDE = {
    **dict.fromkeys(
        (
            *("scheduler.bin", "optimizer.bin", "unet/scheduler.bin", "unet/optimizer.pt"),
            *("scaler.pt", "rng_state.pth", "training_args.bin", "random_states_0.pt"),
            *("learned_embeds.safetensors", "pytorch_lora_weights.safetensors"),
        ),
        False,
    ),
    **dict.fromkeys(
        (
            *("v1-5-pruned.ckpt", "model.safetensors", "unet/diffusion_pytorch_model.bin"),
            *("unet/diffusion_flax_model.msgpack", "unet/model.onnx", "unet/openvino_model.xml"),
        ),
        True,
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_weights_is_no_copy_of_them_unless_it_may_be(
    name: str, tmp_path: Path
) -> None:
    model = folder(tmp_path)
    (model / name).write_bytes(b"\x80\x02.")
    found = [path.relative_to(model).as_posix() for path in unpatched_copies(model_folder(model))]
    assert found == ([name] if BESIDE[name] else [])


def test_a_cast_keeps_the_family(tmp_path: Path) -> None:
    tensors = cast_to(checkpoint_tensors(XL), "BF16")
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    assert told(path, lambda c: c.family.name) == "sdxl"
    assert told(make_checkpoint(tmp_path / "s.safetensors"), lambda c: c.dtype) == "fp16"
