"""The hub's own client: how it is asked, and what its complaints mean for a place."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from typing import TYPE_CHECKING, Any

from sepme_cli.errors import SepmeError, SystemFailure
from sepme_cli.places import HubPlace
from sepme_cli.progress import Progress

if TYPE_CHECKING:
    from httpx2 import Request
    from huggingface_hub import HfApi

MIB = 2**20


@contextmanager
def asking(place: HubPlace) -> Iterator["HfApi"]:
    """The hub's client, which waits for no answer longer than it waits for a file's; what it
    complains of becomes a SepmeError about the place."""
    import httpx2
    from huggingface_hub import HfApi, constants, get_session
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
        XetDownloadError,
    )

    getLogger("huggingface_hub").setLevel(ERROR)  # it warns of every retry
    session = get_session()
    hooks = session.event_hooks
    if _impatient not in hooks["request"]:
        session.event_hooks = {**hooks, "request": [*hooks["request"], _impatient]}
    try:
        yield HfApi(library_name="sepme")
    except SepmeError:
        raise
    except GatedRepoError as error:
        raise SystemFailure(
            f"{place} is gated: ask for access on {constants.ENDPOINT}/{place.repo}, and log in "
            "with `hf auth login` (or set HF_TOKEN)",
            file=place,
            expected="access to the repository",
            found="none",
        ) from error
    except RepositoryNotFoundError as error:
        raise _not_there(place, "no such repository, or a private one") from error
    except RevisionNotFoundError as error:
        raise _not_there(place, f"no revision {place.revision}") from error
    except LocalEntryNotFoundError as error:
        raise _not_reached(place, error.__cause__ or error) from error
    except EntryNotFoundError as error:
        raise _not_there(place, f"no {place.path}") from error
    except HfHubHTTPError as error:
        raise _refused(place, error.response.status_code) from error
    except (
        RevisionResolutionError,
        OfflineModeIsEnabled,
        httpx2.HTTPError,
        XetDownloadError,
    ) as error:
        raise _not_reached(place, error.__cause__ or error) from error
    except HFValidationError as error:
        raise _not_there(place, str(error)) from error


def _impatient(request: "Request") -> None:
    """Have a request end in time that the client would let wait for ever, as it does some."""
    from huggingface_hub import constants

    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        what: constants.HF_HUB_ETAG_TIMEOUT if limits.get(what) is None else limits[what]
        for what in ("connect", "read", "write", "pool")
    }


def _not_there(place: HubPlace, found: str) -> SystemFailure:
    return SystemFailure(
        f"{place}: not found on the hub, and no such file here ({found}); a private "
        "repository needs `hf auth login`",
        file=place,
        expected="a repository, revision and file that exist",
        found=found,
    )


def _not_reached(place: HubPlace, error: BaseException) -> SystemFailure:
    why = str(error).partition("\n")[0] or type(error).__name__
    return SystemFailure(
        f"{place}: the hub cannot be reached, and not all of this is in its cache: {why}",
        file=place,
        expected="a connection, or files that were fetched before",
        found=type(error).__name__,
    )


def _refused(place: HubPlace, status: int) -> SystemFailure:
    why = {
        401: "not logged in, or the token is not valid: run `hf auth login`, or set HF_TOKEN",
        403: "your token does not allow this",
        409: "somebody else has changed the repository meanwhile; nothing was written. Try again",
        412: "somebody else has changed the repository meanwhile; nothing was written. Try again",
        429: "too many requests; try again later",
    }
    reason = why.get(status, "try again later" if status >= 500 else "no reason given")
    return SystemFailure(f"{place}: the hub answered {status}: {reason}", file=place, found=status)


def bars(progress: Progress) -> type[Any]:
    """A class of bars that shows nothing, and reports a file's bytes to `progress`."""
    from tqdm import tqdm

    class Bars(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **said: Any) -> None:
            self._left = 0
            super().__init__(*args, **said | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            steps, self._left = divmod(self._left + int(n or 0), MIB)
            if steps:
                progress.advance(steps)

    return Bars
