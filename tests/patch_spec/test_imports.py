"""The format stands alone: no model library, no command line, no other part of the project."""

import subprocess
import sys

HEAVY = {"torch", "typer", "click", "rich", "sepme_cli", "diffusers", "transformers", "safetensors"}
CODE = """
import pkgutil, sys, patch_spec
for module in pkgutil.walk_packages(patch_spec.__path__, "patch_spec."):
    __import__(module.name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_patch_spec_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"patch_spec", "numpy", "rfc8785"} <= loaded
    assert loaded & HEAVY == set()
