"""Pages of the site that are made from what they describe, so that they cannot drift from it."""

import re
from pathlib import Path
from textwrap import dedent

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from sepme_cli.app import program

ROOT = Path(__file__).parent.parent


def commands() -> str:
    """The reference of all commands, from the application itself."""
    command = typer.main.get_command(program())
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="sepme")
    # What the help shows as it stands, examples and statuses, begins with a backspace.
    text = re.sub(r"^ *\x08\n(.*?)\n(?=\n)", _code, text, flags=re.MULTILINE | re.DOTALL)
    # Each command says more of itself further down than a cut line does.
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)
    return text.replace("# `sepme`", "# Commands", 1)


def _code(found: re.Match[str]) -> str:
    return f"```\n{dedent(found[1])}\n```\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs with the files of the site: adds the pages that are made."""
    made = {
        "commands.md": commands(),
        "format.md": (ROOT / "patch_spec/SPEC.md").read_text(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files
