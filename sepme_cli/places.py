"""Where a model or a patch is: a path on this machine, or a place on the hub."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sepme_cli.errors import UsageError

SCHEME = "hf://"
_ID = re.compile(r"(?P<repo>(?P<owner>[A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*)(@(?P<revision>\S+))?")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_ON_HUB = re.compile(
    r"https?://(www\.)?(huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(/(resolve|blob|raw|tree)/(?P<revision>[^/?#]+)(/(?P<path>[^?#]+))?)?/?([?#].*)?$"
)
_FILE = re.compile(r".*\.(safetensors|gguf|sepme|ckpt|pt|pth|bin|ya?ml|json|png)", re.IGNORECASE)
"""What a file is called, and a repository hardly ever."""


@dataclass(frozen=True)
class HubPlace:
    """A model's repository on the hub, or a file in one.

    repo: "owner/name". revision: a branch, a tag or a commit; None for the main branch. path: of
    the file in the repository, "" for the model that the repository is.
    """

    repo: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{revision}{'/' if self.path else ''}{self.path}"

    @property
    def stem(self) -> str:
        """What to call it: the file's name without its ending, or the repository's."""
        return PurePosixPath(self.path).stem if self.path else self.repo.partition("/")[2]

    @property
    def file(self) -> str:
        """The file that is named; UsageError where that is a repository."""
        if not self.path:
            raise UsageError(
                f"{self} is a repository: name the file in it",
                expected=f"{self}/NAME.sepme",
                found=self,
            )
        return self.path


Place = Path | HubPlace
"""Where to read from. The hub's are files of its cache once `hub.local` has fetched them."""


def parse_place(text: str) -> Place:
    """A place as the command line names it: a path, a hub id ("owner/name"), or "hf://…".

    A path wins over an id of the same form; so does one in a folder that is here, or one that is
    named like a file. Raises UsageError for an "hf://…" that makes no sense.
    """
    found = _ID.fullmatch(text)
    if found is None or _FILE.fullmatch(text) or any(map(_exists, (text, found["owner"]))):
        return parse_output(text)
    return HubPlace(found["repo"], found["revision"])


def parse_output(text: str) -> Place:
    """A path, unless it begins with "hf://": of what is written, a slip must not go elsewhere.

    Raises UsageError for an "hf://…" that makes no sense, and for other addresses.
    """
    if not text.startswith(SCHEME):
        if _ADDRESS.match(text):
            raise _address(text)
        return Path(text)
    # Takes a while, and is needed for nothing else.
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        uri = parse_hf_uri(text)
    except HfUriError as error:
        raise _no_place(text, str(error)) from error
    if uri.type != "model":
        raise _no_place(text, f"a {uri.type}")
    return HubPlace(uri.id, uri.revision, uri.path_in_repo)


def _exists(path: str) -> bool:
    return Path(path).exists()


def _address(text: str) -> UsageError:
    """What to say of an address: how sepme would have a page or a file of the hub, if it is one."""
    if found := _ON_HUB.match(text):
        revision = "" if found["revision"] in (None, "main") else f"@{found['revision']}"
        file = "" if not found["path"] else f"/{found['path']}"
        place = f"{SCHEME}{found['repo']}{revision}{file}"
        advice, expected = f"name it as {place}", place
    elif text.startswith("file://"):
        advice = expected = "name its path, without file://"
    else:
        advice = "download the file, and name that"
        expected = f"a path, or {SCHEME}OWNER/NAME[/FILE]"
    return UsageError(
        f"{text} is an address, which sepme does not read or write: {advice}",
        expected=expected,
        found=text,
    )


def _no_place(text: str, found: str) -> UsageError:
    return UsageError(
        f"{text} names no model's repository, and no file in one",
        expected="hf://OWNER/NAME[@REVISION][/FILE]",
        found=found,
    )
