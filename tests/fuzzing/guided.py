"""Mutants that follow the coverage: `python -m tests.fuzzing.guided TARGET -runs=N`.

Needs the extra `fuzz` (atheris). The readers are those of `targets`, the mutants two thirds
libFuzzer's own and the rest those of `mutants`. All other arguments are libFuzzer's, such as
`-seed=1` or a folder to keep the corpus in. A crash leaves a file `crash-…`.
"""

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> None:
    """Runs until libFuzzer ends the process."""
    import atheris

    # Before the modules are loaded, so that they are instrumented.
    with atheris.instrument_imports(include=["patch_spec", "sepme_cli"]):
        from patch_spec.errors import FormatError
        from sepme_cli.errors import SepmeError
        from tests.fuzzing.targets import TARGETS
    name, *options = arguments
    files, corpus = (Path(tempfile.mkdtemp(suffix=f"-{of}")) for of in ("files", "corpus"))
    target = TARGETS[name](files)
    for number, example in enumerate(target.examples):
        (corpus / str(number)).write_bytes(example)

    def read(data: bytes) -> None:
        try:
            target.check(data)
        except (SepmeError, FormatError):
            return

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        mutated: bytes = target.mutant(rng) if rng.random() < 0.3 else atheris.Mutate(data, most)
        return mutated[:most]

    everything = [sys.argv[0], "-max_len=65536", "-timeout=10", *options, str(corpus)]
    atheris.Setup(everything, read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
