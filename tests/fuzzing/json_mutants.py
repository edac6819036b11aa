"""JSON that is nearly right: texts, not values, since what is wrong with it no value can hold."""

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

DEEP = (50, 333, 480, 900, 970, 990, 1500, 20_000)
"""Levels of nesting; a parser, what writes canonically, and `repr` give up at different ones."""

_STRANGE = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "-0", "0.0", "1.0", "2e0",
    "9007199254740991", "9007199254740992", "-9007199254740993", "18446744073709551616",
    "9" * 400, "9" * 5000, "0", "1", "-1", "2", "4", "65536", "true", "false", "null", "01",
    '""', '"x"', '"F16"', '"F4"', '"I64"', '"C64"', '"F128"', '"1"', '"sepme-stack"',
    r'"\ud800"', r'"\udc00\ud800"', r'"\u0000"', r'"\u001b[2J"', r'"\u202e"', r'"e\u0301"',
    '"../../etc/passwd"', '"/etc/passwd"', r'"a\\..\\b"', '"a/../b"', '"\xc3\xa9"', '"\U0001f600"',
    r'"m-00001-of-00001.safetensors"', r'"a\u0000-00001-of-00001.safetensors"',
    r'"\ud800-00001-of-00001.safetensors"', '"../m-00001-of-00001.safetensors"',
    "[]", "{}", "[0]", "[0,0]", "[0,4]", "[4,0]", "[1,1,1]", "[-1]", "[1.0]", "[[]]", "[null]",
    "[4294967296,4294967296]", "[9007199254740991,2]", "[0,9007199254740991]",
    "[" + ",".join("1" * 40) + "]",
    "[" + ",".join(["4503599627370496"] * 32) + "]",
    '"' + "x" * 1025 + '"',
    '"' + "y" * 70_000 + '"',
    "[" + ",".join(["0"] * 5000) + "]",
    "{" + ",".join(f'"{n}":0' for n in range(1500)) + "}",
)  # fmt: skip
_DIGEST = "0123456789abcdef" * 4


class Raw(str):
    """A text that stands where a value should."""


class Members(list[tuple[str, Any]]):
    """An object, which may have a key twice."""


def parse(text: str) -> Any:
    """A JSON value, its objects as `Members`."""
    return json.loads(text, object_pairs_hook=Members)


def dump(value: Any, *, tight: bool = True) -> str:
    """Back to text, in the order it has."""
    if isinstance(value, Raw):
        return value
    comma, colon = (",", ":") if tight else (", ", " : ")
    if isinstance(value, Members):
        pairs = (f"{dump(key)}{colon}{dump(item, tight=tight)}" for key, item in value)
        return "{" + comma.join(pairs) + "}"
    if isinstance(value, list):
        return "[" + comma.join(dump(item, tight=tight) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def mutate_value(rng: Random, root: Any) -> Any:
    """A JSON value with something in it changed; changes `root`."""
    places = list(_places(root))
    if not places:
        return _strange(rng)
    container, index = rng.choice(places)
    change = rng.choice(_CHANGES)
    change(rng, container, index)
    return root


def mutate_text(rng: Random, text: str) -> str:
    """A JSON text with something in it changed, in its values or its spelling."""
    try:
        root = parse(text)
    except (ValueError, RecursionError):
        return text[: rng.randrange(len(text) + 1)]
    changed = dump(mutate_value(rng, root), tight=rng.random() < 0.9)
    if rng.random() < 0.05:
        return rng.choice(("\ufeff", " ", "\n", "[", "//\n")) + changed
    return (
        changed if rng.random() < 0.95 else changed + rng.choice((" ", "\n", "\0", "{}", ",", "x"))
    )


def _places(value: Any) -> Iterator[tuple[Any, int]]:
    """Every place in a value that holds another."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield value, index
            yield from _places(item[1] if isinstance(value, Members) else item)


def _get(container: Any, index: int) -> Any:
    return container[index][1] if isinstance(container, Members) else container[index]


def _set(container: Any, index: int, value: Any) -> None:
    container[index] = (container[index][0], value) if isinstance(container, Members) else value


def _strange(rng: Random) -> Raw:
    if rng.random() < 0.1:
        levels = rng.choice(DEEP) + rng.randrange(10)
        if rng.random() < 0.5:
            return Raw("[" * levels + "]" * levels)
        return Raw('{"a":' * levels + "0" + "}" * levels)
    return Raw(rng.choice(_STRANGE))


def _replace(rng: Random, container: Any, index: int) -> None:
    _set(container, index, _strange(rng))


def _delete(rng: Random, container: Any, index: int) -> None:
    del container[index]


def _repeat(rng: Random, container: Any, index: int) -> None:
    container.insert(rng.randrange(len(container) + 1), container[index])


def _swap(rng: Random, container: Any, index: int) -> None:
    other = rng.randrange(len(container))
    container[index], container[other] = container[other], container[index]


def _rename(rng: Random, container: Any, index: int) -> None:
    if isinstance(container, Members):
        container[index] = (_strange(rng), container[index][1])
    else:
        _replace(rng, container, index)


def _unknown(rng: Random, container: Any, index: int) -> None:
    added = _strange(rng)
    container.insert(index, ("surprise", added) if isinstance(container, Members) else added)


def _nudge(rng: Random, container: Any, index: int) -> None:
    """A number a little off, a text with a letter more, a list with an item less."""
    value = _get(container, index)
    if isinstance(value, bool) or value is None:
        _set(container, index, _strange(rng))
    elif isinstance(value, int | float):
        _set(container, index, rng.choice((value + 1, value - 1, -value, value * 2, 0.5)))
    elif isinstance(value, str) and not isinstance(value, Raw):
        at = rng.randrange(len(value) + 1)
        letter = rng.choice("x0./\\\n\x1b\u202e\u0301\u00e9 A")
        _set(container, index, rng.choice((value[:at], value[:at] + letter + value[at:], _DIGEST)))
    elif isinstance(value, list) and value:
        del value[rng.randrange(len(value))]


def _move(rng: Random, container: Any, index: int) -> None:
    _set(container, index, _get(container, rng.randrange(len(container))))


_CHANGES: tuple[Callable[[Random, Any, int], None], ...] = (
    _replace, _replace, _replace, _nudge, _nudge, _nudge,
    _delete, _repeat, _swap, _rename, _unknown, _move,
)  # fmt: skip
