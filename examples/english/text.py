"""Distil a text encoder that knows English from all-MiniLM-L6-v2.

    python -m examples.english.text              # the canvas's; about 20 minutes on 2 cores
    python -m examples.english.text NAME         # one of `VARIANTS`, to try a method on

The student is a CLIPTextModel as Stable Diffusion has it: CLIP's byte pairs, causal. The state of
its end of text, through a linear map, learns the teacher's mean embedding of the text; the
cosines between the texts of a batch are learned beside; the state of each word's last token learns
the teacher's. Padding is made of ends of text, which the UNet reads too, so one of them learns with
the first. Only the token ids that occur have a row while it learns.
"""

import random
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from examples.emoji.train import SEED, Run, autocast, compact
from examples.english.canvas import OBJECTS, STYLES
from examples.english.corpus import MEDIUMS, Corpus
from examples.english.words import BUILD, teacher
from sepme_cli.diffusion.tokenizer import END, START, tokenize

POSITIONS = 24
CLIP_VOCABULARY = 49408


@dataclass(frozen=True)
class Shape:
    """A text encoder's measures, and the seed and length of its training."""

    width: int = 320
    layers: int = 4
    seed: int = SEED
    steps: int = 1500


CANVAS = "text"
VARIANTS = {
    CANVAS: Shape(),
    "text-narrow": Shape(width=192, layers=5, seed=1, steps=500),
    "text-wide": Shape(width=448, layers=2, seed=2, steps=500),
}


def make_encoder(shape: Shape, vocabulary: int = CLIP_VOCABULARY) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.width // 64,
            max_position_embeddings=POSITIONS,
            hidden_act="quick_gelu",
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


class Teacher:
    """all-MiniLM-L6-v2: mean embeddings of texts, and states of their words."""

    width = 384

    def __init__(self) -> None:
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        folder = teacher()
        self.model = BertModel(
            BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False
        )
        tensors = load_file(folder / "model.safetensors")
        self.model.load_state_dict(tensors, strict=False)
        self.model.eval().requires_grad_(False)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(64)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor, list[list[int]]]:
        """Embeddings [n, 384] of length 1, states [n, tokens, 384], and for each text the place
        of the last token of each of its words."""
        found = self.tokenizer.encode_batch(texts)
        ids = torch.tensor([e.ids for e in found])
        mask = torch.tensor([e.attention_mask for e in found])
        with autocast():
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        places = []
        for text, encoding in zip(texts, found, strict=True):
            stops = {stop: i for i, (_, stop) in enumerate(encoding.offsets) if stop}
            places.append([stops[end] for end in word_ends(text)])
        return F.normalize(mean, dim=-1), states, places


def word_ends(text: str) -> list[int]:
    return [m.end() for m in re.finditer(r"[a-z]+", text.lower())]


@lru_cache(maxsize=200_000)
def pieces(word: str) -> tuple[int, ...]:
    row = tokenize([word], 32)[0].tolist()
    return tuple(row[1 : row.index(END)])


def student_tokens(text: str) -> tuple[list[int], list[int]]:
    """CLIP's ids of a text, and the place of the last token of each of its words."""
    ids, places = [START], []
    for found in re.finditer(r"'[a-z]\b|[a-z]+|[^a-z\s]+", text.lower()):
        ids += pieces(found[0])
        if (found[0][-1].isalpha() and not found[0].startswith("'")) or found[0].startswith("'"):
            places.append(len(ids) - 1)
    return ids, places


def batch_tokens(texts: list[str], length: int | None = None) -> tuple[Tensor, list[list[int]]]:
    """Ids [n, length], padded with ends, and the places of words."""
    rows, places = zip(*map(student_tokens, texts), strict=True)
    longest = length or min(POSITIONS, max(map(len, rows)) + 2)
    ids = torch.full((len(rows), longest), END)
    for i, row in enumerate(rows):
        kept = row[: longest - 1]
        ids[i, : len(kept)] = torch.tensor(kept)
    return ids, list(places)


def vocabulary(corpus: Corpus) -> Tensor:
    """The token ids that texts of the corpus can have, sorted."""
    lists = (
        (corpus.nouns, (f"{noun}s" for noun in corpus.nouns), corpus.held_words),
        (corpus.adjectives, corpus.styles, OBJECTS, (f"{name}s" for name in OBJECTS), STYLES),
        (MEDIUMS, corpus.forms, corpus.held_forms, ["an , . ' - emoji kitty automobile jet"]),
    )
    words = " ".join(word for some in lists for part in some for word in part)
    known = {i for w in set(re.findall(r"'[a-z]\b|[a-z]+|[^a-z\s]+", words)) for i in pieces(w)}
    # What the whole table gets beyond these is the mean of them; single letters spell the rest.
    letters = {i for c in "abcdefghijklmnopqrstuvwxyz0123456789" for i in pieces(c)}
    return torch.tensor(sorted(known | letters | {START, END}))


class Student(nn.Module):
    """The encoder with the two linear maps that compare it to the teacher."""

    def __init__(self, shape: Shape, rows: int) -> None:
        super().__init__()
        self.encoder = make_encoder(shape, rows + 1)
        self.sentence = nn.Linear(shape.width, Teacher.width)
        self.word = nn.Linear(shape.width, Teacher.width)


def train(name: str = CANVAS) -> Student:
    shape = VARIANTS[name]
    torch.manual_seed(shape.seed)
    corpus = Corpus()
    known = vocabulary(corpus)
    torch.save(known, BUILD / f"{name}-ids.pt")
    student = Student(shape, len(known))
    run = Run(name, student, shape.steps, 1e-3, average=0.99, folder=BUILD)
    if run.step == run.steps:
        student.load_state_dict(run.averaged)
        return student.eval()
    master = Teacher()
    rng = random.Random(1000 * shape.seed + run.step)

    def loss() -> Tensor:
        texts = [corpus.draw(rng) for _ in range(128)]
        embeddings, states, theirs = master(texts)
        ids, ours = batch_tokens(texts, POSITIONS if rng.random() < 0.2 else None)
        with autocast():
            hidden = student.encoder(compact(ids, known)).last_hidden_state.float()
        ends = (ids == END).int().argmax(1)
        later = ends + (torch.rand(len(ids)) * (ids.shape[1] - ends)).long()
        total = torch.zeros(())
        rows = torch.arange(len(ids))
        wanted = embeddings @ embeddings.T
        for place in (ends, later):
            found = F.normalize(student.sentence(hidden[rows, place]), dim=-1)
            total = total + 0.5 * (1 - (found * embeddings).sum(-1)).mean()
            own = F.normalize(hidden[rows, place], dim=-1)
            total = total + 2.5 * (found @ found.T - wanted).pow(2).mean()
            total = total + 0.5 * (own @ own.T - wanted).pow(2).mean()
        at = [(i, a, b) for i in range(len(ids)) for a, b in zip(ours[i], theirs[i], strict=False)]
        at = [(i, a, b) for i, a, b in at if a < ids.shape[1] - 1]
        i, a, b = torch.tensor(at).T
        word = F.normalize(student.word(hidden[i, a]), dim=-1)
        total = total + 0.5 * (1 - (word * F.normalize(states[i, b], dim=-1)).sum(-1)).mean()
        return total

    run.go(loss)
    return student


@torch.no_grad()
def embed(student: Student, known: Tensor, texts: list[str]) -> Tensor:
    """The student's sentence embeddings [n, 384]."""
    found = []
    for start in range(0, len(texts), 256):
        ids, _ = batch_tokens(texts[start : start + 256], POSITIONS)
        hidden = student.encoder(compact(ids, known)).last_hidden_state
        ends = (ids == END).int().argmax(1)
        found.append(F.normalize(student.sentence(hidden[torch.arange(len(ids)), ends]), dim=-1))
    return torch.cat(found)


@torch.no_grad()
def report(name: str = CANVAS) -> dict[str, Any]:
    """How well the student says what the teacher does, of what it never saw."""
    student, master, corpus, rng = train(name), Teacher(), Corpus(), random.Random(9)
    known = torch.load(BUILD / f"{name}-ids.pt")
    seen = [corpus.draw(rng) for _ in range(1000)]
    words = corpus.held_words[:400]
    forms = [corpus.fill(rng.choice(corpus.held_forms), rng) for _ in range(1000)]
    found: dict[str, Any] = {"shape": vars(VARIANTS[name])}
    for kind, texts in (("seen", seen), ("held-out words", words), ("held-out forms", forms)):
        cosine = (embed(student, known, texts) * master(texts)[0]).sum(-1)
        found[f"cosine, {kind}"] = round(cosine.mean().item(), 3)
    listed = sorted({*OBJECTS, *corpus.common[:600]})
    asked = [*OBJECTS, *words[:200]]
    theirs, ours = (
        near(torch.cat([f(asked), f(listed)]), len(asked), asked, listed)
        for f in (lambda t: master(t)[0], lambda t: embed(student, known, t))
    )
    found["nearest is among the teacher's five"] = {
        kind: round(sum(ours[w][0] in theirs[w] for w in part) / len(part), 3)
        for kind, part in (("objects", list(OBJECTS)), ("held-out words", words[:200]))
    }
    samples = "kitten kitty automobile burger fortress fiddle bunny puppy cat wolf violin"
    samples += " woodcut cartoon stencil"
    extra = samples.split()
    table = near(embed(student, known, [*extra, *listed]), len(extra), extra, listed)
    found["neighbours"] = {w: table[w] for w in extra}
    return found


def near(
    rows: Tensor, count: int, asked: list[str], listed: list[str], most: int = 5
) -> dict[str, list[str]]:
    found = {}
    order = (rows[:count] @ rows[count:].T).argsort(dim=1, descending=True)
    for word, places in zip(asked, order.tolist(), strict=True):
        found[word] = [listed[i] for i in places if listed[i] != word][:most]
    return found


def whole_table(rows: Tensor, known: Tensor) -> Tensor:
    """The compact embedding's rows at their places among CLIP's 49408; others get their mean."""
    table = rows[1:].mean(0, keepdim=True).repeat(CLIP_VOCABULARY, 1)
    table[known] = rows[1:]
    return table


def state(name: str = CANVAS, folder: Path = BUILD) -> dict[str, Tensor]:
    """The averaged weights of the encoder with the whole vocabulary, in transformers' names."""
    averaged = torch.load(folder / f"{name}.pt", map_location="cpu")["averaged"]
    found = {
        key.removeprefix("encoder."): value
        for key, value in averaged.items()
        if key.startswith("encoder.")
    }
    for key, value in found.items():
        if key.endswith("token_embedding.weight"):
            found[key] = whole_table(value, torch.load(folder / f"{name}-ids.pt"))
    return found


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else CANVAS
    train(chosen)
    for key, value in report(chosen).items():
        print(key, value)
