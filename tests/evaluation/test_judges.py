"""Judges from transformers and from Python: real models, small and random."""

from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    ViTConfig,
    ViTForImageClassification,
)

from sepme_cli.diffusion.classifiers import Preparation, vision_features
from sepme_cli.diffusion.tokenizer import tokenize
from sepme_cli.erasure.prompts import COMPANIONS, Kind
from sepme_cli.errors import UnsupportedError, UsageError
from sepme_cli.evaluation.judges import knows, load_judge

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SMALL, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
LABELS = ["tench, Tinca tinca", "Van_Gogh", "cat"]


def save_classifier(folder: Path) -> Path:
    torch.manual_seed(0)
    names = dict(enumerate(LABELS))
    config = ViTConfig(**VISION, id2label=names, label2id={v: k for k, v in names.items()})
    ViTForImageClassification(config).eval().save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    text = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 16, "vocab_size": 49408}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION)).eval().save_pretrained(folder)
    return folder


def test_a_classifier_says_its_labels_in_the_words_asked_for(tmp_path: Path) -> None:
    words = [("Van Gogh", "style"), ("Tinca tinca", "object"), ("Monet", "style")]
    judge = load_judge(str(save_classifier(tmp_path)), words)
    assert list(judge.labels("style")) == ["Van Gogh"]
    assert set(judge.labels("object")) == {"Tinca tinca", "cat"}
    assert knows(judge, "van gogh", "style")
    assert not knows(judge, "Monet", "style")
    pictures = torch.rand(5, 3, 20, 20)
    model = ViTForImageClassification.from_pretrained(tmp_path)
    prepare = Preparation(16, (0.5,) * 3, (0.5,) * 3)
    best = model(prepare(pictures)).logits.argmax(-1).tolist()
    expected = [["tench, Tinca tinca", "Van Gogh", "cat"][i] for i in best]
    assert judge.recognise(pictures, "style") == expected


def test_a_clip_model_chooses_among_the_words_and_common_ones(tmp_path: Path) -> None:
    judge = load_judge(str(save_clip(tmp_path)), [("Monet", "style")])
    assert list(judge.labels("style")) == ["Monet", *COMPANIONS["object"]]
    assert list(judge.labels("object")) == list(COMPANIONS["style"])


def pictures_of_one_colour(count: int) -> torch.Tensor:
    """[count, 3, 16, 16]; even random networks tell them apart."""
    colours = torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return colours.expand(-1, -1, 16, 16)


@pytest.mark.parametrize(
    ("kind", "asked"), [("style", "a picture in {} style"), ("object", "a picture of a {}")]
)
def test_what_clip_finds_likeliest_is_chosen(kind: Kind, asked: str, tmp_path: Path) -> None:
    """By the cosine of its embeddings of a picture and of a sentence (Radford et al. 2021)."""
    judge = load_judge(str(save_clip(tmp_path)), [("Monet", "any")])
    pictures = pictures_of_one_colour(40)  # more than one batch
    model = CLIPModel.from_pretrained(tmp_path)
    words = judge.labels(kind)
    ids = tokenize([asked.format(word) for word in words], 16)
    with torch.no_grad():
        sentences = model.text_projection(model.text_model(ids).pooler_output)
        inputs = Preparation(16, (0.5,) * 3, (0.5,) * 3)(pictures)
        images = model.visual_projection(model.vision_model(inputs).pooler_output)
    cosines = torch.cosine_similarity(images[:, None], sentences[None], dim=-1)
    expected = [words[int(i)] for i in cosines.argmax(1)]
    assert judge.recognise(pictures, kind) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("save", [save_classifier, save_clip])
def test_vision_features_are_one_row_a_picture(save, tmp_path: Path) -> None:
    features = vision_features(str(save(tmp_path)), "cpu")
    again = vision_features(str(tmp_path), "cpu")
    pictures = torch.rand(3, 3, 16, 16)
    found = features(pictures)
    assert found.shape == (3, 32)
    assert found.dtype == torch.float64
    assert torch.equal(again(pictures), found)
    assert torch.allclose(features(pictures[1:2])[0], found[1], atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_pictures_are_prepared_as_the_model_says(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"size": {"height": 16}, "image_mean": [0, 0, 0], "image_std": [2, 2, 2]}'
    )
    judge = load_judge(str(tmp_path), [("cat", "object")])
    assert judge.prepare(torch.ones(1, 3, 32, 32)).unique().tolist() == [0.5]


def test_what_is_no_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="hf download"):
        load_judge("nobody/no-such-model", [])
    save_clip(tmp_path / "text")
    CLIPTextModel.from_pretrained(tmp_path / "text").save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedError, match="neither"):
        load_judge(str(tmp_path / "other"), [])
    monkeypatch.chdir(tmp_path)
    code = "def one(): return 1\ndef bad(): raise OSError('no weights')\n"
    Path("judge_here.py").write_text(code)
    with pytest.raises(UsageError, match="does not return a judge"):
        load_judge("judge_here:one", [])
    with pytest.raises(UsageError, match="no weights"):
        load_judge("judge_here:bad", [])
    with pytest.raises(UsageError, match="no_such_module"):
        load_judge("no_such_module:judge", [])
