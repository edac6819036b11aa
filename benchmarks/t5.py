"""What reading prompts with T5-XXL costs: memory, and seconds for captions and for a full prompt.

    python -m benchmarks.full_size t5xxl build/full/t5xxl.safetensors
    python -m benchmarks.t5 build/full/t5xxl.safetensors
    python -m benchmarks.t5 table

The file holds zeros, which take as long to multiply by as other numbers. Its tokenizer knows whole
words; T5's own cuts rare ones up, so captions are counted by CLIP's tokenizer as well, and the time
for all that a first erase reads is by those. One thread, in a process of its own. Results:
docs/t5.json.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from sepme_cli.checkpoints.reading.networks import Network
from sepme_cli.checkpoints.reading.opening import open_weights
from sepme_cli.checkpoints.reading.tensors import stored_in
from sepme_cli.diffusion.devices import Machine
from sepme_cli.diffusion.t5 import T5Encoder
from sepme_cli.diffusion.tokenizer import END, tokenize
from sepme_cli.erasure.background import captions
from sepme_cli.planning.vocabulary import caption_words, everything

RESULTS = Path("docs/t5.json")
READ, POSITIONS = 64, 256


def write_tokenizer(folder: Path, texts: list[str]) -> Path:
    """Of T5's kind, which knows every word of the texts."""
    words = sorted({word for text in texts for word in text.lower().split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -1.0) for w in words)]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    made.save(str(folder / "tokenizer.json"))
    return folder


def _memory() -> dict[str, int]:
    """Of this process, now and at the peak, in MB. mapped: pages of files, which the system takes
    back where it needs the room."""
    told = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak": "VmHWM", "own": "RssAnon", "mapped": "RssFile"}
    return {name: int(told[field].split()[0]) * 1024 // 10**6 for name, field in names.items()}


@contextmanager
def _timed(found: dict[str, Any], what: str) -> Iterator[None]:
    """Seconds of the processor, and those that passed, in which it also did other work."""
    passed, processor = time.perf_counter(), time.process_time()
    yield
    found[what] = {
        "passed": round(time.perf_counter() - passed, 1),
        "processor": round(time.process_time() - processor, 1),
    }


def run(path: Path) -> None:
    torch.set_num_threads(1)
    sample = captions(caption_words())
    prompts = [*sample.protected, *sample.held_out, *everything()]
    with TemporaryDirectory() as folder:
        place = write_tokenizer(Path(folder), prompts)
        file = open_weights(path)
        network = Network("t5xxl", "t5", stored_in(file))
        encoder = T5Encoder(network, Machine(torch.device("cpu")), POSITIONS, place)
        found: dict[str, Any] = {"bytes": path.stat().st_size, "before_mb": _memory()}
        with _timed(found, "load"):
            _ = encoder.model
        encoder.encode(prompts[:1], paddings=2)  # has all of the file in memory, if there is room
        few = prompts[: len(sample.protected) : len(sample.protected) // READ][:READ]
        with _timed(found, "captions"):
            encoder.encode(few, paddings=2)
        tokens = sum(map(len, encoder.ids(few, 2)))
        with _timed(found, "full_prompt"):
            encoder.encode(["a painting of a cat"])
        # CLIP's start stands for T5's second padding.
        all_tokens = sum(int(row.argmax()) + 3 for row in tokenize(prompts, 77, padding=END))
        found["first_erase"] = {
            "prompts": len(prompts),
            "tokens": all_tokens,
            **{clock: round(s / tokens * all_tokens) for clock, s in found["captions"].items()},
        }
        found["captions"] |= {"prompts": READ, "tokens": tokens}
        found["ran_mb"] = _memory()
        file.close()
    found["load_average"] = round(os.getloadavg()[0], 1)
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def table() -> str:
    """The results as Markdown."""
    found = json.loads(RESULTS.read_text())
    some, every, full = found["captions"], found["first_erase"], found["full_prompt"]
    memory = found["ran_mb"]
    return "\n".join(
        [
            f"**T5-XXL in bf16, {found['bytes'] / 1e9:.2f} GB**, one thread",
            "",
            "| | seconds of processor | passed |",
            "|---|---|---|",
            f"| loading | {found['load']['processor']} | {found['load']['passed']} |",
            f"| {some['prompts']} captions, {some['tokens']} tokens | {some['processor']} | "
            f"{some['passed']} |",
            f"| one prompt and its padding, {POSITIONS} tokens | {full['processor']} | "
            f"{full['passed']} |",
            f"| all of a first erase, {every['prompts']:,} prompts, {every['tokens']:,} tokens: "
            f"computed from the captions | {every['processor']:,} | {every['passed']:,} |",
            "",
            f"Peak memory: {memory['peak']:,} MB. At the end {memory['own']:,} MB were the "
            f"process' own ({found['before_mb']['own']:,} before loading), and "
            f"{memory['mapped']:,} in pages of files.",
        ]
    )


def main(*words: str) -> None:
    if words[0] != "table":
        run(Path(words[0]))
    print(table())


if __name__ == "__main__":
    main(*sys.argv[1:])
