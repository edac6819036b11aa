"""Masks in checkpoints: put in, united, taken out, refused where they cannot be."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

import sepme_cli as sepme
from patch_spec.base import Base
from patch_spec.increment import Increment
from patch_spec.mask import to_flags
from sepme_cli.app import run
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.errors import (
    MalformedError,
    MismatchError,
    RefusedError,
    UnsupportedError,
    UsageError,
)
from sepme_cli.increments import distance, interference
from tests.operations.test_layers import (
    Model,
    files,
    out_of,
    pairs_of,
    peft,
    weight,
    weights_in,
    write_model,
)
from tests.synthetic import make_patch, mask, operator


@dataclass(frozen=True)
class Case:
    """A model with two masks, of some layers each, and an operator."""

    model: Model
    base: Base
    masks: tuple[Increment, Increment]
    patches: Mapping[str, Path]

    def kept(self, name: str, *parts: Increment) -> np.ndarray:
        """The model's own weight, zero where one of these masks is."""
        with open_checkpoint(self.model.path) as checkpoint:
            found = weight(checkpoint, name)
        for part in parts:
            if name in part.gaps:
                found[to_flags(part.gaps[name], found.shape)] = 0.0
        return found


def made(family: str, layout: str, folder: Path) -> Case:
    model = write_model(family, layout, folder / "model")
    summed = [f"{n}.weight" for n, _ in model.denoiser.named_modules() if n.endswith("ff.net.2")]
    clip, _, _ = next(model.clips)
    layers = (*summed, f"{clip}.encoder.layers.0.mlp.fc2.weight")
    with open_checkpoint(model.path) as checkpoint:
        base = checkpoint.base(text_encoders=True)
        first, second = (checkpoint.with_layers(base, own) for own in (layers, summed[1:]))
    one, other = mask(first, "Monet", seed=1), mask(second, "Klimt", seed=2, share=0.3)
    patches = {
        "one": make_patch(folder / "one.sepme", first, one),
        "other": make_patch(folder / "other.sepme", second, other),
        "operator": make_patch(folder / "op.sepme", base, operator(base, "Van Gogh", seed=3)),
    }
    return Case(model, first, (one, other), patches)


@pytest.fixture(params=["sd1-file", "sd1-folder", "sdxl-file", "sdxl-folder"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return made(*request.param.split("-"), tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Case:
    return made("sd1", "file", tmp_path)


def test_two_masks_unite_and_either_comes_out_byte_for_byte(case: Case, tmp_path: Path) -> None:
    model, names = case.model, list(case.patches)
    every = out_of(model, "every")
    sepme.apply(model.path, [*case.patches.values()], every)
    with open_checkpoint(every) as checkpoint:
        for name in case.base.layers:
            assert (weight(checkpoint, name) == case.kept(name, *case.masks)).all(), name
    assert sepme.verify([every, *case.patches.values()], base=model.path).ok
    for taken in names:
        stay = [path for name, path in case.patches.items() if name != taken]
        alone, back = out_of(model, f"alone-{taken}"), out_of(model, f"back-{taken}")
        sepme.apply(model.path, stay, alone)
        result = sepme.revert(
            every,
            [*case.patches.values()],
            concepts={"one": "Monet", "other": "Klimt", "operator": "Van Gogh"}[taken],
            output=back,
            base=model.path,
        )
        assert result.exact
        assert files(back) == files(alone)
    back = out_of(model, "back")
    assert sepme.revert(every, output=back, base=model.path).exact
    assert files(back) == files(model.path)


def test_in_place_in_any_order_and_undone(case: Case) -> None:
    model, original = case.model, files(case.model.path)
    apart = {name: out_of(model, name) for name in case.patches}
    for name, path in apart.items():
        sepme.apply(model.path, case.patches[name], path)
    for first, second in (("one", "other"), ("other", "operator"), ("operator", "one")):
        sepme.apply(model.path, case.patches[first], in_place=True)
        assert sepme.apply(model.path, case.patches[second], in_place=True).exact
        used = [case.patches[first], case.patches[second]]
        assert sepme.verify([model.path, *used]).ok
        sepme.revert(model.path, case.patches[first], in_place=True, exact=True)
        assert weights_in(model.path) == weights_in(apart[second])
        sepme.revert(model.path, in_place=True, exact=True)
        assert files(model.path) == original


def test_a_lora_on_the_same_layers_stays_where_masks_come_and_go(
    small: Case, tmp_path: Path
) -> None:
    model = small.model
    pairs = {n: p for n, p in pairs_of(model).items() if n in small.base.layers}
    save_file(peft(model, pairs), tmp_path / "l.safetensors")
    lora = tmp_path / "lora.sepme"
    sepme.import_lora(tmp_path / "l.safetensors", model.path, lora, concept="x")
    patches = [small.patches["one"], lora, small.patches["other"]]
    out, back, alone = (out_of(model, name) for name in ("out", "back", "alone"))
    sepme.apply(model.path, patches, out)
    with open_checkpoint(out) as checkpoint:
        for name, (up, down) in pairs.items():
            change = weight(checkpoint, name) - small.kept(name, *small.masks)
            wanted = (up.double() @ down.double()).numpy()
            assert np.linalg.norm(change - wanted) < 1e-3 * np.linalg.norm(wanted), name
    sepme.apply(model.path, patches[:2], alone)
    # To take the lora off masked weights by subtracting is near; a mask cannot be taken off so.
    near = sepme.revert(out, patches, concepts="x", output=back)
    assert not near.exact and near.max_abs_error is not None
    with open_checkpoint(back) as checkpoint:
        for name in pairs:
            apart = np.abs(weight(checkpoint, name) - small.kept(name, *small.masks)).max()
            assert apart <= near.max_abs_error, name
    sepme.revert(out, patches, concepts="Klimt", output=back, base=model.path, force=True)
    assert files(back) == files(alone)


def test_what_a_mask_made_zero_comes_back_from_the_base_alone(small: Case) -> None:
    out = out_of(small.model, "out")
    sepme.apply(small.model.path, [small.patches["one"], small.patches["other"]], out)
    back = out_of(small.model, "back")
    with pytest.raises(RefusedError, match=r"Klimt made weights zero.*--base"):
        sepme.revert(out, small.patches["other"], output=back)
    assert not back.exists()


def test_a_mask_of_what_another_patch_changed_takes_the_base(small: Case, tmp_path: Path) -> None:
    """It would make zero what was added there, too."""
    model, one, other = small.model, small.patches["one"], small.patches["other"]
    first, second, both = (out_of(model, name) for name in ("first", "second", "both"))
    sepme.apply(model.path, one, first)
    before = files(first)
    for refused in (
        lambda: sepme.apply(first, other, second),
        lambda: sepme.apply(first, [one, other], second),
        lambda: sepme.sample(first, "x", output=tmp_path / "s.png", patches=other),
    ):
        with pytest.raises(RefusedError, match=r"makes weights of .*ff.net.2.weight zero|already"):
            refused()
    assert not second.exists() and not (tmp_path / "s.png").exists() and files(first) == before
    assert sepme.apply(first, [one, other], second, base=model.path).exact
    sepme.apply(model.path, [one, other], both)
    assert files(second) == files(both)


def test_a_mask_beside_what_was_patched_needs_no_base(small: Case) -> None:
    first, second, both = (out_of(small.model, name) for name in ("first", "second", "both"))
    sepme.apply(small.model.path, small.patches["operator"], first)
    sepme.apply(first, small.patches["one"], second)
    sepme.apply(small.model.path, [small.patches["operator"], small.patches["one"]], both)
    (found,), (wanted,) = weights_in(second).values(), weights_in(both).values()
    assert found[1] == wanted[1]


@pytest.mark.parametrize(
    "ask",
    [
        lambda case, out: sepme.apply(case.model.path, case.patches["one"], out, scale=0.5),
        lambda case, out: sepme.apply(case.model.path, case.patches["one"], out, scale=-1.0),
        lambda case, out: sepme.sample(
            case.model.path, "x", output=out, patches=case.patches["one"], scale=2.0
        ),
        lambda case, out: sepme.export(
            case.patches["one"], "peft", out, base=case.model.path, scale={"Monet": 0.5}
        ),
    ],
)
def test_there_is_no_half_of_a_mask(
    small: Case, tmp_path: Path, ask: Callable[[Case, Path], object]
) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match="Monet is erased by weights that become zero"):
        ask(small, out)
    assert not out.exists()


def test_a_record_with_another_scale_is_malformed(small: Case) -> None:
    """As somebody else may have written it: the patch is at hand, and says that it is a mask."""
    out = out_of(small.model, "out")
    sepme.apply(small.model.path, small.patches["one"], out)
    data = out.read_bytes()
    assert data.count(b'\\"scale\\":1,') == 1
    out.write_bytes(data.replace(b'\\"scale\\":1,', b'\\"scale\\":2,'))
    with pytest.raises(MalformedError, match="a mask of another scale"):
        sepme.verify([out, small.patches["one"]], base=small.model.path)


def test_no_lora_and_nothing_in_memory(small: Case, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="are no LoRA"):
        sepme.export(small.patches["one"], "kohya", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(UnsupportedError, match="not patched in memory"):
        sepme.patched(small.model.denoiser, small.patches["one"])


def test_another_model_without_such_a_layer(small: Case, tmp_path: Path) -> None:
    """Layers of another shape are another model's."""
    other = write_model("sd1", "file", tmp_path / "other", seed=1)
    sepme.apply(other.path, small.patches["one"], out_of(other, "out"))  # a model of the family
    name = next(iter(small.masks[1].masks))
    shape = small.base.layer_shapes[name]
    turned = Base(
        **{**vars(small.base), "layer_shapes": {name: shape[::-1]}, "layers": {name: "0" * 64}}
    )
    patch = make_patch(tmp_path / "turned.sepme", turned, mask(turned, "x", seed=0))
    with pytest.raises(MismatchError, match=r"does not have in that") as caught:
        sepme.apply(small.model.path, patch, out_of(small.model, "turned"))
    assert (caught.value.expected, caught.value.found) == (str([*shape[::-1]]), str([*shape]))


def test_inspect_verify_and_diff_say_how_much(
    small: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = small.masks
    zeros = sum(masked.count for masked in one.masks.values())
    assert run(["inspect", str(small.patches["one"])]) == 0
    said = capsys.readouterr().out
    assert f"{zeros} zeros" in said and "no prompt is promised" in said
    assert run(["verify", str(small.patches["one"])]) == 0
    assert f"{zeros} weights" in " ".join(capsys.readouterr().out.split())
    assert run(["inspect", str(small.patches["one"]), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["manifest"]["increments"]
    assert entry["masks"] == {name: masked.to_json() for name, masked in one.masks.items()}
    assert (entry["kind"], entry["rank"]) == ("mask", 0)
    found = {each.name: each for each in sepme.diff(small.model.path, small.patches["one"]).tensors}
    assert len(found) == len(one.masks)
    out = out_of(small.model, "out")
    sepme.apply(small.model.path, small.patches["one"], out)
    for each in sepme.diff(small.model.path, out).tensors:
        assert each.relative_norm == pytest.approx(found[each.name].relative_norm)
        assert each.max_abs == found[each.name].max_abs and found[each.name].rank is None
    apart = sepme.diff(small.patches["one"], small.patches["other"])
    assert apart.interference is not None
    flags = [
        {n: to_flags(gaps, part.masks[n].shape) for n, gaps in part.gaps.items()}
        for part in (one, other)
    ]
    shared = sum(int((own & flags[1][n]).sum()) for n, own in flags[0].items() if n in flags[1])
    assert 0 < shared < zeros
    assert apart.interference["Monet"]["Klimt"] == pytest.approx(shared / zeros)
    assert interference(one, one) == 1 and distance(one, one) == 0
    theirs = sum(int(own.sum()) for own in flags[1].values())
    assert distance(one, other) == pytest.approx(((zeros + theirs - 2 * shared) / theirs) ** 0.5)
    van_gogh = sepme.diff(small.patches["one"], small.patches["operator"])
    assert van_gogh.interference == {"Monet": {"Van Gogh": 0.0}}


def test_a_mask_cut_off_or_changed_is_refused(small: Case, tmp_path: Path) -> None:
    good = small.patches["one"].read_bytes()
    for bad in (good[:-1], good + b"\0", good[:-1] + bytes([good[-1] ^ 1]), good[:-1] + b"\xff"):
        with pytest.raises(MalformedError):
            sepme.apply(small.model.path, io.BytesIO(bad), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
