"""Results of `sepme verify` and `sepme sign`."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from sepme_cli.render.tables import add_row, new_table
from sepme_cli.render.wording import printable

if TYPE_CHECKING:
    from sepme_cli.operations.sign import SignResult
    from sepme_cli.operations.verify import VerifyResult


def verify(result: "VerifyResult") -> RenderableType:
    """The checks one below the other, and what was not checked."""
    table = new_table("", "check", "detail")
    for check in result.checks:
        add_row(table, "ok" if check.ok else "NO", check.name, check.detail)
    parts: list[RenderableType] = [table]
    parts += [printable(f"not checked: {what}") for what in result.unchecked]
    return Group(*parts)


def sign(result: "SignResult") -> RenderableType:
    """The signatures, one a row."""
    table = new_table("signature", "key")
    for signed in result.signatures:
        add_row(table, signed.signature, signed.key)
    return table
