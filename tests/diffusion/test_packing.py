"""Packed texts have the states that each has alone, and no beginning is computed twice in a row."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.packing import PackedTexts, pack, sees
from sepme_cli.erasure.concept import Lexicon
from tests.small_model import POSITIONS, SMALL, small_parts, small_text, write_single_file

CPU = torch.device("cpu")
ROOM = 8
PROMPTS = [
    "", "a cat in ink style", "a cat", "a cat in noto style", "zzz", "a cat", "a",
    *("many words " * POSITIONS, "many words " * (POSITIONS // 2 - 1), *"bcdefghijklmnop"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], StableDiffusion]]:
    folder = tmp_path_factory.mktemp("models")
    with ExitStack() as stack:

        @cache
        def opened(name: str) -> StableDiffusion:
            path = write_single_file(small_parts(name), folder / f"{name}.safetensors")
            return StableDiffusion.of(stack.enter_context(open_checkpoint(path)), CPU)

        yield opened


def seen(packed: PackedTexts) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The tokens and the depths that each node sees, its own the last."""
    return [
        (tuple(ids[mask].tolist()), tuple(depths[mask].tolist()))
        for ids, depths, filled, masks in zip(
            packed.ids, packed.depths, packed.filled, sees(packed.depths), strict=True
        )
        for mask in masks[filled]
    ]


texts = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=ROOM, max_size=ROOM), st.integers(1, ROOM)),
    max_size=40,
)


@given(texts)
@settings(deadline=None)
def test_every_node_sees_its_beginning_and_nothing_else(
    texts: list[tuple[list[int], int]],
) -> None:
    ids = torch.tensor([text for text, _ in texts], dtype=torch.long).reshape(-1, ROOM)
    lengths = torch.tensor([length for _, length in texts], dtype=torch.long)
    packed = pack(ids, lengths, ROOM)
    nodes = seen(packed)
    assert packed.ids.shape[1] <= ROOM
    assert packed.places.shape == ids.shape
    for text, length, places in zip(
        ids.tolist(), lengths.tolist(), packed.places.tolist(), strict=True
    ):
        for position, place in enumerate(places):
            needed = min(position + 1, length)
            assert nodes[place] == (tuple(text[:needed]), tuple(range(needed)))
    # Equal beginnings are read from one place, and no row holds one twice.
    read = {nodes[place] for place in packed.places.flatten().tolist()}
    assert len(read) == len(set(packed.places.flatten().tolist()))
    held = packed.filled.sum(1).tolist()
    for row in torch.arange(len(nodes)).split(held) if held else ():
        assert len({nodes[node] for node in row.tolist()}) == len(row)


def test_what_is_not_filled_sees_itself_alone() -> None:
    packed = pack(torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2]), 3)
    assert packed.filled.tolist() == [[True, True, True], [True, True, False]]
    assert sees(packed.depths)[1, 2].tolist() == [False, False, True]


def alone(text: Any, ids: Tensor, penultimate: bool) -> Tensor:
    with torch.no_grad():
        read = text(ids, output_hidden_states=True)
    return read.hidden_states[-2] if penultimate else read.last_hidden_state


@pytest.mark.parametrize("openclip", [False, True])
@pytest.mark.parametrize("penultimate", [False, True])
def test_packed_states_are_those_of_each_text_alone(openclip: bool, penultimate: bool) -> None:
    """Of random ids, of both activations, by transformers' model and both its attentions."""
    torch.manual_seed(0)
    text = small_text(64, openclip=openclip)
    ids = torch.randint(3, (200, POSITIONS)) * 99
    lengths = torch.randint(1, POSITIONS + 1, (200,))
    packed = pack(ids, lengths, POSITIONS)
    hidden = ~sees(packed.depths)[:, None]
    for attention in ("sdpa", "eager"):
        text.set_attn_implementation(attention)
        expected = alone(text, ids, penultimate)
        with torch.no_grad():
            read = text(
                packed.ids,
                position_ids=packed.depths,
                attention_mask=torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf),
                output_hidden_states=True,
            )
        nodes = read.hidden_states[-2] if penultimate else read.last_hidden_state
        found = nodes[packed.filled][packed.places]
        needed = torch.arange(POSITIONS) < lengths[:, None]
        torch.testing.assert_close(found[needed], expected[needed], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
@pytest.mark.parametrize("paddings", [None, 0, 2])
def test_few_positions_are_the_first_of_all(name: str, paddings: int | None, model: Any) -> None:
    network = model(name)
    whole = network.text.condition(PROMPTS)
    ends = network.text.tokens(PROMPTS).argmax(-1, keepdim=True)
    for positions in (None, 5, POSITIONS):
        found = network.text.encode(PROMPTS, positions, paddings)
        places = torch.arange(positions or POSITIONS).expand(len(PROMPTS), -1)
        if paddings is not None:
            places = places.minimum(ends + paddings)
        expected = whole.states[torch.arange(len(PROMPTS))[:, None], places]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if name in ("sdxl", "sdxl-refiner"):
        again = network.text.condition(PROMPTS, paddings or 0).pooled
        torch.testing.assert_close(again, whole.pooled, rtol=1e-5, atol=1e-5)
    expected = whole.states[torch.arange(len(PROMPTS)), ends.flatten()]
    torch.testing.assert_close(network.text.ends(PROMPTS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_all_positions_are_read_as_the_model_gives_them(name: str, model: Any) -> None:
    """To the bit: pictures that were drawn before must come out again."""
    network = model(name)
    found = network.text.condition(PROMPTS)
    states = [
        alone(encoder.model, encoder.tokens(PROMPTS), encoder.penultimate)
        for encoder in network.text.clips
    ]
    assert found.states.equal(torch.cat(states, -1))
    if name == "sdxl":
        ids = network.text.clips[1].tokens(PROMPTS)
        last = alone(network.text.clips[1].model, ids, penultimate=False)
        ends = last[torch.arange(len(ids)), ids.argmax(-1)]
        assert found.pooled.equal(network.text.clips[1].pooled(ends))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_no_prompts_have_no_states(name: str, model: Any) -> None:
    network = model(name)
    width = SMALL[name].width
    assert network.text.encode([]).shape == (0, POSITIONS, width)
    assert network.text.encode([], 5, 2).shape == (0, 5, width)
    assert network.text.ends([]).shape == (0, width)


def test_equal_beginnings_have_equal_states(model: Any) -> None:
    """To the bit, so that a lexicon counts each once: its rows are the nodes of the trie."""
    network = model("sd1")
    words = Lexicon(network.text.readers, PROMPTS)
    ids = network.text.tokens(PROMPTS)
    ends = ids.argmax(-1)
    beginnings = {
        tuple(text[: n + 1])
        for text, end in zip(ids.tolist(), ends.tolist(), strict=True)
        for n in range(min(end + 3, ids.shape[1]))
    }
    assert len(words.rows(PROMPTS)) == len(beginnings)
