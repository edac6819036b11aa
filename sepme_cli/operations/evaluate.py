"""Judge what patches do to a checkpoint: what is gone, what stays, what comes back."""

import json
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from patch_spec.increment import Increment
from patch_spec.text import slugify
from sepme_cli import __version__
from sepme_cli.checkpoints.encoders import lend_text_encoders
from sepme_cli.checkpoints.files import only_writer
from sepme_cli.checkpoints.patches import PatchFile, PatchSource, read_patch_file, select
from sepme_cli.checkpoints.reader import Checkpoint, open_checkpoint
from sepme_cli.diffusion.devices import choose_device, choose_dtype
from sepme_cli.diffusion.models import Prediction, StableDiffusion
from sepme_cli.erasure.concept import parse_word
from sepme_cli.erasure.prompts import AsKind, kind_told
from sepme_cli.evaluation.distances import Measures, Reference
from sepme_cli.evaluation.figures import ConceptFigures, Figure, Looked, concept_figures, summary
from sepme_cli.evaluation.gallery import Gallery
from sepme_cli.evaluation.judges import load_judge
from sepme_cli.evaluation.page import page
from sepme_cli.evaluation.protocol import Drawing, Subject
from sepme_cli.evaluation.report import PAGE, Report, check_folder, make_folder, write_report
from sepme_cli.evaluation.studio import Studio, restores_weights
from sepme_cli.evaluation.subjects import Word, choose_subjects
from sepme_cli.operations.matching import check_fits, check_unpatched, match_base
from sepme_cli.progress import SILENT, Progress
from sepme_cli.recipe import Recipe


@dataclass(frozen=True)
class EvaluateResult:
    """report: the folder. page: the report to open. concepts: by name. ua, ira, cra,
    harmonic_mean and the figures: see `evaluation.figures`. all_erased: every concept of the
    patches is. restored_identical: composed without the increments, the weights are the
    original's bytes, and so are the pictures. reference: against reference pictures. command:
    that makes the report again. drawn: how many pictures this run drew.
    """

    report: str
    page: str
    model: str
    patches: tuple[str, ...]
    concepts: Mapping[str, ConceptFigures]
    erased: Figure
    retained_same_domain: Figure
    retained_other_domain: Figure
    drawn_with_erased: Figure
    ua: float | None
    ira: float | None
    cra: float | None
    harmonic_mean: float | None
    all_erased: bool
    restored_identical: bool
    reference: Reference | None
    command: str
    drawn: int
    seconds: float
    warnings: tuple[str, ...]


def evaluate(
    model: Path,
    patches: Sequence[PatchSource],
    *,
    judge: str,
    report: Path,
    only: Sequence[str] = (),
    retain: Sequence[str] = (),
    recipe: Recipe | None = None,
    kind: AsKind = "any",
    drawing: Drawing = Drawing(),
    reference: Path | None = None,
    features: str | None = None,
    lpips: bool = False,
    text_encoders: Sequence[Path] = (),
    tokenizer: Path | None = None,
    prediction: Prediction | None = None,
    device: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> EvaluateResult:
    """Draw with the original weights and with the patched ones, judge, and write a report.

    Nothing but the folder `report` is written; pictures that lie there from a run before, with
    everything that decides them the same, are not drawn again. judge: see `load_judge`.
    only: of the patches, these concepts. retain: words that must stay, "style:noto"; some of what
    `recipe` protects or the judge knows if left out. kind: what the erased concepts are, where
    neither `recipe` nor the patch nor the judge tells. reference: a folder of pictures to tell
    FID and KID from, on what the vision model `features` sees. lpips: measure that too.
    Raises UsageError (no judge, a word both erased and retained), RefusedError (a model that is
    patched already), and what opening the checkpoint and the patches and writing raises.
    """
    started = time.monotonic()
    check_folder(report, force=force)
    where = choose_device(device, progress)
    measures = Measures.of(reference, features, where, lpips=lpips)
    files = [read_patch_file(path) for path in patches]
    chosen = select(files, only)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(model, progress))
        lend_text_encoders(checkpoint, text_encoders, stack)
        warnings = _check(checkpoint, files, chosen)
        erased, kept, offered = _words(chosen, kind, retain, recipe)
        jury = load_judge(judge, [*erased, *(kept or offered)], where)
        subjects, doubts = choose_subjects(erased, kept, offered, jury)
        progress.stage("reading the checkpoint")
        network = StableDiffusion.of(
            checkpoint,
            where,
            choose_dtype(dtype),
            prediction=prediction,
            tokenizer=tokenizer,
            progress=progress,
        )
        network.load()
        facts = _facts(network, judge, files, drawing)
        same_weights = restores_weights(checkpoint)
        stack.enter_context(only_writer(report))
        gallery = Gallery(make_folder(report), network, drawing, _key(network, facts))
        studio = Studio.plan(gallery, chosen, subjects)
        drawn = studio.draw(progress)
        looked = studio.look(jury, progress)
        concepts = {
            name: concept_figures(one, jury, network.encode_pictures, measures.perceptual)
            for name, one in zip(_names(subjects), looked, strict=True)
        }
        made = Report(
            command=_command(model, files, only, judge, subjects, report, drawing),
            facts=facts,
            summary=summary(looked, jury),
            concepts=concepts,
            looked=looked,
            restored_identical=same_weights and studio.restores_pictures(),
            reference=measures.compare(*_retained(looked)),
            warnings=(*warnings, *doubts, *_weak(concepts)),
        )
        result = _result(report, model, files, made, drawn, time.monotonic() - started)
        write_report(report, made, page(made), asdict(result))
    return result


def _check(
    checkpoint: Checkpoint, files: Sequence[PatchFile], chosen: Sequence[Increment]
) -> list[str]:
    """Warnings about patches that fit; raises what `evaluate` says where they do not."""
    check_unpatched(checkpoint, "evaluate its base with the patches")
    warnings = []
    for file in files:
        parts = [part for part in file.patch.increments if part in chosen]
        warnings += check_fits(checkpoint, file, parts)
    return warnings + match_base(checkpoint, checkpoint.base(), files)[1]


def _words(
    chosen: Sequence[Increment], kind: AsKind, retain: Sequence[str], recipe: Recipe | None
) -> tuple[list[Word], list[Word], list[Word]]:
    """The erased concepts, what is to be retained, and what may be: with what each is said to be.

    Of an erased concept the command line says it, or the recipe, or the patch's own prompts.
    """
    said: dict[str, AsKind] = {slugify(i.name): i.kind for i in recipe.concepts} if recipe else {}
    erased: dict[str, Word] = {}
    for part in chosen:
        slug = slugify(part.concept)
        kinds = (kind, said.get(slug, "any"), kind_told(part.concept, part.prompts))
        erased[slug] = part.concept, next((each for each in kinds if each != "any"), "any")
    protect = recipe.protect if recipe else ()
    return (
        list(erased.values()),
        [parse_word(word, "any") for word in retain],
        [parse_word(word, "any") for word in protect],
    )


def _names(subjects: Sequence[Subject]) -> list[str]:
    """What each is called in the result: its name, with its kind where two share that."""
    count = Counter(subject.name for subject in subjects)
    return [s.name if count[s.name] == 1 else f"{s.kind}:{s.name}" for s in subjects]


def _retained(looked: Sequence[Looked]) -> tuple[Tensor, Tensor]:
    """The retained concepts' pictures, before and after."""
    kept = [one for one in looked if one.subject.role == "retained"]
    before, after = (
        [getattr(one, when).pictures for one in kept] or [torch.zeros(0, 3, 1, 1)]
        for when in ("before", "after")
    )
    return torch.cat(before), torch.cat(after)


def _weak(concepts: Mapping[str, ConceptFigures]) -> list[str]:
    """Warnings about what is not much to go by."""
    return [
        f"the judge recognises {name} in only {c.before:.0%} of {c.n} pictures by the original: "
        "whether it is erased is hard to tell"
        for name, c in concepts.items()
        if c.role == "erased" and c.before is not None and c.before < 0.5
    ]


def _facts(
    network: StableDiffusion, judge: str, files: Sequence[PatchFile], drawing: Drawing
) -> tuple[tuple[str, str], ...]:
    """What the figures hold for."""
    checkpoint = network.checkpoint
    last = drawing.seed + drawing.pictures - 1
    return (
        ("model", f"{checkpoint.path.name}, {checkpoint.title}"),
        ("sha-256 of its weights", _digest(checkpoint)),
        *((f"patch {Path(file.name).name}", f"sha-256 {file.digest}") for file in files),
        ("judge", judge),
        ("pictures", f"{drawing.pictures} of each concept, seeds {drawing.seed} to {last}"),
        (
            "sampler",
            f"DDIM, {drawing.steps} steps, guidance {drawing.guidance:g}, "
            f"{drawing.size or network.picture_size} pixels, predicting {network.prediction}",
        ),
        ("computed on", f"{network.device.type}, {network.dtype}".replace("torch.", "")),
        ("with", f"sepme {__version__}, torch {torch.__version__}"),
    )


def _digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of every network's tensors: of names, dtypes, shapes and bytes."""
    digest = sha256()
    for name in ("unet", "vae", *(stream.name for stream in checkpoint.family.streams)):
        network = checkpoint.network(name)
        for tensor, stored in network.tensors.items() if network else ():
            digest.update(json.dumps([name, tensor, stored.dtype, stored.shape]).encode())
            data = stored.file.read_range(stored.entry.begin, stored.entry.end, stored.name)
            digest.update(data)
    return digest.hexdigest()


def _key(network: StableDiffusion, facts: Sequence[tuple[str, str]]) -> str:
    """All that decides a picture beside the drawing, the increments, the prompt and the seed."""
    decisive = dict(facts)
    said = [decisive[name] for name in ("sha-256 of its weights", "computed on", "with")]
    schedule = sha256(network.schedule.alphas_cumprod.numpy().tobytes()).hexdigest()
    words = network.encoders[0].tokens(["a picture by Monet, 1899"]).tolist()
    return json.dumps([said, network.prediction, schedule, words])


def _command(
    model: Path,
    files: Sequence[PatchFile],
    only: Sequence[str],
    judge: str,
    subjects: Sequence[Subject],
    report: Path,
    drawing: Drawing,
) -> str:
    """The command that makes the same report, with what was chosen by default said."""
    words = ["sepme", "evaluate", str(model), *(file.name for file in files), "--judge", judge]
    words += [word for concept in only for word in ("--only", concept)]
    for subject in subjects:
        if subject.role == "retained":
            words += ["--retain", f"{subject.kind}:{subject.name}"]
    for option, value in asdict(drawing).items():
        if value is not None:
            words += [f"--{option}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join([*words, "--report", str(report)])


def _result(
    report: Path, model: Path, files: Sequence[PatchFile], made: Report, drawn: int, seconds: float
) -> EvaluateResult:
    told = {field.name: getattr(made.summary, field.name) for field in fields(made.summary)}
    return EvaluateResult(
        report=str(report),
        page=str(report / PAGE),
        model=str(model),
        patches=tuple(file.name for file in files),
        concepts=made.concepts,
        **told,
        all_erased=all(c.erased is True for c in made.concepts.values() if c.role == "erased"),
        restored_identical=made.restored_identical,
        reference=made.reference,
        command=made.command,
        drawn=drawn,
        seconds=seconds,
        warnings=tuple(made.warnings),
    )
