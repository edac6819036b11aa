"""Judge what patches do to a checkpoint: what is gone, what stays, what comes back."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from patch_spec.increment import Increment
from patch_spec.text import slugify
from sepme_cli.arguments import (
    FilePath,
    PlaceLike,
    Places,
    Words,
    as_path,
    as_place,
    as_places,
    several,
)
from sepme_cli.checkpoints.disk.files import only_writer
from sepme_cli.checkpoints.hub.cache import fetched_from
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.lent import lend_text_encoders
from sepme_cli.checkpoints.reading.patches import Patches, PatchFile, read_patch_files, select
from sepme_cli.composing.matching import check_fits, check_unpatched, match_base
from sepme_cli.diffusion.devices import DTYPES, computing
from sepme_cli.diffusion.loading import unet_parameters
from sepme_cli.diffusion.models import Prediction, StableDiffusion
from sepme_cli.erasure.prompts import AsKind, kind_told
from sepme_cli.erasure.words import given_word, parse_word
from sepme_cli.evaluation.distances import Measures, Reference
from sepme_cli.evaluation.experiment import Studio, restores_weights
from sepme_cli.evaluation.facts import facts_of, key_of
from sepme_cli.evaluation.figures import ConceptFigures, Figure, Looked, concept_figures, summary
from sepme_cli.evaluation.gallery import BATCH, Gallery
from sepme_cli.evaluation.judges import Judge, load_judge
from sepme_cli.evaluation.page import page
from sepme_cli.evaluation.protocol import Drawing, Subject
from sepme_cli.evaluation.report import PAGE, Report, check_folder, make_folder, write_report
from sepme_cli.evaluation.subjects import Word, choose_subjects
from sepme_cli.places import HubPlace, Place
from sepme_cli.progress import SILENT, Progress
from sepme_cli.recipe import Recipe, as_recipe


@dataclass(frozen=True)
class EvaluateResult:
    """report: the folder. page: the report to open. concepts: by name. ua, ira, cra,
    harmonic_mean and the figures: see `evaluation.figures`. all_erased: every concept of the
    patches is. restored_identical: composed without the increments, the weights are the
    original's bytes, and so are the pictures. reference: against reference pictures. command:
    that made the report, if it was one. drawn: how many pictures this run drew.
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
    model: PlaceLike,
    patches: Patches,
    *,
    judge: str,
    report: FilePath,
    only: Words = (),
    retain: Words = (),
    recipe: Recipe | FilePath | None = None,
    kind: AsKind = "any",
    drawing: Drawing = Drawing(),
    reference: FilePath | None = None,
    features: str | None = None,
    lpips: bool = False,
    text_encoders: Places = (),
    tokenizer: FilePath | None = None,
    prediction: Prediction | None = None,
    device: str | None = None,
    dtype: str = "auto",
    low_memory: bool = False,
    command: str = "",
    force: bool = False,
    progress: Progress = SILENT,
) -> EvaluateResult:
    """Draw with the original weights and with the patched ones, judge, and write a report.

    Nothing but the folder `report` is written; pictures that lie there from a run before, with
    everything that decides them the same, are not drawn again. judge: see `load_judge`.
    only: of the patches, these concepts. retain: words that must stay, "style:noto"; some of what
    `recipe` protects or the judge knows if left out. kind: of the erased concepts, where neither
    `recipe` nor the patch says it. reference: pictures to tell FID and KID from, on what the
    vision model `features` sees. lpips: measure that too. command: what to say made the report.
    Raises UsageError (no judge, a word both erased and retained), RefusedError (a model that is
    patched already), and what opening the checkpoint and the patches and writing raises.
    """
    started = time.monotonic()
    place, report = as_place(model), as_path(report)
    policy = None if recipe is None else as_recipe(recipe)
    check_folder(report, force=force)
    files = read_patch_files(patches)
    chosen = select(files, only)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(place, progress))
        lend_text_encoders(checkpoint, as_places(text_encoders), stack)
        on = computing(
            "drawing",
            device=device,
            dtype=dtype,
            low_memory=low_memory,
            unet=unet_parameters(checkpoint),
            pictures=BATCH,
            progress=progress,
        )
        measures = Measures.of(as_path(reference), features, on.device, lpips=lpips)
        warnings = _check(checkpoint, files, chosen)
        words = _words(chosen, kind, several(retain), policy)
        jury = load_judge(judge, [word for part in words for word in part], on.device)
        subjects, doubts = choose_subjects(*words, jury)
        network = StableDiffusion.of(
            checkpoint,
            on.device,
            DTYPES[on.dtype],
            frugal=on.frugal,
            prediction=prediction,
            tokenizer=as_path(tokenizer),
            progress=progress,
        )
        progress.stage("reading the checkpoint")
        network.load()
        fetched = fetched_from(place, checkpoint.path)
        named = fetched if isinstance(place, HubPlace) else checkpoint.path.name
        facts = facts_of(named, network, judge, files, drawing)
        same_weights = restores_weights(checkpoint)
        stack.enter_context(only_writer(report))
        gallery = Gallery(make_folder(report), network, drawing, key_of(network, facts))
        studio = Studio.plan(gallery, chosen, subjects)
        drawn = studio.draw(progress)
        told = _report(studio.look(jury, progress), jury, network, measures, facts)
        made = replace(
            told,
            command=command,
            restored_identical=same_weights and studio.restores_pictures(),
            warnings=(*warnings, *doubts, *told.warnings),
        )
        result = _result(report, place, files, made, drawn, time.monotonic() - started)
        write_report(report, made, page(made), asdict(result))
    return result


def _report(
    looked: Sequence[Looked],
    judge: Judge,
    network: StableDiffusion,
    measures: Measures,
    facts: Sequence[tuple[str, str]],
) -> Report:
    """The figures of what was drawn."""
    names = _names([one.subject for one in looked])
    concepts = {
        name: concept_figures(one, judge, network.encode_pictures, measures.perceptual)
        for name, one in zip(names, looked, strict=True)
    }
    return Report(
        concepts=concepts,
        summary=summary(looked, judge),
        reference=measures.compare(*_retained(looked)),
        looked=looked,
        warnings=_weak(concepts),
        facts=facts,
    )


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

    Of an erased concept the recipe says it, or the patch's own prompts, or else `kind`.
    """
    said: dict[str, AsKind] = {slugify(i.name): i.kind for i in recipe.concepts} if recipe else {}
    erased: dict[str, Word] = {}
    for part in chosen:
        slug = slugify(part.concept)
        kinds = (said.get(slug, "any"), kind_told(part.concept, part.prompts), kind)
        erased[slug] = part.concept, next((each for each in kinds if each != "any"), "any")
    protect = recipe.protect if recipe else ()
    return (
        list(erased.values()),
        [given_word(word, "any", "--retain") for word in retain],
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


def _result(
    report: Path, model: Place, files: Sequence[PatchFile], made: Report, drawn: int, seconds: float
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
