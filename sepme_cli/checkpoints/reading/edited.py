"""What another method made of a checkpoint: all of it again, or only the weights it changed."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from patch_spec import limits
from patch_spec.streams import stream_of
from sepme_cli.checkpoints.hub.cache import local
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.opening import open_weights
from sepme_cli.checkpoints.reading.targets import Target, base_of, check_weight
from sepme_cli.checkpoints.reading.tensors import Stored, is_companion, stored_in
from sepme_cli.checkpoints.reading.text_encoders import check_numbers
from sepme_cli.checkpoints.structure.layers import Part, authors_layers, stacked
from sepme_cli.checkpoints.structure.layout import bare_name, span_of, target_in_part
from sepme_cli.checkpoints.structure.transformer_names import Module
from sepme_cli.errors import MismatchError, UnsupportedError
from sepme_cli.places import Place
from sepme_cli.progress import SILENT, Progress


@dataclass(frozen=True)
class EditedWeights:
    """targets: the base's, by name, as they are after the edit; the base's own where a file of
    weights alone does not have them. whole: the checkpoint, None for such a file. others: what else
    such a file holds, by its names there."""

    path: Path
    base: Checkpoint = field(repr=False)
    targets: Mapping[str, Target] = field(repr=False)
    whole: Checkpoint | None
    others: Mapping[str, Stored] = field(repr=False, default_factory=dict)

    @property
    def digest(self) -> str:
        """What a patch made from the whole would call its base, text encoders aside."""
        targets = [self.targets[target.name] for target in self.base.targets]
        return base_of(self.base.family, targets, Target.read, self.path, {}).digest

    def layer(self, name: str) -> Target | None:
        """A layer of the base's by its name, as it is after the edit; the base's own where a file
        of weights alone does not have it, None where the edited checkpoint does not."""
        if self.whole is not None:
            return self.whole.layer(name)
        own, found = self.base.layer(name), self._layers.get(name)
        if found is None:
            return own
        check_weight(found, found.shape, self.path, limits.LAYER_SIDE)
        rows, columns = found.shape
        return Target(name, (rows, columns), (found,))

    @cached_property
    def _layers(self) -> Mapping[str, Stored]:
        """Those of the others that are layers of the denoiser, in whatever naming."""
        places = self.base.layers.places("denoiser")
        authors = authors_layers(places, self.base.family, span_of(self.base.by_name))
        found: dict[str, Stored] = {}
        for name, stored in self.others.items():
            module = bare_name(name).removesuffix(".weight")
            if f"{module}.weight" in places:
                kernel = len(stored.entry.shape) == 4
                found[f"{module}.weight"] = replace(stored, part=Part(kernel=kernel))
            elif module in authors and name.endswith(".weight"):
                found |= self._within(stored, authors[module])
        return found

    def _within(self, stored: Stored, module: Module) -> Iterator[tuple[str, Stored]]:
        """The layers in a tensor that the model's authors name."""
        names = [f"{ours}.weight" for ours in module.ours]
        layers = [layer for name in names if (layer := self.base.layer(name)) is not None]
        counts = [layer.shape[0] for layer in layers]
        if len(layers) == len(names) and stored.entry.shape[:1] == (sum(counts),):
            for name, part in zip(names, stacked(stored.entry.shape, counts), strict=True):
                yield name, replace(stored, part=replace(part, exchanged=module.exchanged))


@contextmanager
def open_edited(
    place: Place, base: Checkpoint, progress: Progress = SILENT
) -> Iterator[EditedWeights]:
    """Open what another method made of `base`: a checkpoint, or a file with some of its weights.

    Such files are what UCE and ESD save: keys and values of the cross-attention, or all of it, in
    the names of diffusers or of a single file; or layers of a transformer.
    Raises MismatchError for weights of another model, and what `open_checkpoint` raises.
    """
    with ExitStack() as stack:
        yield _opened(place, base, stack, progress)


def _opened(place: Place, base: Checkpoint, stack: ExitStack, progress: Progress) -> EditedWeights:
    try:
        whole = stack.enter_context(open_checkpoint(place, progress))
    except UnsupportedError:
        alone = _weights_alone(local(place, progress), base, stack)
        if alone is None:
            raise
        return alone
    _check_alike(base, whole)
    return EditedWeights(whole.path, base, whole.by_name, whole)


def _check_alike(before: Checkpoint, after: Checkpoint) -> None:
    shapes = [
        {target.name: target.shape for target in checkpoint.targets}
        for checkpoint in (before, after)
    ]
    if before.family != after.family or shapes[0] != shapes[1]:
        raise MismatchError(
            f"{after.path} is another kind of model than {before.path}",
            file=after.path,
            expected=f"{before.family.title}, {len(shapes[0])} weights, {before.width} wide",
            found=f"{after.family.title}, {len(shapes[1])} weights, {after.width} wide",
        )


def _weights_alone(path: Path, base: Checkpoint, stack: ExitStack) -> EditedWeights | None:
    """A file that holds some of the base's denoiser and not all; None where it holds none."""
    if path.is_dir():
        return None
    file = open_weights(path)
    stack.callback(file.close)
    span = span_of(base.by_name)
    entries = {
        naming: {target: own for target, own in those.items() if stream_of(target) == "tokens"}
        for naming, those in base.family.entries.items()
    }
    found: dict[str, Target] = {}
    others: dict[str, Stored] = {}
    for name, stored in stored_in(file).items():
        target = target_in_part(name, span, entries)
        if target is None:
            if not is_companion(name):
                others[name] = stored
        elif target in found:
            raise MismatchError(
                f"{path} has two tensors for {target}",
                file=path,
                expected="one",
                found=f"{found[target].copies[0].name} and {name}",
            )
        else:
            found[target] = _target(target, stored, base, path)
    if not found and not any(_is_of(base, name) for name in others):
        return None
    return EditedWeights(path, base, {**base.by_name, **found}, None, others)


def _is_of(base: Checkpoint, name: str) -> bool:
    """Whether a tensor has a name that the base's denoiser has, in its naming or another."""
    bare, denoiser = bare_name(name), base.network("denoiser")
    if denoiser is not None and bare in denoiser.tensors:
        return True
    return any(sign.match(bare) for sign in base.family.signs.values())


def _target(name: str, stored: Stored, base: Checkpoint, path: Path) -> Target:
    check_numbers(stored)
    own = base.by_name.get(name)
    if own is None or own.shape != stored.shape:
        raise MismatchError(
            f"{path} holds weights of another model than {base.path}",
            file=path,
            expected=f"{base.title}, {base.width} wide"
            if own is None
            else f"{name} of shape {list(own.shape)}",
            found=f"{stored.name} of shape {list(stored.shape)}",
        )
    return Target(name, own.shape, (stored,))
