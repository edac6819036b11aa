"""Files that are nearly right, made from files that are: what is changed follows their format."""

import io
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

from patch_spec.canonical import canonical_json
from patch_spec.errors import FormatError
from patch_spec.header import PREFIX_BYTES
from tests.fuzzing.json_mutants import DEEP, Members, Raw, dump, mutate_text, mutate_value, parse

Mutator = Callable[[Random, bytes, Sequence[bytes]], bytes]
"""Makes one mutant of a file; the last argument: other files, to splice."""

_BYTES = (
    b"\0",
    b"\xff",
    b"\x80",
    b"\x7f",
    b"\n",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"PK\x03\x04",
)
_LENGTHS = (0, 1, 7, 8, 2**16, 2**24, 2**24 + 1, 10**8, 10**8 + 1, 2**31, 2**32, 2**63, 2**64 - 1)


def mutate_bytes(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Bits flipped, a piece gone, doubled, overwritten, cut off, or from another file."""
    if not data:
        return rng.randbytes(rng.randrange(20))
    at, size = rng.randrange(len(data)), rng.choice((1, 1, 2, 8, 64, 1000))
    match rng.randrange(7):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[at + size :]
        case 3:
            return data[:at] + data[at : at + size] * 2 + data[at + size :]
        case 4:
            return data[:at] + rng.choice(_BYTES) + data[at + rng.randrange(2) :]
        case 5:
            other = rng.choice(others) or b"\0"
            return data[:at] + other[rng.randrange(len(other)) :]
        case _:
            return data[:at] + rng.randbytes(min(size, 64)) + data[at + size :]


def mutate_json(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A JSON text changed in its values, its spelling or its bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, data, others)
    return mutate_text(rng, data.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")


def mutate_tensors(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A safetensors file: its length, its header, a record in it, its places or its bytes."""
    length = int.from_bytes(data[:PREFIX_BYTES], "little")
    text, section = data[PREFIX_BYTES : PREFIX_BYTES + length], data[PREFIX_BYTES + length :]
    kind = rng.random()
    if kind < 0.12 or not text:
        return mutate_bytes(rng, data, others)
    if kind < 0.16:
        return rng.choice(_LENGTHS).to_bytes(8, "little") + data[PREFIX_BYTES:]
    if kind < 0.26:
        return data[:PREFIX_BYTES] + text + mutate_bytes(rng, section or b"\0", others)
    if kind < 0.3:
        return _file(mutate_bytes(rng, text, others), section)
    if kind < 0.34:
        return rng.choice(others)[: rng.randrange(40)] + data
    try:
        members = parse(text.decode())
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data, others)
    if not isinstance(members, Members):
        return mutate_bytes(rng, data, others)
    if kind < 0.65:
        _mutate_records(rng, members)
    elif kind < 0.85:
        mutate_value(rng, members)
    else:
        section = _mutate_places(rng, members, section)
    return _file(_spell(rng, members), section)


def mutate_yaml(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """YAML: a piece of it replaced, or something put in that other programs would act on."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data, others)
    pieces = re.findall(rb"[\w.+-]+|\s+|[^\w\s]+", data)
    at = rng.randrange(len(pieces) or 1)
    if rng.random() < 0.5:
        pieces[at : at + 1] = [rng.choice(_YAML)]
    elif rng.random() < 0.5:
        pieces.insert(at, rng.choice(_YAML))
    else:
        pieces[at : at + rng.randrange(8)] = [rng.choice(pieces)] if rng.random() < 0.5 else []
    return b"".join(pieces)


def mutate_archive(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A file that torch has saved: the archive, what is in its pickle, or its bytes."""
    if rng.random() < 0.3 or data[:4] != b"PK\x03\x04":
        return mutate_bytes(rng, data, others)
    if rng.random() < 0.15:
        return _mutate_end(rng, data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError):
        return mutate_bytes(rng, data, others)
    if not members:
        return mutate_bytes(rng, data, others)
    at = rng.randrange(len(members))
    name, content = members[at]
    match rng.randrange(8):
        case 0:
            members[at] = (rng.choice(_MEMBERS), content)
        case 1:
            del members[at]
        case 2:
            members.append((name, rng.choice(members)[1]))
        case 3:
            members[at] = (name, content[: rng.randrange(len(content) + 1)])
        case _:
            at = next((i for i, (n, _) in enumerate(members) if n.endswith("data.pkl")), at)
            members[at] = (members[at][0], _mutate_pickle(rng, members[at][1], others))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members:
            kind = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED
            with warnings.catch_warnings():  # of names that are there twice
                warnings.simplefilter("ignore")
                archive.writestr(zipfile.ZipInfo(name or "x"), content, kind)
    return packed.getvalue()


def mutate_pickle(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A pickle or an archive of one."""
    if data[:4] == b"PK\x03\x04":
        return mutate_archive(rng, data, others)
    return _mutate_pickle(rng, data, others)


def _file(text: bytes, section: bytes) -> bytes:
    return len(text).to_bytes(PREFIX_BYTES, "little") + text + section


def _spell(rng: Random, members: Members) -> bytes:
    """The header canonical, so that what lies deeper is reached; or, now and then, not."""
    text = dump(members, tight=rng.random() < 0.9)
    if rng.random() < 0.9:
        with suppress(FormatError, ValueError, RecursionError):
            return _padded(canonical_json(_plain(members)))
    return _padded(text.encode("utf-8", "surrogatepass"))


def _padded(text: bytes) -> bytes:
    return text.ljust(len(text) + -len(text) % PREFIX_BYTES)


def _plain(value: Any) -> Any:
    """As Python's own values; ValueError for what has no such."""
    if isinstance(value, Raw):
        return _plain(parse(value))
    if isinstance(value, Members):
        names = [_plain(name) for name, _ in value]
        if len(set(map(str, names))) < len(names):
            raise ValueError("a key twice")
        return {str(name): _plain(item) for name, (_, item) in zip(names, value, strict=True)}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _mutate_records(rng: Random, members: Members) -> None:
    """Change a text of the metadata that is JSON itself, its spelling canonical or not."""
    metadata = dict(members).get("__metadata__")
    if not isinstance(metadata, Members) or not metadata:
        mutate_value(rng, members)
        return
    at = rng.randrange(len(metadata))
    name, text = metadata[at]
    for _ in range(rng.choice((1, 1, 1, 2))):
        text = mutate_text(rng, str(text))
    if rng.random() < 0.8:
        with suppress(FormatError, ValueError, RecursionError):
            text = canonical_json(_plain(parse(text))).decode()
    metadata[at] = (name, text)


def _mutate_places(rng: Random, members: Members, section: bytes) -> bytes:
    """Overlaps, holes, other orders, and sizes that add up though they are absurd."""
    tensors = [
        dict(fields) | {"at": fields}
        for name, fields in members
        if name != "__metadata__" and isinstance(fields, Members)
    ]
    tensors = [one for one in tensors if type(one.get("data_offsets")) is list]
    if not tensors:
        return section
    one, other = rng.choice(tensors), rng.choice(tensors)
    match rng.randrange(5):
        case 0:
            one["data_offsets"][:] = other["data_offsets"]
        case 1:
            shift = rng.choice((1, -1, 2, 8, len(section), 2**52))
            one["data_offsets"][:] = [
                n + shift if type(n) is int else n for n in one["data_offsets"]
            ]
        case 2:
            one["at"][:] = [(k, v) for k, v in one["at"] if k != "shape"] + [
                ("shape", rng.choice(([2**52, 0], [0, 2**53 - 1], [1] * 32, [2**26, 2**27], [])))
            ]
        case 3:
            one["shape"], other["shape"] = other.get("shape"), one.get("shape")
            one["at"][:] = [(k, one.get(k)) for k, _ in one["at"]]
        case _:
            end = max(
                max((n for n in t["data_offsets"] if type(n) is int), default=0) for t in tensors
            )
            size = rng.choice((0, 1, 8, 2**20, 2**40, 2**52))
            fields = [("dtype", "U8"), ("shape", [size]), ("data_offsets", [end, end + size])]
            members.append((rng.choice(_NAMES), Members(fields)))
            section += bytes(size if size < 100 else 0)
    return section


def _mutate_end(rng: Random, data: bytes) -> bytes:
    """What tells where an archive's list of members is: two such ends, bytes before, lies."""
    match rng.randrange(4):
        case 0:
            return data + b"PK\x05\x06" + bytes(rng.randrange(30))
        case 1:
            return rng.randbytes(rng.randrange(1, 60)) + data
        case 2:
            return data[:4] + data
        case _:
            end = data.rfind(b"PK\x05\x06")
            return data[:end] + mutate_bytes(rng, data[end:], [data])


def _mutate_pickle(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:
        return data[:at] + rng.choice(_OPCODES) + data[at + rng.randrange(4) :]
    return mutate_bytes(rng, data, others)


_NAMES = (
    "x",
    "model.diffusion_model.input_blocks.0.0.op.weight",
    "model.diffusion_model.input_blocks.0.1.transformer_blocks.0.attn2.to_k.weight",
    "model.diffusion_model.input_blocks.01.1.transformer_blocks.0.attn2.to_k.weight",
    "model.diffusion_model.middle_block.1.transformer_blocks.\u0660.attn2.to_v.weight",
    "model.diffusion_model.label_emb.0.0.weight",
    "conditioner.x",
    "down_blocks.x",
    "conv_in.weight",
    "add_embedding.linear_1.weight",
    "header",
    "0.old.header",
    "1.new.header",
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
    "lora_unet_down_blocks_0_attentions_0.lora_up.weight",
)
_YAML = (
    b"&a", b"*a", b"<<: *a", b"!!int ''", b"!!float ''", b"!!bool x", b"!!timestamp x", b"!!null",
    b"!!python/object/apply:os.system [id]", b"!x", b"!!binary '*'", b"!!set {a}", b"!!omap [a]",
    b'"\\UFFFFFFFF"', b'"\\U00110000"', b'"\\ud800"', b'"\\x00"', b"%YAML 9.9\n", b"%TAG ! x\n",
    b"%YAML " + b"9" * 5000 + b".1\n", b"---\n", b"...\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\t",
    b"? ", b"- ", b": ", b"|\n", b">\n", b"#", b"{", b"}", b"[", b"]", b"null", b"~", b"yes", b"on",
    b".nan", b".inf", b"1e-4", b"0x1F", b"0b1", b"1" + b":1" * 5000, b"1:1", b"9" * 5000, b"1_0",
    b"2024-01-01", b"2024-13-45", b"version", b"concepts", b"name", b"kind", b"aliases", b"like",
    b"protect", b"settings", b"method", b"{c}", b"x" * 3000, b"=", b"'", b'"',
    b"[" * DEEP[1] + b"]" * DEEP[1],
    b"{a: " * DEEP[1] + b"1" + b"}" * DEEP[1],
    b"- " * 300,
    b"? " * 300,
)  # fmt: skip
_MEMBERS = (
    "../x",
    "/etc/x",
    "archive/data.pkl",
    "archive/constants.pkl",
    "archive/version",
    "x" * 300,
)
_OPCODES = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"cposix\nsystem\n", b"R",
    b"b",
    b"ctorch\nload\n", b"ctorch.serialization\n_legacy_load\n", b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"(", b")", b"t", b"l", b"d", b"]", b"}", b"0", b"2", b"1", b"Q", b"u", b"s", b"e", b"a", b".",
    b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"N", b"q\x00", b"h\x00", b"j\xff\xff\xff\xff",
    b"K\x00", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 8 + b"\x7f",
    b"X\xff\xff\xff\x7f", b"X\x01\x00\x00\x00\xff", b"X\x00\x00\x00\x00",
    b"G" + b"\x7f" + b"\xf0" * 7,
)  # fmt: skip
