import pytest
import torch

from sepme_cli.diffusion.tokenizer import tokenize
from sepme_cli.erasure.alignment import align


def words(text: str, answer: str, padding: int = 49407) -> list[int]:
    ids, others = tokenize([text, answer], 12, padding=padding)
    return align(ids, others).tolist()


def test_a_prompt_answers_itself() -> None:
    assert words("a cat", "a cat") == list(range(12))


@pytest.mark.parametrize("padding", [49407, 0])
def test_another_word_in_the_same_place(padding: int) -> None:
    assert words("a cat in ink style", "a cat in mono style", padding) == list(range(12))


def test_a_longer_word_moves_what_follows() -> None:
    # start a cat in |ink| style end ... against start a cat in |em oji one| style end ...
    found = words("a cat in ink style", "a cat in emojione style")
    assert found == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 11, 11]


def test_a_shorter_word_spreads_over_it() -> None:
    found = words("a cat in emojione style", "a cat in ink style")
    assert found == [0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 9]


def test_a_dropped_phrase_is_answered_by_what_follows() -> None:
    # start a cat |in ink style| end ... against start a cat end ...
    assert words("a cat in ink style", "a cat") == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7, 8]


def test_a_text_may_fill_all_positions() -> None:
    assert align(torch.tensor([9, 1, 2, 10]), torch.tensor([9, 3, 10, 0])).tolist() == [0, 1, 1, 2]


def test_nothing_is_answered_from_beyond_the_end() -> None:
    found = align(torch.tensor([9, 1, 10, 10]), torch.tensor([9, 10, 10, 10]))
    assert int(found.max()) < 4
