"""Judge what patches do to a checkpoint: what is gone, what stays, what comes back."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from patch_spec.increment import Increment
from sepme_cli.arguments import (
    FilePath,
    Files,
    PlaceLike,
    Words,
    as_path,
    as_paths,
    as_place,
    check_known,
    several,
)
from sepme_cli.checkpoints.disk.files import only_writer
from sepme_cli.checkpoints.hub.cache import fetched_from
from sepme_cli.checkpoints.reading.patches import Patches, PatchFile, read_patch_files, select
from sepme_cli.composing.matching import check_unpatched, fit
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.opening import opened_model
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.erasure.background import captions
from sepme_cli.erasure.prompts import AsKind, kind_told
from sepme_cli.erasure.words import given_word, parse_word, same_name
from sepme_cli.errors import SystemFailure
from sepme_cli.evaluation.distances import Measures, check_references
from sepme_cli.evaluation.experiment import Experiment, restores_weights
from sepme_cli.evaluation.facts import facts_of, key_of
from sepme_cli.evaluation.figures import EvaluatedConcept, concept_figures, summary
from sepme_cli.evaluation.gallery import BATCH, Gallery
from sepme_cli.evaluation.judges import Judge, load_judge
from sepme_cli.evaluation.page import page
from sepme_cli.evaluation.parts import Plan, check_parts, record, record_path
from sepme_cli.evaluation.protocol import SamplingOptions, Subject
from sepme_cli.evaluation.replication import ORDINARY, Replica, replicas, replication
from sepme_cli.evaluation.report import (
    PAGE,
    PICTURES,
    Report,
    check_folder,
    make_folder,
    write_report,
)
from sepme_cli.evaluation.results import (
    ConceptFigures,
    EvaluateResult,
    Replication,
    ShardResult,
)
from sepme_cli.evaluation.subjects import Word, choose_subjects
from sepme_cli.evaluation.training_images import read_training_images
from sepme_cli.places import HubPlace, Place
from sepme_cli.planning.misread import misread_prompts
from sepme_cli.planning.vocabulary import caption_words
from sepme_cli.progress import SILENT, Collector, Progress
from sepme_cli.recipe import Recipe, as_recipe
from sepme_cli.shards import Shard

THRESHOLD = 0.5
"""Of replication, as papers use with features of SSCD (Somepalli et al. 2023)."""


class Scope(TypedDict, total=False):
    """What `evaluate` looks at.

    Attributes:
        only: Use only these concepts of the patches.
        retain: Concepts that should be unchanged; "style:noto" or "object:cat" gives the kind. If
            left out, some that the recipe protects or the judge knows.
        recipe: Recipe that the patches were made by; it gives the kinds of the concepts.
        kind: Kind of the erased concepts, if neither recipe nor patch gives it.
        reference: Folder with reference images for FID and KID.
        features: What computes the features for FID, KID and replication: a vision model (a folder,
            or the hub id of a downloaded model), or "package.module:function", which returns a
            function of images [n, 3, H, W] in [0, 1] that returns features [n, d].
        lpips: Also compute LPIPS.
        training_images: Folder with training images and their captions, to see whether they are
            drawn again: name.png with name.txt, or metadata.jsonl.
        replication_threshold: Cosine similarity of features, from which an image counts as a
            replica of its training image; 0.5 if left out.
    """

    only: Words
    retain: Words
    recipe: Recipe | FilePath | None
    kind: AsKind
    reference: FilePath | None
    features: str | None
    lpips: bool
    training_images: FilePath | None
    replication_threshold: float


def evaluate(
    model: PlaceLike,
    patches: Patches,
    *,
    judge: str,
    report: FilePath,
    sampling: SamplingOptions = SamplingOptions(),
    options: ModelOptions = ModelOptions(),
    images_from: Files = (),
    command: str = "",
    force: bool = False,
    progress: Progress = SILENT,
    **scope: Unpack[Scope],
) -> EvaluateResult:
    """Generate images before and after patches, judge them, and write a report.

    No patched checkpoint is written. Images of an earlier run in the same folder, or of
    `evaluate_shard`, are reused where everything that they depend on is the same. UA, IRA and CRA
    are defined as in UnlearnCanvas (arXiv 2402.11846); intervals are 95% Wilson score intervals.

    Args:
        model: Unpatched checkpoint: a file, a folder, or a place on the hub.
        patches: Patches: files, places on the hub, or binary streams.
        judge: Classifier: a transformers image classifier or CLIP model (a folder, or the hub id of
            a downloaded model), "nudenet", or "package.module:function", which returns a judge.
        report: Folder for the report.
        sampling: How images are generated.
        options: How to open the model, and what to compute on.
        images_from: Other folders of `evaluate_shard`; images are copied from them.
        command: Command line to show in the report.
        force: Replace an existing report.
        progress: Receives progress and warnings.
        **scope: What to look at; see `Scope`.

    Returns:
        All figures of the report.

    Raises:
        UsageError: There is no such judge, or a concept is both erased and retained.
        RefusedError: The model is patched already, no patch has one of the concepts, or a shard is
            of another evaluation.
        MismatchError: A patch is for another kind of model.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: The model or the judge is of a kind that is not supported.
        SystemFailure: A file cannot be read or written.
    """
    started, progress = time.monotonic(), Collector(progress)
    place, report = as_place(model), as_path(report)
    folders = as_paths(images_from)
    for folder in folders:
        if not (folder / PICTURES).is_dir():
            raise SystemFailure(f"{folder}: no folder that evaluate --shard has made", file=folder)
    check_folder(report, force=force)
    with ExitStack() as stack:
        known = stack.enter_context(
            _planned(place, patches, judge, report, sampling, options, scope, progress)
        )
        network, experiment, jury = known.network, known.experiment, known.jury
        measures = Measures.of(
            as_path(scope.get("reference")),
            scope.get("features"),
            network.machine.device,
            lpips=scope.get("lpips", False),
        )
        same_weights = restores_weights(network.checkpoint)
        stack.enter_context(only_writer(report, progress))
        make_folder(report)
        batches = experiment.batches()
        plan = Plan.of(experiment.gallery, batches, known.facts)
        progress.warn_all(check_parts([report, *folders], plan, force=force))
        for folder in folders:
            experiment.gallery.take(folder / PICTURES, batches)
        drawn = experiment.generate(batches, progress)
        evaluated = experiment.judged(jury, progress)
        names = _names([one.subject for one in evaluated])
        concepts = {
            name: concept_figures(one, jury, network.vae.encode, measures.perceptual)
            for name, one in zip(names, evaluated, strict=True)
        }
        progress.warn_all(_weak(concepts))
        shown = replicas(experiment)
        found = _replicated(experiment, shown, measures, scope, progress)
        result = EvaluateResult(
            **vars(summary(evaluated, jury)),
            report=str(report),
            page=str(report / PAGE),
            model=str(place),
            patches=tuple(file.name for file in known.files),
            concepts=concepts,
            all_erased=all(c.erased is True for c in concepts.values() if c.role == "erased"),
            restored_identical=same_weights and experiment.restores_images(),
            reference=measures.compare(*_retained(evaluated)),
            replication=found,
            command=command,
            drawn=drawn,
            seconds=time.monotonic() - started,
            warnings=progress.warnings,
        )
        told = Report(result, evaluated, known.facts, shown)
        write_report(report, told, page(told))
    return result


def evaluate_shard(
    model: PlaceLike,
    patches: Patches,
    *,
    shard: str,
    judge: str,
    report: FilePath,
    sampling: SamplingOptions = SamplingOptions(),
    options: ModelOptions = ModelOptions(),
    force: bool = False,
    progress: Progress = SILENT,
    **scope: Unpack[Scope],
) -> ShardResult:
    """Generate one part of the images of `evaluate`, and judge nothing.

    Any number of processes do this side by side, each its own part, in one folder or in folders of
    their own. The images are bit for bit those that `evaluate` would generate on the same kind of
    device; it makes the report when all parts are done.

    Args:
        model: As for `evaluate`, as is all that follows.
        patches: Patches.
        shard: Which part: "3/16" is the third of sixteen.
        judge: Classifier, which decides what is looked at.
        report: Folder that `evaluate` will make the report in, or is told of.
        sampling: How images are generated.
        options: How to open the model, and what to compute on.
        force: Go on although there is a report already.
        progress: Receives progress and warnings.
        **scope: What to look at; see `Scope`.

    Returns:
        How many images there were.

    Raises:
        UsageError: There is no such part; and as for `evaluate`.
        SystemFailure: The same part is being generated by another process; and as for `evaluate`.
    """
    started, progress = time.monotonic(), Collector(progress)
    part, place, report = Shard.parse(shard), as_place(model), as_path(report)
    check_folder(report, force=force)
    with ExitStack() as stack:
        known = stack.enter_context(
            _planned(place, patches, judge, report, sampling, options, scope, progress)
        )
        make_folder(report)
        path = record_path(report, part)
        stack.enter_context(only_writer(path, progress))
        batches = known.experiment.batches()
        mine = part.of(batches)
        drawn = known.experiment.generate(mine, progress)
        record(path, part, Plan.of(known.experiment.gallery, batches, known.facts))
    return ShardResult(
        shard=str(part),
        report=str(report),
        images=sum(len(batch.kept) for batch in mine),
        drawn=drawn,
        seconds=time.monotonic() - started,
        warnings=progress.warnings,
    )


def _replicated(
    experiment: Experiment,
    shown: Sequence[Replica],
    measures: Measures,
    scope: Scope,
    progress: Progress,
) -> Replication | None:
    """How many of the training images are drawn again; None if there are none, or no features to
    compare them by."""
    if not shown or measures.features is None:
        return None
    progress.stage("comparing with training images")
    threshold = scope.get("replication_threshold", THRESHOLD)
    ordinary = captions(caption_words()).held_out[:ORDINARY]
    found = replication(experiment, shown, measures.features, threshold, ordinary)
    progress.warn_all(_low(found))
    return found


@dataclass(frozen=True)
class _Known:
    """What is known before the first image is generated."""

    network: StableDiffusion
    files: Sequence[PatchFile]
    jury: Judge
    experiment: Experiment
    facts: tuple[tuple[str, str], ...]


@contextmanager
def _planned(
    place: Place,
    patches: Patches,
    judge: str,
    report: Path,
    sampling: SamplingOptions,
    options: ModelOptions,
    scope: Scope,
    progress: Progress,
) -> Iterator[_Known]:
    """The model opened, and what will be looked at; the same in all processes that are told the
    same. Nothing is written."""
    check_known(scope, Scope)
    training = as_path(scope.get("training_images"))
    check_references(as_path(scope.get("reference")), scope.get("features"), training)
    memorised = read_training_images(training) if training else ()
    recipe = scope.get("recipe")
    policy = None if recipe is None else as_recipe(recipe)
    files = read_patch_files(patches)
    chosen = select(files, scope.get("only", ()))
    with opened_model(place, options, images=BATCH, progress=progress) as network:
        checkpoint = network.checkpoint
        check_unpatched(checkpoint, "evaluate its base with the patches")
        progress.warn_all(fit(checkpoint, files, chosen).compared(checkpoint).warnings)
        kind, retain = scope.get("kind", "any"), several(scope.get("retain", ()))
        words = _words(chosen, kind, retain, policy)
        jury = load_judge(judge, [word for part in words for word in part], network.machine.device)
        subjects, doubts = choose_subjects(*words, jury)
        progress.warn_all(doubts)
        progress.stage("reading the checkpoint")
        network.load()
        fetched = fetched_from(place, checkpoint.path)
        named = fetched if isinstance(place, HubPlace) else checkpoint.path.name
        facts = facts_of(named, network, judge, files, sampling)
        gallery = Gallery(report / PICTURES, network, sampling, key_of(network, facts))
        experiment = Experiment.plan(gallery, chosen, subjects, memorised)
        longest = [
            max((one.prompt for one in asked), key=len)
            for asked in (*experiment.subjects.values(), *experiment.training.values())
        ]
        progress.warn_all(misread_prompts(network.text, longest))
        yield _Known(network, files, jury, experiment, facts)


def _words(
    chosen: Sequence[Increment], kind: AsKind, retain: Sequence[str], recipe: Recipe | None
) -> tuple[list[Word], list[Word], list[Word]]:
    """The erased concepts, what is to be retained, and what may be: with what each is said to be.

    Of an erased concept the recipe says it, or the patch's own prompts, or else `kind`.
    """
    said: dict[str, AsKind] = {same_name(i.name): i.kind for i in recipe.concepts} if recipe else {}
    erased: dict[str, Word] = {}
    for part in chosen:
        name = same_name(part.concept)
        kinds = (said.get(name, "any"), kind_told(part.concept, part.prompts), kind)
        erased[name] = part.concept, next((each for each in kinds if each != "any"), "any")
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


def _retained(evaluated: Sequence[EvaluatedConcept]) -> tuple[Tensor, Tensor]:
    """The retained concepts' images, before and after."""
    kept = [one for one in evaluated if one.subject.role == "retained"]
    before, after = (
        [getattr(one, when).images for one in kept] or [torch.zeros(0, 3, 1, 1)]
        for when in ("before", "after")
    )
    return torch.cat(before), torch.cat(after)


def _low(found: Replication) -> list[str]:
    """A warning of a threshold that images pass which have nothing to do with it."""
    if found.unrelated is None or found.unrelated < found.threshold:
        return []
    return [
        f"images reach a similarity of {found.unrelated:.2f} to training images of other captions, "
        f"and count as replicas from {found.threshold:g} on: set --replication-threshold higher"
    ]


def _weak(concepts: Mapping[str, ConceptFigures]) -> list[str]:
    """Warnings about what is not much to go by."""
    return [
        f"the judge recognises {name} in only {c.before:.0%} of {c.n} images from the "
        "original: whether it is erased is hard to measure"
        for name, c in concepts.items()
        if c.role == "erased" and c.before is not None and c.before < 0.5
    ]
