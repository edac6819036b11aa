"""sepme: take concepts out of Stable Diffusion checkpoints, and put them back.

The Python API; `import sepme_cli as sepme` loads nothing that is not used::

    sepme.erase("sd15.safetensors", "Monet", kind="style", output="monet.sepme")
    sepme.apply("sd15.safetensors", "monet.sepme", "clean.safetensors")
    sepme.revert("clean.safetensors", base="sd15.safetensors", output="back.safetensors")
    with sepme.patched(pipe, "monet.sepme"):
        pipe("a garden by Monet")

The commands of the same names do the same; `patched` and `deltas` are for models in memory. All
take paths as text or not, and one thing where several may be. A model or a patch may be on the
hub, "owner/name" or "hf://…". They return frozen results, report
to a `Progress`, and raise subclasses of `SepmeError`.
"""

import lazy_loader

from sepme_cli.version import __version__ as __version__

# `__init__.pyi` says where each name comes from, to lazy_loader as to type checkers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
