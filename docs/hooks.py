"""Pages of the site that are made from what they describe, so that they cannot drift from it."""

import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def commands() -> str:
    """The reference of all commands, from the application itself."""
    line = [sys.executable, "-m", "typer", "sepme_cli.app", "utils", "docs", "--name", "sepme"]
    text = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    # Examples stand indented by two in the help; four make them code.
    text = re.sub(r"^  (?=\S| )", "    ", text, flags=re.MULTILINE)
    return text.replace("# `sepme`", "# Commands", 1)


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
