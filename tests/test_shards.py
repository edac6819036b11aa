"""Parts of work: together they are all of it, and each piece is in one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepme_cli.errors import UsageError
from sepme_cli.shards import WHOLE, Shard


@given(st.integers(1, 40), st.lists(st.integers(), max_size=100))
def test_all_parts_together_are_the_whole(count: int, work: list[int]) -> None:
    places = list(range(len(work)))
    parts = [Shard(number, count).of(places) for number in range(1, count + 1)]
    assert sorted(place for part in parts for place in part) == places
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert WHOLE.of(work) == work


def test_a_part_is_said_as_it_is_read() -> None:
    assert Shard.parse("3/16") == Shard(3, 16)
    assert str(Shard.parse("16/16")) == "16/16"


@pytest.mark.parametrize(
    "text", ["0/4", "5/4", "1/0", "3", "1/2/3", "-1/4", "a/b", "", " 1/2", "\u0661/\u0662"]
)
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no such part"):
        Shard.parse(text)
