"""Keeps the documents true: a block between a command's name and an end mark holds what the
command prints.

    <!-- python -m benchmarks.scenes table -->
    ...
    <!-- end -->
"""

import importlib
import io
import re
from contextlib import redirect_stdout
from pathlib import Path

DOCUMENTS = tuple(
    Path(name) for name in ("README.md", "docs/results.md", "docs/speed.md", "docs/security.md")
)
_BLOCK = re.compile(
    r"(?P<begin><!-- python -m (?P<module>benchmarks\.\w+)(?P<words>( \S+)*) -->\n)"
    r".*?(?P<end><!-- end -->)",
    re.DOTALL,
)


def commands(text: str) -> list[str]:
    """Of every block, the command that fills it: "benchmarks.scenes table"."""
    return [block["module"] + block["words"] for block in _BLOCK.finditer(text)]


def refreshed(text: str) -> str:
    """The text with every block filled anew; the same again where nothing has changed."""
    return _BLOCK.sub(_filled, text)


def _filled(block: re.Match[str]) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        importlib.import_module(block["module"]).main(*block["words"].split())
    return f"{block['begin']}{printed.getvalue().strip()}\n{block['end']}"


def refresh() -> None:
    """Fill the blocks of all documents."""
    for path in DOCUMENTS:
        text = path.read_text()
        found = refreshed(text)
        if found != text:
            path.write_text(found)
        print(f"{path}: {'refreshed' if found != text else 'true already'}")
