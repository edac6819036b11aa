"""Exit statuses never lie: every failing path of every command, and that it writes nothing."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import typer.main

import sepme_cli.app
from sepme_cli.checkpoints.disk.files import only_writer
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.errors import SepmeError
from sepme_cli.exit_status import ExitStatus
from sepme_cli.render.console import Output
from tests.cli.conftest import Run
from tests.keys import OPENSSH


@dataclass(frozen=True)
class Case:
    """A command line; what it must end with. kind: of the error."""

    status: int
    kind: str
    line: str
    stdin: str | None = None
    """The file that standard input is read from."""

    def __str__(self) -> str:
        return self.line

    @property
    def command(self) -> str:
        """Its name, after that of its group if it has one."""
        return command_of(self.line)


def command_of(line: str) -> str:
    words = line.split()
    return " ".join(words[: 2 if words[0] == "recipe" else 1])


JUDGED = "--judge tests.small_judge:judge --report out"
BAD_MODELS = (
    Case(5, "system", "missing.safetensors"),
    Case(3, "unsupported", "folder"),
    Case(3, "malformed", "empty.safetensors"),
    Case(3, "malformed", "text.safetensors"),
    Case(3, "malformed", "huge.safetensors"),
    Case(3, "malformed", "twice.safetensors"),
    Case(3, "malformed", "cut.safetensors"),
    Case(3, "malformed", "pickle.safetensors"),
    Case(3, "malformed", "twice"),
    Case(3, "malformed", "journalled.safetensors"),
    Case(3, "unsupported", "flux.safetensors"),
)
WITH_A_MODEL = (
    "erase {} --concept Monet -o out",
    "apply {} monet.sepme -o out",
    "revert {} -o out",
    "diff {} model.safetensors",
    "diff model.safetensors {}",
    "inspect {}",
    "verify {}",
    "sample {} --prompt x -o out",
    f"evaluate {{}} monet.sepme {JUDGED}",
    f"attack {{}} monet.sepme {JUDGED}",
    "card {}",
    "revert clean.safetensors --base {} -o out",
    "export klimt.sepme --to kohya --base {} -o out",
    "import lora.safetensors --base {} -o out",
    "import --base {} --edited clean.safetensors -o out",
    "import --base model.safetensors --edited {} -o out",
)
WITH_A_LORA = "import {} --base model.safetensors -o out"
#: What is wrong with these is not looked at where a LoRA is wanted, which they are not.
NO_LORAS = ("twice", "journalled.safetensors")
NO = [
    Case(1, "refused", "erase clean.safetensors --concept Monet -o out"),
    Case(1, "refused", "erase clean.safetensors --concept Monet --check"),
    Case(1, "refused", "apply model.safetensors monet.sepme --only Dali -o out"),
    Case(1, "refused", "apply clean.safetensors monet.sepme -o out"),
    Case(1, "refused", "apply clean.safetensors monet.sepme --check"),
    Case(1, "refused", "apply clean.safetensors monet.sepme --base model.safetensors -o out"),
    Case(1, "refused", "revert model.safetensors -o out"),
    Case(1, "refused", "revert clean.safetensors -o out"),
    Case(1, "refused", "revert clean.safetensors --concept Dali --base model.safetensors -o out"),
    Case(1, "refused", "revert clean.safetensors klimt.sepme --base model.safetensors -o out"),
    Case(1, "refused", "revert clean.safetensors monet.sepme --exact -o out"),
    Case(
        1, "refused", "sample model.safetensors --prompt x --patch monet.sepme --only Dali -o out"
    ),
    Case(1, "refused", "card model.safetensors"),
    Case(1, "refused", "export monet.sepme --to kohya --only Dali -o out"),
    Case(1, "refused", "import text-lora.safetensors --base model.safetensors -o out"),
    Case(1, "refused", "import lora.safetensors --base clean.safetensors -o out"),
    Case(1, "refused", "import lora.safetensors --base model.safetensors --error 0 -o out"),
    Case(1, "refused", "import --base clean.safetensors --edited model.safetensors -o out"),
    Case(1, "refused", "import --base model.safetensors --edited model.safetensors -o out"),
    Case(
        1,
        "refused",
        "import --base model.safetensors --edited cousin.safetensors --error 0 -o out",
    ),
    Case(1, "refused", "export monet.sepme --to kohya --scale Dali=2 -o out"),
    Case(1, "refused", "export klimt.sepme --to peft --base clean.safetensors -o out"),
    Case(1, "refused", f"evaluate clean.safetensors monet.sepme {JUDGED}"),
    Case(1, "refused", f"evaluate model.safetensors monet.sepme --only Dali {JUDGED}"),
    Case(1, "refused", f"attack clean.safetensors monet.sepme {JUDGED}"),
    Case(1, "refused", f"attack model.safetensors monet.sepme --concept Dali {JUDGED}"),
]
USAGE = [
    Case(2, "usage", "nonsense"),
    Case(2, "usage", "--nonsense"),
    Case(2, "usage", "inspect"),
    Case(2, "usage", "inspect monet.sepme --nonsense"),
    Case(2, "usage", "inspect monet.sepme klimt.sepme"),
    Case(2, "usage", "diff monet.sepme"),
    Case(2, "usage", "apply model.safetensors"),
    Case(2, "usage", "apply model.safetensors monet.sepme"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o out --in-place"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o out --scale much"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o out --scale 0"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o out --scale nan"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o out --scale inf"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o out --scale 1e30"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o out --dtype int8"),
    Case(2, "usage", "apply model.safetensors monet.sepme --in-place --dtype fp32"),
    Case(2, "usage", "apply model.safetensors - - -o out", "monet.sepme"),
    Case(2, "usage", "revert clean.safetensors"),
    Case(2, "usage", "revert clean.safetensors -o out --in-place"),
    Case(2, "usage", "revert clean.safetensors -o out --base model.safetensors --undo x"),
    Case(2, "usage", "erase model.safetensors"),
    Case(2, "usage", "erase model.safetensors --recipe policy.yaml --concept Dali -o out"),
    Case(2, "usage", "erase model.safetensors --recipe policy.yaml --protect Dali -o out"),
    Case(2, "usage", "erase model.safetensors --recipe policy.yaml --to Dali -o out"),
    Case(2, "usage", "erase model.safetensors --recipe policy.yaml --as style -o out"),
    Case(2, "usage", "erase model.safetensors --concept Monet --to monet -o out"),
    Case(2, "usage", "erase model.safetensors -c Monet -c Dali --to Dali -o out"),
    Case(2, "usage", "erase model.safetensors -c Monet --rank 78 -o out"),
    Case(2, "usage", "erase model.safetensors -c Monet -c monet --check"),
    Case(2, "usage", "erase model.safetensors --concept= -o out"),
    Case(2, "usage", f"erase model.safetensors --concept {'m' * 201} -o out"),
    Case(2, "usage", "erase model.safetensors --concept Monet --to= -o out"),
    Case(2, "usage", "erase model.safetensors --concept Monet --protect style: -o out"),
    Case(2, "usage", "erase - --concept Monet -o out", "model.safetensors"),
    Case(2, "usage", "apply - monet.sepme -o out", "model.safetensors"),
    Case(2, "usage", "apply clean.safetensors klimt.sepme --base - -o out", "model.safetensors"),
    Case(2, "usage", "diff - model.safetensors", "model.safetensors"),
    Case(2, "usage", "import - --base model.safetensors -o out", "lora.safetensors"),
    Case(2, "usage", "import --base model.safetensors --edited - -o out", "clean.safetensors"),
    Case(2, "usage", "import lora.safetensors --base model.safetensors --concept= -o out"),
    Case(2, "usage", "inspect https://example.org/m.safetensors"),
    Case(2, "usage", "apply https://huggingface.co/a/b monet.sepme -o out"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o s3://bucket/out.safetensors"),
    Case(2, "usage", "erase model.safetensors -c Monet --protect-neighbours -1 -o out"),
    Case(2, "usage", "verify model.safetensors --model model.safetensors"),
    Case(2, "usage", "verify clean.safetensors --recipe policy.yaml"),
    Case(2, "usage", "verify monet.sepme --signed-by alice"),
    Case(2, "usage", "verify klimt.sepme --allowed-signers signers --signed-by="),
    Case(2, "usage", "verify monet.sepme --statement clean.json"),
    Case(2, "usage", "apply model.safetensors monet.sepme --check --statement out.json"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o out --statement out"),
    Case(2, "usage", "sign monet.sepme"),
    Case(2, "usage", "sign --key key"),
    Case(2, "usage", "example nonsense"),
    Case(2, "usage", "recipe init one.yaml two.yaml"),
    Case(2, "usage", "recipe check"),
    Case(2, "usage", "recipe nonsense"),
    Case(2, "usage", "card"),
    Case(2, "usage", "card clean.safetensors model.safetensors"),
    Case(2, "usage", "inspect hf://nonsense"),
    Case(2, "usage", "inspect hf://datasets/a/b"),
    Case(2, "usage", "apply hf://a/b monet.sepme --in-place"),
    Case(2, "usage", "apply model.safetensors hf://a/b -o out"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o hf://a/b/c.safetensors"),
    Case(2, "usage", "revert clean.safetensors -o hf://a/b/c.safetensors"),
    Case(2, "usage", "erase model.safetensors -c Monet -o hf://a/b"),
    Case(2, "usage", "erase model.safetensors --concept Monet --concept monet -o out"),
    Case(2, "usage", "erase model.safetensors --concept Monet --method guess"),
    Case(2, "usage", "erase model.safetensors --concept Monet --as sound"),
    Case(2, "usage", "erase model.safetensors --concept Monet --steps 0"),
    Case(2, "usage", "erase model.safetensors --concept Monet --device abacus -o out"),
    Case(2, "usage", "erase model.safetensors --concept Monet --dtype int8 -o out"),
    Case(2, "usage", "erase model.safetensors -c Monet -c Klimt --images folder -o out"),
    Case(2, "usage", "export monet.sepme -o out"),
    Case(2, "usage", "import -o out"),
    Case(2, "usage", "import --base model.safetensors -o out"),
    Case(2, "usage", "import lora.safetensors -o out"),
    Case(2, "usage", "import --edited clean.safetensors -o out"),
    Case(2, "usage", "import lora.safetensors --base model.safetensors --edited x -o out"),
    Case(2, "usage", "import lora.safetensors --base model.safetensors --rank 78 -o out"),
    Case(2, "usage", "import lora.safetensors --base model.safetensors --error 2 -o out"),
    Case(2, "usage", "export monet.sepme --to lycoris -o out"),
    Case(2, "usage", "export klimt.sepme --to kohya -o out"),
    Case(2, "usage", "export monet.sepme --to kohya --dtype fp8 -o out"),
    Case(2, "usage", "export monet.sepme --to kohya --scale much -o out"),
    Case(2, "usage", "export monet.sepme --to kohya --scale Monet= -o out"),
    Case(2, "usage", "export monet.sepme --to kohya --scale 0 -o out"),
    Case(2, "usage", "export monet.sepme --to kohya --scale Monet=0 -o out"),
    Case(2, "usage", "export both.sepme --to kohya --scale 2 --scale Monet=1 -o out"),
    Case(2, "usage", "export monet.sepme --to kohya -o out.pt"),
    Case(2, "usage", "sample model.safetensors --prompt x"),
    Case(2, "usage", "sample model.safetensors -o out"),
    Case(2, "usage", "sample model.safetensors --prompt x -o out --device abacus"),
    Case(2, "usage", "sample model.safetensors --prompt x -o out --dtype int8"),
    Case(2, "usage", f"evaluate model.safetensors {JUDGED}"),
    Case(2, "usage", "evaluate model.safetensors monet.sepme --report out"),
    Case(2, "usage", "evaluate model.safetensors monet.sepme --judge tests.small_judge:judge"),
    Case(2, "usage", "evaluate model.safetensors monet.sepme --judge nonsense:x --report out"),
    Case(2, "usage", "evaluate model.safetensors monet.sepme --judge os:getcwd --report out"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --pictures 1 {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --as sound {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --device abacus {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --retain monet {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --reference folder {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --features x {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --training-images folder {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --shard 5/4 {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --shard 1/4 --from out {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors - - {JUDGED}", "monet.sepme"),
    Case(2, "usage", f"attack model.safetensors {JUDGED}"),
    Case(2, "usage", "attack model.safetensors monet.sepme --report out"),
    Case(2, "usage", f"attack model.safetensors monet.sepme --attack magic {JUDGED}"),
    Case(2, "usage", f"attack model.safetensors monet.sepme --budget huge {JUDGED}"),
    Case(2, "usage", f"attack model.safetensors monet.sepme --shard 5/4 {JUDGED}"),
    Case(2, "usage", f"attack model.safetensors monet.sepme --device abacus {JUDGED}"),
]
MALFORMED = [
    *(
        Case(bad.status, bad.kind, line.format(bad.line))
        for bad in BAD_MODELS
        for line in (*WITH_A_MODEL, *([] if bad.line in NO_LORAS else [WITH_A_LORA]))
    ),
    *(Case(3, "unsupported", WITH_A_LORA.format(name)) for name in NO_LORAS),
    Case(3, "malformed", "apply nan.safetensors monet.sepme -o out"),
    Case(3, "malformed", "apply nan.safetensors monet.sepme --check"),
    Case(3, "malformed", "apply model.safetensors text.sepme -o out"),
    Case(3, "malformed", "apply model.safetensors cut.sepme -o out"),
    Case(3, "malformed", "apply model.safetensors cut.sepme --in-place"),
    Case(3, "malformed", "apply model.safetensors - -o out", "cut.sepme"),
    Case(3, "malformed", "apply model.safetensors - -o out"),
    Case(3, "malformed", "apply model.safetensors model.safetensors -o out"),
    Case(3, "malformed", "revert clean.safetensors cut.sepme --base model.safetensors -o out"),
    Case(3, "malformed", "revert clean.safetensors --undo text.safetensors -o out"),
    Case(3, "malformed", "diff cut.sepme monet.sepme"),
    Case(3, "malformed", "inspect headless.sepme"),
    Case(3, "malformed", "inspect -", "headless.sepme"),
    Case(3, "malformed", "erase model.safetensors --concept x --known cut.sepme -o out"),
    Case(3, "malformed", "sample model.safetensors --prompt x --patch cut.sepme -o out"),
    Case(3, "malformed", "erase model.safetensors --recipe bad.yaml -o out"),
    Case(3, "malformed", "erase model.safetensors --recipe cut.sepme -o out"),
    Case(3, "malformed", "erase model.safetensors --recipe bad.yaml --check"),
    Case(3, "unsupported", "erase model.safetensors --recipe policy.yaml --check"),
    Case(3, "malformed", "verify monet.sepme --recipe bad.yaml"),
    Case(3, "malformed", "verify monet.sepme --model cut.safetensors"),
    Case(3, "malformed", "verify clean.safetensors --statement bad.json"),
    Case(3, "malformed", "verify clean.safetensors --statement monet.sepme"),
    Case(3, "malformed", "sign cut.sepme --key key"),
    Case(3, "malformed", "sign bad.json --key key"),
    Case(3, "malformed", "sign key --key key"),
    Case(3, "malformed", "sign monet.sepme --key monet.sepme"),
    Case(3, "unsupported", "sign folder --key key"),
    Case(3, "unsupported", "sign flux.safetensors --key key"),
    Case(3, "malformed", "recipe check bad.yaml"),
    Case(3, "malformed", "card cut.sepme"),
    Case(3, "malformed", "card monet.sepme --report bad.yaml"),
    Case(3, "malformed", "recipe check tagged.yaml"),
    Case(3, "malformed", "recipe check escaped.yaml"),
    Case(3, "malformed", "apply model.safetensors monet.sepme -o out --scale 1e12"),
    Case(3, "malformed", "apply model.safetensors monet.sepme --in-place --scale 1e12"),
    Case(3, "malformed", "apply journalled.safetensors monet.sepme --in-place"),
    Case(3, "malformed", "export cut.sepme --to kohya -o out"),
    Case(3, "unsupported", "import model.safetensors --base model.safetensors -o out"),
    Case(3, "unsupported", "import dora.safetensors --base model.safetensors -o out"),
    Case(3, "malformed", "import half-lora.safetensors --base model.safetensors -o out"),
    Case(3, "malformed", "import --base model.safetensors --edited nan.safetensors -o out"),
    Case(3, "malformed", "import --base nan.safetensors --edited model.safetensors -o out"),
    Case(3, "malformed", "export - --to kohya -o out", "cut.sepme"),
    Case(3, "malformed", "export klimt.sepme --to kohya --base nan.safetensors -o out"),
    Case(3, "malformed", "recipe check model.safetensors"),
    Case(3, "malformed", f"evaluate model.safetensors cut.sepme {JUDGED}"),
    Case(3, "malformed", f"evaluate model.safetensors - {JUDGED}", "cut.sepme"),
    Case(3, "malformed", f"attack model.safetensors cut.sepme {JUDGED}"),
    Case(3, "malformed", f"evaluate model.safetensors monet.sepme --recipe cut.sepme {JUDGED}"),
    # A UNet's weights without the networks that drawing needs.
    Case(3, "unsupported", f"evaluate model.safetensors monet.sepme {JUDGED}"),
    Case(3, "unsupported", "evaluate model.safetensors monet.sepme --judge folder --report out"),
    Case(3, "unsupported", f"evaluate model.safetensors monet.sepme --lpips {JUDGED}"),
    Case(
        3,
        "unsupported",
        f"evaluate model.safetensors monet.sepme --reference folder --features folder {JUDGED}",
    ),
]
MISMATCH = [
    Case(4, "mismatch", "apply sd2.safetensors monet.sepme -o out"),
    Case(4, "mismatch", "apply sd2.safetensors monet.sepme --check"),
    Case(4, "mismatch", "apply sd2.safetensors monet.sepme --in-place"),
    Case(4, "mismatch", "apply clean.safetensors klimt.sepme --base cousin.safetensors -o out"),
    Case(4, "mismatch", "apply clean.safetensors klimt.sepme --base clean.safetensors -o out"),
    Case(4, "mismatch", "revert clean.safetensors --base cousin.safetensors -o out"),
    Case(4, "mismatch", "diff sd2.safetensors monet.sepme"),
    Case(4, "mismatch", "erase model.safetensors --concept x --known sd2.sepme -o out"),
    Case(4, "mismatch", "sample sd2.safetensors --prompt x --patch monet.sepme -o out"),
    Case(4, "mismatch", "import wide-lora.safetensors --base model.safetensors -o out"),
    Case(4, "mismatch", "import --base model.safetensors --edited sd2.safetensors -o out"),
    Case(4, "mismatch", "export klimt.sepme --to kohya --base sd2.safetensors -o out"),
    Case(4, "mismatch", f"evaluate sd2.safetensors monet.sepme {JUDGED}"),
    Case(4, "mismatch", f"attack sd2.safetensors monet.sepme {JUDGED}"),
]
SYSTEM = [
    Case(5, "system", "apply model.safetensors missing.sepme -o out"),
    Case(5, "system", "apply model.safetensors monet.sepme -o clean.safetensors"),
    Case(5, "system", "apply model.safetensors monet.sepme -o folder"),
    Case(5, "system", "apply model.safetensors monet.sepme -o missing/out"),
    Case(5, "system", "apply model.safetensors monet.sepme -o /dev/full"),
    Case(5, "system", "revert clean.safetensors --base model.safetensors -o monet.sepme"),
    Case(5, "system", "revert clean.safetensors --undo missing -o out"),
    Case(5, "system", "revert clean.safetensors missing.sepme --base model.safetensors -o out"),
    Case(5, "system", "diff monet.sepme missing.sepme"),
    Case(5, "system", "export missing.sepme --to kohya -o out"),
    Case(5, "system", "import lora.safetensors --base model.safetensors -o monet.sepme"),
    Case(5, "system", "import lora.safetensors --base model.safetensors -c monet"),
    Case(5, "system", "import lora.safetensors --base model.safetensors -o missing/out"),
    Case(5, "system", "export monet.sepme --to kohya -o clean.safetensors"),
    Case(5, "system", "export monet.sepme --to kohya -o folder"),
    Case(5, "system", "export monet.sepme --to kohya -o missing/out"),
    Case(5, "system", "erase model.safetensors --concept x -o monet.sepme"),
    Case(5, "system", "erase model.safetensors --concept monet"),
    Case(5, "system", "erase model.safetensors --concept x -o out --apply clean.safetensors"),
    Case(5, "system", "erase model.safetensors --concept x --known missing.sepme -o out"),
    Case(5, "system", "sample model.safetensors --prompt x -o monet.sepme"),
    Case(5, "system", "erase model.safetensors --recipe missing.yaml -o out"),
    Case(5, "system", "erase model.safetensors --recipe policy.yaml -o monet.sepme"),
    Case(5, "system", "verify monet.sepme --recipe missing.yaml"),
    Case(5, "system", "verify monet.sepme --model missing.safetensors"),
    Case(5, "system", "verify clean.safetensors --statement missing.json"),
    Case(5, "system", "verify klimt.sepme --allowed-signers missing"),
    Case(5, "system", "apply model.safetensors monet.sepme -o out --statement clean.json"),
    Case(5, "system", "apply model.safetensors monet.sepme -o out --statement missing/x.json"),
    Case(5, "system", "sign monet.sepme --key missing"),
    Case(5, "system", "sign missing.sepme --key key"),
    Case(5, "system", "sign klimt.sepme --key key"),
    Case(5, "system", "example"),
    Case(5, "system", "example -o missing/out"),
    Case(5, "system", "recipe init policy.yaml"),
    Case(5, "system", "recipe init missing/policy.yaml"),
    Case(5, "system", "recipe init /dev/full"),
    Case(5, "system", "recipe check missing.yaml"),
    Case(5, "system", "card missing.sepme"),
    Case(5, "system", "card monet.sepme --report missing"),
    Case(5, "system", "sample model.safetensors --prompt x --patch missing.sepme -o out"),
    Case(5, "system", f"evaluate model.safetensors missing.sepme {JUDGED}"),
    Case(5, "system", f"attack model.safetensors missing.sepme {JUDGED}"),
    Case(5, "system", f"attack model.safetensors monet.sepme {JUDGED} --report monet.sepme"),
    Case(5, "system", f"attack model.safetensors monet.sepme {JUDGED} --report ."),
    Case(5, "system", f"evaluate model.safetensors monet.sepme --recipe missing {JUDGED}"),
    Case(5, "system", f"evaluate model.safetensors monet.sepme --from missing {JUDGED}"),
    Case(
        5,
        "system",
        f"evaluate model.safetensors monet.sepme --training-images missing --features x {JUDGED}",
    ),
    Case(
        5,
        "system",
        f"evaluate model.safetensors monet.sepme --reference missing --features x {JUDGED}",
    ),
    Case(5, "system", f"evaluate model.safetensors monet.sepme {JUDGED} --report monet.sepme"),
    Case(5, "system", f"evaluate model.safetensors monet.sepme {JUDGED} --report missing/out"),
    Case(5, "system", f"evaluate model.safetensors monet.sepme {JUDGED} --report ."),
]
FAILING = [*NO, *USAGE, *MALFORMED, *MISMATCH, *SYSTEM]
#: The first of each command's kinds of errors: all errors are shown in one place.
IN_WORDS = list({(case.command, case.kind): case for case in reversed(FAILING)}.values())


def contents(folder: Path) -> dict[str, str]:
    """What is in a folder, by name."""
    return {
        path.name: sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.iterdir()
    }


@pytest.fixture
def here(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The scene's files in a folder of the test's own, which is where it runs."""
    folder = tmp_path / "scene"
    shutil.copytree(scene, folder)
    monkeypatch.chdir(folder)
    return folder


def stdin_of(case: Case) -> bytes:
    return Path(case.stdin).read_bytes() if case.stdin else b""


def needs_openssh(case: Case) -> None:
    if not OPENSSH and {"key", "signers"} & set(case.line.split()):
        pytest.skip("needs ssh-keygen")


@pytest.mark.parametrize("case", FAILING, ids=str)
def test_a_failing_path(case: Case, here: Path, sepme: Run) -> None:
    needs_openssh(case)
    before = contents(here)
    told = sepme(*case.line.split(), "--json", stdin=stdin_of(case))
    assert told.status == case.status
    error = told.json["error"]
    assert error.keys() == {"kind", "message", "file", "expected", "found"}
    assert error["kind"] == case.kind
    assert contents(here) == before


@pytest.mark.parametrize("case", IN_WORDS, ids=str)
def test_a_failing_path_in_words(case: Case, here: Path, sepme: Run) -> None:
    needs_openssh(case)
    before = contents(here)
    said = sepme(*case.line.split(), "-q", stdin=stdin_of(case))
    assert said.status == case.status
    assert said.out == b""
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err

    assert contents(here) == before


@pytest.mark.parametrize(
    ("line", "hold"),
    [
        ("apply clean.safetensors klimt.sepme --in-place", open_checkpoint),
        ("apply clean.safetensors klimt.sepme --in-place", only_writer),
        ("revert clean.safetensors --base model.safetensors --in-place", only_writer),
        ("apply model.safetensors klimt.sepme -o clean.safetensors --force", only_writer),
    ],
)
def test_a_busy_file(
    line: str,
    hold: Callable[[Path], AbstractContextManager[object]],
    here: Path,
    sepme: Run,
) -> None:
    before = contents(here)
    with hold(here / "clean.safetensors"):
        told = sepme(*line.split(), "--json")
    assert told.status == 5
    error = told.json["error"]
    assert error["kind"] == "system" and "busy" in error["message"]
    assert contents(here) == before


SUCCEEDING = [
    (0, "verify monet.sepme"),
    (0, "verify clean.safetensors monet.sepme --base model.safetensors"),
    (1, "verify model.safetensors monet.sepme"),
    (1, "verify monet.sepme --recipe policy.yaml"),
    (1, "verify monet.sepme --model cousin.safetensors"),
    (1, "verify monet.sepme --model sd2.safetensors"),
    (1, "verify clean.safetensors klimt.sepme --base model.safetensors"),
    (1, "verify clean.safetensors --base cousin.safetensors"),
    (0, "verify clean.safetensors --statement clean.json"),
    (1, "verify model.safetensors --statement clean.json"),
    (1, "verify clean.safetensors klimt.sepme --statement clean.json"),
    (0, "apply model.safetensors both.sepme -o out --statement out.json"),
    (0, "example -o new.safetensors"),
    (0, "recipe init new.yaml"),
    (0, "recipe init policy.yaml --force"),
    (0, "recipe check policy.yaml"),
    (0, "inspect monet.sepme"),
    (0, "card both.sepme"),
    (0, "card clean.safetensors monet.sepme --base-model someone/model"),
    (0, "inspect model.safetensors"),
    (0, "inspect clean.safetensors -v"),
    (0, "diff model.safetensors model.safetensors"),
    (0, "diff monet.sepme monet.sepme"),
    (0, "diff clean.safetensors monet.sepme"),
    (1, "diff model.safetensors clean.safetensors"),
    (1, "diff model.safetensors cousin.safetensors"),
    (1, "diff model.safetensors sd2.safetensors"),
    (1, "diff model.safetensors monet.sepme"),
    (1, "diff monet.sepme monet2.sepme"),
    (1, "diff both.sepme klimt.sepme -v"),
    (0, "apply model.safetensors both.sepme --check"),
    (0, "apply model.safetensors both.sepme -o out"),
    (0, "apply model.safetensors both.sepme -o out --only klimt --scale 0.5 --dtype fp32"),
    (0, "apply model.safetensors both.sepme -o clean.safetensors --force"),
    (0, "apply model.safetensors both.sepme --in-place"),
    (0, "apply clean.safetensors klimt.sepme --base model.safetensors -o out"),
    (0, "apply clean.safetensors klimt.sepme -o out"),
    (0, "apply cousin.safetensors monet.sepme -o out"),
    (0, "revert clean.safetensors --base model.safetensors -o out"),
    (0, "revert clean.safetensors monet.sepme --in-place"),
    (0, "export monet.sepme --to kohya"),
    (0, "import lora.safetensors --base model.safetensors -c Dali"),
    (0, "import lora.safetensors --base model.safetensors -c monet --force"),
    (0, "import --base model.safetensors --edited clean.safetensors -o out --as style"),
    (0, "export monet.sepme --to peft -o clean.safetensors --force --scale 0.5"),
    (0, "export both.sepme --to kohya --base cousin.safetensors --scale Klimt=2 -o out"),
]


@pytest.mark.parametrize(("status", "line"), SUCCEEDING)
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.usefixtures("here")
def test_an_answer(status: int, line: str, as_json: bool, sepme: Run) -> None:
    done = sepme(*line.split(), *(["--json"] if as_json else []))
    assert done.status == status
    if as_json:
        assert "error" not in done.json
    else:
        assert done.out.strip()
        assert b"\x1b" not in done.out
        assert "\x1b" not in done.err


def test_an_example_that_is_not_installed(here: Path, sepme: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr("sepme_cli.operations.example.PACKAGE", "not_installed_here")
    before = contents(here)
    error = (told := sepme("example", "-o", "new", "--json")).json["error"]
    assert (told.status, error["kind"], error["found"]) == (5, "system", "not installed")
    assert "pip install 'sepme[example]'" in error["message"]
    assert contents(here) == before


#: The statuses that a command never ends with, and why.
NEVER = {
    ("inspect", 1): "it is asked for no answer",
    ("inspect", 4): "it looks at one file",
    ("verify", 4): "a patch and a checkpoint that do not belong together are a check: 1",
    ("sign", 1): "it is asked for no answer",
    ("sign", 4): "it looks at one file at a time",
    ("card", 4): "it puts side by side what files say of themselves",
    ("example", 1): "it is asked for no answer",
    ("example", 3): "it reads no file but its own",
    ("example", 4): "it knows no patch",
    ("recipe init", 1): "it is asked for no answer",
    ("recipe init", 3): "it reads no file",
    ("recipe init", 4): "it knows no patch and no checkpoint",
    ("recipe check", 1): "a recipe is well formed or it is not: 3",
    ("recipe check", 4): "it knows no patch and no checkpoint",
}
#: Statuses that no row has.
OUTSIDE = {ExitStatus.DONE, ExitStatus.INTERRUPTED, ExitStatus.TERMINATED}
#: Kinds of errors that no command line brings about: see test_a_bug and test_streams.test_ctrl_c.
ANYWHERE = {"internal", "interrupted"}


def commands() -> list[str]:
    """Every command of the app, with the name of its group before it."""
    return [
        f"{name} {inner}".strip()
        for name, command in typer.main.get_command(sepme_cli.app.program()).commands.items()
        for inner in getattr(command, "commands", {"": command})
    ]


def kinds(error: type[SepmeError] = SepmeError) -> Iterator[type[SepmeError]]:
    for kind in error.__subclasses__():
        yield kind
        yield from kinds(kind)


@pytest.mark.parametrize("command", commands())
def test_every_status_of_every_command_has_a_row(command: str) -> None:
    rows = {case.status for case in FAILING if case.command == command}
    rows |= {status for status, line in SUCCEEDING if status and command_of(line) == command}
    never = {status for name, status in NEVER if name == command}
    assert rows | never == set(ExitStatus) - OUTSIDE
    assert not rows & never


def test_every_kind_of_error_has_a_row() -> None:
    told = {(case.kind, case.status) for case in FAILING}
    known = {(error.kind, error.status) for error in kinds() if error.kind not in ANYWHERE}
    assert told == known
    assert {error.kind for error in kinds()} > ANYWHERE
    assert all(error.status != ExitStatus.DONE for error in kinds())


RUNS = {
    "erase": "erase model.safetensors --concept Monet -o out",
    "apply": "apply model.safetensors monet.sepme -o out",
    "revert": "revert clean.safetensors --base model.safetensors -o out",
    "diff": "diff model.safetensors clean.safetensors",
    "inspect": "inspect monet.sepme",
    "verify": "verify monet.sepme",
    "sign": "sign monet.sepme --key key",
    "sample": "sample model.safetensors --prompt x -o out",
    "evaluate": f"evaluate model.safetensors monet.sepme {JUDGED}",
    "attack": f"attack model.safetensors monet.sepme {JUDGED}",
    "card": "card monet.sepme",
    "export": "export monet.sepme --to kohya -o out",
    "import": "import lora.safetensors --base model.safetensors -o out",
    "example": "example -o new.safetensors",
    "recipe init": "recipe init new.yaml",
    "recipe check": "recipe check policy.yaml",
}


@pytest.mark.parametrize("command", commands())
@pytest.mark.usefixtures("here")
def test_a_bug(command: str, sepme: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_: object) -> None:
        raise ZeroDivisionError("one too few")

    monkeypatch.setattr(Output, "__enter__", bug)
    line = RUNS[command].split()
    said = sepme(*line)
    assert (said.status, said.out) == (ExitStatus.SYSTEM, b"")
    assert said.err.count("\n") == 1
    for words in (
        "please report it",
        r"ZeroDivisionError\('one too few'\)",
        rf"\b{line[0]}_?\.py:",
    ):
        assert re.search(words, said.err)
    assert "Traceback" in sepme(*line, "-v").err
    error = sepme(*line, "--json").json["error"]
    assert error["kind"] == "internal" and "please report it" in error["message"]


@pytest.mark.parametrize("command", commands())
@pytest.mark.usefixtures("here")
def test_an_interruption(command: str, sepme: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Output, "__enter__", interrupted)
    line = RUNS[command].split()
    assert sepme(*line).status == ExitStatus.INTERRUPTED
    assert sepme(*line, "--json").json["error"]["kind"] == "interrupted"
