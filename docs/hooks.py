"""Pages of the site that are made from what they describe, so that they cannot drift from it."""

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def commands() -> str:
    """The reference of all commands, from the application itself."""
    line = [sys.executable, "-m", "typer", "sepme_cli.app", "utils", "docs", "--name", "sepme"]
    text = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT).stdout
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
