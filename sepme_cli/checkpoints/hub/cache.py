"""The hub, through its own client: models and patches fetched from it, patches published on it.

What is fetched lies in the hub's cache, which other programs share, and is never written to. The
client's own environment variables hold: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, and
HF_HUB_ETAG_TIMEOUT, the seconds that any answer may take.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sepme_cli.checkpoints.hub.client import MIB, asking, bars
from sepme_cli.checkpoints.structure.folders import json_object, one_copy
from sepme_cli.errors import SystemFailure, UnsupportedError
from sepme_cli.places import HubPlace, Place
from sepme_cli.progress import SILENT, Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_PARTS = (
    "unet", "transformer", "vae", "scheduler",
    "text_encoder", "text_encoder_2", "text_encoder_3",
    "tokenizer", "tokenizer_2", "tokenizer_3",
)  # fmt: skip
"""The folders that erasing and sampling read."""
_INDEX = "model_index.json"


def local(place: Place, progress: Progress = SILENT, *, whole: bool = False) -> Path:
    """Where the files of a place are: a path itself; for the hub, its cache, once they are fetched.

    Of a model's repository only one copy of each network is fetched: safetensors rather than
    pickles, the plain files rather than a variant's, and of variants fp16. What is in the cache is
    not fetched again, and is made do with where the hub cannot be reached. whole: also what
    nothing here reads, such as the safety checker, for a copy that is to be a model again.
    Raises SystemFailure (no such thing there, gated, not reached, no space), UnsupportedError (no
    model of ours).
    """
    if isinstance(place, Path):
        return place
    with asking(place) as api:
        commit = api.resolve_revision(place.repo, revision=place.revision).resolved
        progress.say(f"{place}: at commit {commit}")
        if place.path:
            return _fetched(place, commit, [place.path], progress) / place.path
        folder = _listed(place, commit)
        names = _names(place, commit, folder)
        if not any(name.startswith("unet/") for name in names):
            name = _only_file(place, names)
            return _fetched(place, commit, [name], progress) / name
        parts = _components(folder / _INDEX) if whole else frozenset(_PARTS)
        return _fetched(place, commit, _wanted(names, parts), progress)


def fetch_beside(place: Place, path: Path, name: str, progress: Progress = SILENT) -> None:
    """Have a file of this name, where there is one, beside a file that a program expects it beside.

    path: where `local` found the file. Raises SystemFailure as `local` does.
    """
    if isinstance(place, Path) or path.is_dir():
        return
    commit, file = _in_cache(path)
    beside = PurePosixPath(file).with_name(name).as_posix()
    with asking(place):
        if beside in _names(place, commit, _listed(place, commit)):
            _fetched(place, commit, [beside], progress)


def fetched_from(place: Place, path: Path) -> str:
    """How to name a place so that it is the same later: the hub's with the commit.

    path: where `local` found its files.
    """
    if isinstance(place, Path):
        return str(place)
    commit, file = _in_cache(path)
    return str(replace(place, revision=commit, path=file))


def _in_cache(path: Path) -> tuple[str, str]:
    """The commit, and the path in the repository, of what `local` found on the hub."""
    found = re.search(r"models--[^/]+/snapshots/([0-9a-f]{40})/?(.*)", path.as_posix())
    assert found is not None  # which is how the hub's cache is laid out
    return found[1], found[2]


def check_publishable(target: HubPlace, *, force: bool) -> None:
    """SystemFailure if a file cannot be published there, as far as can be told before.

    force: an existing file may be replaced. Raises UsageError for a place that is no file.
    """
    _ = target.file
    with asking(target) as api:
        api.auth_check(target.repo, write=True)
        _check_new(api, target, force=force)


def publish(target: HubPlace, data: bytes, message: str, *, force: bool) -> str:
    """Commit a small file to a repository that is there; returns the commit's address.

    Somebody else's commit meanwhile makes this one fail, so that nothing is overwritten unseen.
    Raises SystemFailure.
    """
    from huggingface_hub import CommitOperationAdd

    with asking(target) as api:
        now = api.repo_info(target.repo, revision=target.revision).sha
        _check_new(api, target, force=force)
        done = api.create_commit(
            target.repo,
            [CommitOperationAdd(target.file, data)],
            commit_message=message,
            revision=target.revision,
            parent_commit=now,
        )
    return str(done.commit_url)


def _check_new(api: "HfApi", target: HubPlace, *, force: bool) -> None:
    if not force and api.file_exists(target.repo, target.file, revision=target.revision):
        raise SystemFailure(f"{target} exists already; --force overwrites it", file=target)


def _fetched(place: HubPlace, commit: str, names: Sequence[str], progress: Progress) -> Path:
    """The folder of a commit in the cache, with these files of it."""
    from huggingface_hub import hf_hub_download

    if left := _missing(place, commit, names):
        progress.stage(f"fetching {place} (MiB)", left)
    shown = bars(progress)
    for name in names:
        found = hf_hub_download(place.repo, name, revision=commit, tqdm_class=shown)
    return Path(found).parents[name.count("/")]


def _listed(place: HubPlace, commit: str) -> Path:
    """The folder of a commit in the cache, with the list of its files beside it and its index."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            place.repo, revision=commit, allow_patterns=[_INDEX], tqdm_class=bars(SILENT)
        )
    )


def _missing(place: HubPlace, commit: str, names: Sequence[str]) -> int | None:
    """How many MiB are to be fetched; None where that is not known, or nothing is."""
    from huggingface_hub import get_cached_repo_tree, try_to_load_from_cache
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = {file.path: file.size for file in get_cached_repo_tree(place.repo, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return None
    absent = [
        tree.get(name, 0)
        for name in names
        if not isinstance(try_to_load_from_cache(place.repo, name, revision=commit), str)
    ]
    return sum(absent) // MIB or None


def _names(place: HubPlace, commit: str, folder: Path) -> list[str]:
    """The files of a commit: as the hub lists them, or failing that those in the cache."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [file.path for file in get_cached_repo_tree(place.repo, revision=commit)]
    except CachedRepoTreeNotFoundError:  # other programs fill the cache without a list
        files = (path for path in folder.rglob("*") if path.is_file())
        return [path.relative_to(folder).as_posix() for path in files]


def _wanted(names: Sequence[str], parts: frozenset[str]) -> list[str]:
    """Of a repository's files, those of some parts' folders, one copy of the weights in each."""
    inside: dict[str, list[str]] = {}
    for name in names:
        part, slash, rest = name.partition("/")
        if slash and part in parts and "/" not in rest:
            inside.setdefault(part, []).append(rest)
    chosen = [f"{part}/{name}" for part, within in inside.items() for name in one_copy(within)]
    return sorted(chosen)


def _components(index: Path) -> frozenset[str]:
    """The folders that a pipeline says it consists of."""
    said = json_object(index) if index.is_file() else {}
    named = {name for name, value in said.items() if isinstance(value, list) and any(value)}
    return frozenset(_PARTS) | named


def _only_file(place: HubPlace, names: Sequence[str]) -> str:
    """The checkpoint of a repository that is no model's folder."""
    files = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if len(files) == 1:
        return files[0]
    raise UnsupportedError(
        f"{place} is not a model's folder; name one of its files, as in {place}/FILE",
        file=place,
        expected="a folder named unet, or one .safetensors file",
        found=", ".join(sorted(files)[:5]) or "neither",
    )
