"""Attack an erasure, and say how often the concept comes back."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

from patch_spec.increment import Increment
from sepme_cli.arguments import (
    FilePath,
    PlaceLike,
    Words,
    as_path,
    as_place,
    check_known,
    several,
)
from sepme_cli.attacks.aiming import Wanted, take_aim
from sepme_cli.attacks.attack import BUDGETS, Aim, Attack, Budget, BudgetName, Victim
from sepme_cli.attacks.campaign import Campaign, Outcome, digest_of, success
from sepme_cli.attacks.page import attack_page, write_attack_report
from sepme_cli.attacks.registry import attacks_named
from sepme_cli.attacks.results import AttackFigures, AttackResult, Success
from sepme_cli.checkpoints.disk.failures import writing
from sepme_cli.checkpoints.disk.files import only_writer
from sepme_cli.checkpoints.hub.cache import fetched_from
from sepme_cli.checkpoints.reading.patches import Patches, PatchFile, read_patch_files, select
from sepme_cli.composing.matching import check_unpatched, fit
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.opening import opened_model
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.diffusion.weights import patched_weights
from sepme_cli.erasure.prompts import AsKind, Kind, kind_told, kinds
from sepme_cli.erasure.words import same_name
from sepme_cli.errors import RefusedError, UsageError
from sepme_cli.evaluation.facts import facts_of, key_of
from sepme_cli.evaluation.gallery import BATCH, Gallery
from sepme_cli.evaluation.judges import Judge, knows, load_judge
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.evaluation.report import PICTURES, check_folder, make_folder
from sepme_cli.evaluation.results import ShardResult
from sepme_cli.places import HubPlace, Place
from sepme_cli.progress import SILENT, Collector, Progress
from sepme_cli.shards import WHOLE, Shard

PAGE = "attack.html"
TRIALS = "trials"


class Ways(TypedDict, total=False):
    """What `attack` tries.

    Attributes:
        concept: The concept to attack; may be left out where the patches erase one.
        kind: Its kind, if the patch does not give it: "style" or "object".
        attacks: Names of attacks or of their groups; all if left out.
        budget: "quick", "standard" or "thorough": how much of each is tried.
        descriptions: Sentences that describe the concept without its name.
        images: Folder with images of the concept. If left out, the original generates them.
        floor: A model that never knew the concept; the same attacks on it say what they reach
            without any memory of it.
    """

    concept: str | None
    kind: AsKind
    attacks: Words
    budget: BudgetName
    descriptions: Words
    images: FilePath | None
    floor: PlaceLike | None


@dataclass(frozen=True)
class Folders:
    """Of a report. Its parts share the trials, of which each has its own; the images that attacks
    are aimed by every part generates for itself, so that no two write one file."""

    report: Path
    part: Shard = WHOLE

    @property
    def pictures(self) -> Path:
        """For the images that attacks are aimed by."""
        folder = self.report / PICTURES
        return folder if self.part == WHOLE else folder / f"{self.part.number}-of-{self.part.count}"

    @property
    def trials(self) -> Path:
        """For what came of each trial."""
        return self.report / TRIALS

    def make(self) -> None:
        """Make all of them."""
        make_folder(self.report)
        with writing(self.report):
            for folder in (self.trials, self.pictures):
                folder.mkdir(exist_ok=True)


@dataclass(frozen=True)
class Run:
    """What all attacks of a run have in common: the models, and how much is tried on each."""

    files: Sequence[PatchFile]
    attacks: Sequence[Attack]
    victims: Sequence[Victim]
    campaign: Campaign
    budget: Budget
    false_positives: float
    facts: Sequence[tuple[str, str]]

    @property
    def aim(self) -> Aim:
        """What is attacked."""
        return self.victims[0].aim


def attack(
    model: PlaceLike,
    patches: Patches,
    *,
    judge: str,
    report: FilePath,
    sampling: SamplingOptions = SamplingOptions(),
    options: ModelOptions = ModelOptions(),
    command: str = "",
    force: bool = False,
    progress: Progress = SILENT,
    **ways: Unpack[Ways],
) -> AttackResult:
    """Try to have a patched model draw an erased concept, and write a report.

    Every attack is also tried on the original (what it reaches where nothing was erased) and, if
    one is given, on a model that never knew the concept (what it reaches without any memory of
    it). No patched checkpoint is written. Trials of an earlier run in the same folder are reused.

    Args:
        model: Unpatched checkpoint: a file, a folder, or a place on the hub.
        patches: Patches: files, places on the hub, or binary streams. All of them are applied.
        judge: Classifier, as `evaluate` takes it.
        report: Folder for the report.
        sampling: How images are generated; its `images` and `restore` are not used.
        options: How to open the model, and what to compute on.
        command: Command line to show in the report.
        force: Replace an existing report.
        progress: Receives progress and warnings.
        **ways: What to try; see `Ways`.

    Returns:
        All figures of the report.

    Raises:
        UsageError: There is no such judge or attack, or the judge does not know the concept.
        RefusedError: The model is patched already, or the patches do not erase the concept.
        MismatchError: A patch is for another kind of model.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: The model or the judge is of a kind that is not supported.
        SystemFailure: A file cannot be read or written.
    """
    started, progress = time.monotonic(), Collector(progress)
    place, report = as_place(model), as_path(report)
    _check_folder(report, force=force)
    with ExitStack() as stack:
        run = stack.enter_context(
            _prepared(place, patches, judge, Folders(report), sampling, options, ways, progress)
        )
        figures: dict[str, AttackFigures] = {}
        outcomes: dict[str, Mapping[str, list[Outcome]]] = {}
        for one in run.attacks:
            progress.stage(one.title)
            outcomes[one.name], figures[one.name] = _tried(one, run)
        result = AttackResult(
            report=str(report),
            page=str(report / PAGE),
            model=str(place),
            patches=tuple(file.name for file in run.files),
            concept=run.aim.concept,
            kind=run.aim.kind,
            budget=_budget(ways),
            attacks=figures,
            strongest=_strongest(figures, teaching=False),
            strongest_teaching=_strongest(figures, teaching=True),
            false_positives=run.false_positives,
            command=command,
            seconds=time.monotonic() - started,
            warnings=progress.warnings,
        )
        shown = {
            who: {
                column: [(one, run.campaign.images(one)) for one in found]
                for column, found in columns.items()
            }
            for who, columns in outcomes.items()
        }
        write_attack_report(report, result, attack_page(result, shown, run.facts))
    return result


def attack_shard(
    model: PlaceLike,
    patches: Patches,
    *,
    shard: str,
    judge: str,
    report: FilePath,
    sampling: SamplingOptions = SamplingOptions(),
    options: ModelOptions = ModelOptions(),
    progress: Progress = SILENT,
    **ways: Unpack[Ways],
) -> ShardResult:
    """Try one part of the attacks of `attack`, and write no report.

    Any number of processes do this side by side in one folder, each its own part; `attack` makes
    the report of it when all parts are done.

    Args:
        model: As for `attack`, as is all that follows.
        patches: Patches.
        shard: Which part: "3/16" is the third of sixteen.
        judge: Classifier.
        report: Folder that `attack` will make the report in.
        sampling: How images are generated.
        options: How to open the model, and what to compute on.
        progress: Receives progress and warnings.
        **ways: What to try; see `Ways`.

    Returns:
        How many images there were.

    Raises:
        UsageError: There is no such part; and as for `attack`.
    """
    started, progress = time.monotonic(), Collector(progress)
    part, place, report = Shard.parse(shard), as_place(model), as_path(report)
    _check_folder(report, force=True)
    folders = Folders(report, part)
    with _prepared(place, patches, judge, folders, sampling, options, ways, progress) as run:
        work = [
            (one, victim, trial)
            for one in run.attacks
            for victim in run.victims
            if _fits(one, victim, run)
            for trial in one.trials(victim, run.budget)
        ]
        mine = part.of(work)
        progress.stage("attacking", len(mine))
        images = drawn = 0
        for one, victim, trial in mine:
            known = run.campaign.kept(one, victim, trial)
            outcome = known or run.campaign.tried(one, victim, trial)
            images += outcome.generated
            drawn += 0 if known else outcome.generated
            progress.advance()
    return ShardResult(
        shard=str(part),
        report=str(report),
        images=images,
        drawn=drawn,
        seconds=time.monotonic() - started,
        warnings=progress.warnings,
    )


@contextmanager
def _prepared(
    place: Place,
    patches: Patches,
    judge: str,
    folders: Folders,
    sampling: SamplingOptions,
    options: ModelOptions,
    ways: Ways,
    progress: Progress,
) -> Iterator[Run]:
    """The model opened and the attacks aimed; the same in all processes that are told the same."""
    check_known(ways, Ways)
    budget, attacks = BUDGETS[_budget(ways)], attacks_named(several(ways.get("attacks", ())))
    files = read_patch_files(patches)
    chosen = select(files, ())
    # What is optimised underflows in half precision.
    exact = replace(options, dtype=options.dtype if options.dtype not in (None, "auto") else "fp32")
    with ExitStack() as stack:
        network = stack.enter_context(
            opened_model(place, exact, "learning", images=BATCH, progress=progress)
        )
        checkpoint = network.checkpoint
        check_unpatched(checkpoint, "attack its base with the patches")
        progress.warn_all(fit(checkpoint, files, chosen).compared(checkpoint).warnings)
        erased = _erased(chosen, ways.get("concept"))
        jury = load_judge(judge, [(erased.concept, "any")], network.machine.device)
        wanted = Wanted(
            erased.concept,
            _kind(erased, ways.get("kind", "any"), jury),
            several(ways.get("descriptions", ())),
            as_path(ways.get("images")),
            tuple(part.concept for part in chosen),
        )
        progress.stage("reading the checkpoint")
        network.load()
        fetched = fetched_from(place, checkpoint.path)
        named = fetched if isinstance(place, HubPlace) else checkpoint.path.name
        facts = facts_of(named, network, judge, files, sampling)
        key = key_of(network, facts)
        folders.make()
        stack.enter_context(only_writer(folders.pictures, progress))
        gallery = Gallery(folders.pictures, network, sampling, key)
        aim, false_positives = take_aim(gallery, jury, wanted, budget, progress)
        weights = patched_weights(checkpoint, [(part, 1.0) for part in chosen])
        digest = "+".join(sorted(part.digest for part in chosen))
        victims = [
            Victim("patched", network, weights, aim, sampling, digest),
            Victim("original", network, {}, aim, sampling, "original"),
        ]
        if (floor := ways.get("floor")) is not None:
            victims.append(_floor(as_place(floor), exact, aim, sampling, stack, progress))
        settings = [key, judge, sampling.steps, victims[0].guidance, sampling.size, sampling.seed]
        about = digest_of([aim.images, aim.others]) + "".join(aim.descriptions)
        campaign = Campaign(folders.trials, jury, budget, f"{settings} {about}")
        run = Run(files, attacks, victims, campaign, budget, false_positives, facts)
        _announce(network, run, gallery, progress)
        yield run


def _budget(ways: Ways) -> BudgetName:
    """The budget's name; UsageError for none that there is."""
    name = ways.get("budget", "standard")
    if name not in BUDGETS:
        raise UsageError(
            f"there is no budget {name!r}", expected=", ".join(BUDGETS), found=str(name)
        )
    return name


def _check_folder(report: Path, *, force: bool) -> None:
    ours = {PICTURES, "sheets", TRIALS, *_OURS}
    check_folder(report, force=force, page=PAGE, ours=ours)


_OURS = (PAGE, "attack.json", "attacks.csv")


def _erased(chosen: Sequence[Increment], concept: str | None) -> Increment:
    """The increment of the concept that is attacked."""
    if concept is None:
        if len(chosen) > 1:
            raise UsageError(
                "the patches erase several concepts: name the one to attack with --concept",
                expected=", ".join(part.concept for part in chosen),
                found="none",
            )
        return chosen[0]
    for part in chosen:
        if same_name(part.concept) == same_name(concept):
            return part
    raise RefusedError(
        f"no patch erases {concept!r}",
        expected=", ".join(part.concept for part in chosen),
        found=concept,
    )


def _kind(erased: Increment, said: AsKind, judge: Judge) -> Kind:
    """What the concept is: as said, as the patch's prompts tell, or as the judge knows it.

    Raises UsageError where the judge cannot tell it.
    """
    told = said if said != "any" else kind_told(erased.concept, erased.prompts)
    known = [kind for kind in kinds(told) if knows(judge, erased.concept, kind)]
    if not known:
        labels = [label for kind in kinds(told) for label in judge.labels(kind)]
        raise UsageError(
            f"the judge does not know {erased.concept!r}, so that no attack can be judged",
            expected=f"a judge of {erased.concept}",
            found=", ".join(labels[:8]) or "a judge of another kind",
        )
    return known[0]


def _floor(
    place: object,
    options: ModelOptions,
    aim: Aim,
    sampling: SamplingOptions,
    stack: ExitStack,
    progress: Progress,
) -> Victim:
    """The model that never knew the concept, attacked by the same aim."""
    network: StableDiffusion = stack.enter_context(
        opened_model(as_place(place), options, "learning", images=BATCH, progress=progress)  # type: ignore[arg-type]
    )
    network.load()
    facts = facts_of(str(place), network, "", (), sampling)
    return Victim("floor", network, {}, aim, sampling, key_of(network, facts))


def _fits(attack: Attack, victim: Victim, run: Run) -> bool:
    """Whether an attack can be tried on a model, and on the patched one."""
    return attack.unfit(run.victims[0]) is None and attack.unfit(victim) is None


def _tried(attack: Attack, run: Run) -> tuple[Mapping[str, list[Outcome]], AttackFigures]:
    """An attack on every victim that it can be tried on."""
    unfit = attack.unfit(run.victims[0])
    found = {
        victim.name: run.campaign.run(attack, victim) if _fits(attack, victim, run) else []
        for victim in run.victims
    }
    figures: Mapping[str, Success | None] = {
        name: success(outcomes) for name, outcomes in found.items()
    }
    tries = attack.cost(run.budget).images / run.budget.cases if attack.best else 1
    return found, AttackFigures(
        title=attack.title,
        group=attack.group,
        best=attack.best,
        teaches=attack.teaches,
        patched=figures["patched"],
        original=figures["original"],
        floor=figures.get("floor"),
        chance=None if unfit else 1 - (1 - run.false_positives) ** tries,
        unfit=unfit,
    )


def _strongest(figures: Mapping[str, AttackFigures], *, teaching: bool) -> str | None:
    """The attack that succeeded most often, of those that can teach or of the others."""
    shares = {
        name: one.patched.share
        for name, one in figures.items()
        if one.patched is not None and one.teaches == teaching and one.patched.share > 0
    }
    return max(shares, key=shares.__getitem__) if shares else None


def _announce(network: StableDiffusion, run: Run, gallery: Gallery, progress: Progress) -> None:
    """Say how long it will take at most."""
    image = gallery.seconds_per_image()
    a_pass = image / (2 * gallery.sampling.steps)
    costs = [one.cost(run.budget) for one in run.attacks if one.unfit(run.victims[0]) is None]
    seconds = len(run.victims) * sum(c.images * image + c.passes * a_pass for c in costs)
    minutes = max(1, round(seconds / 60))
    progress.say(
        f"{len(costs)} attacks on {len(run.victims)} models will take up to about "
        f"{f'{minutes // 60} h ' if minutes >= 60 else ''}{minutes % 60} min; a smaller --budget, "
        "fewer --steps or a faster --device make it shorter. It can be interrupted: the same "
        "command continues it"
    )
