"""Who signed the files that are to be verified."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.errors import MalformedError, UsageError
from sepme_cli.signing.openssh import NAMESPACE, AllowedSigners, allowed_signers
from sepme_cli.signing.sidecar import Signature, read_signature, sidecar
from sepme_cli.verifying.patch import Check


@dataclass(frozen=True)
class Trust:
    """Whose signatures are demanded.

    allowed: an allowed signers file; None demands none. identity: who of those must have signed;
    None for any of them.
    """

    allowed: Path | None
    identity: str | None

    def __post_init__(self) -> None:
        if self.identity is not None and self.allowed is None:
            raise UsageError(
                "--signed-by takes --allowed-signers: a file that says which keys are whose"
            )
        if self.identity == "":
            raise UsageError("--signed-by is empty: name who must have signed", found="nothing")


def signatures_of(
    files: Sequence[Path], stated: Path | None, trust: Trust, unchecked: list[str]
) -> Iterator[Check]:
    """A check of every file's signature that is demanded, or there; what is there and was not
    checked is told.

    stated: of the files, the checkpoint that a statement among them speaks for: its own signature
    may be missing. Raises what reading the allowed signers does, and SystemFailure without
    ssh-keygen.
    """
    if trust.allowed is None:
        unchecked += [
            f"{file}: its signature: needs --allowed-signers"
            for file in files
            if file.is_file() and sidecar(file).exists()
        ]
        return
    with allowed_signers(trust.allowed) as signers:
        for file in files:
            if file == stated and not (file.is_file() and sidecar(file).exists()):
                continue
            ok, detail = _signature(file, signers, trust)
            yield Check(f"{file}: signature", ok, detail)


def _signature(file: Path, signers: AllowedSigners, trust: Trust) -> tuple[bool, str]:
    if file.is_dir():
        return False, "a folder is signed by its statement: --statement"
    path = sidecar(file)
    if not path.exists():
        return False, f"not signed: there is no {path.name} beside it"
    try:
        signature = read_signature(path)
    except MalformedError as error:
        return False, f"{error.message}: expected {error.expected}"
    if signature.namespace != NAMESPACE:
        return False, f"made for {signature.namespace!r} and not for {NAMESPACE!r}"
    return _by_whom(file, signature, signers, trust)


def _by_whom(
    file: Path, signature: Signature, signers: AllowedSigners, trust: Trust
) -> tuple[bool, str]:
    known = signers.principals(signature)
    wanted = known if trust.identity is None else (trust.identity,)
    with reading(file), file.open("rb") as opened:
        refusals = []
        for identity in wanted:
            refusal = signers.refusal(opened, signature, identity)
            if refusal is None:
                return True, f"by {identity}, {signature.key}"
            refusals.append(refusal)
    if not known:
        return False, f"by nobody known, {signature.key}: {signers.stranger(signature)}"
    told = f"by the key of {', '.join(known)}, {signature.key}: {refusals[0]}"
    return False, told if trust.identity is None else f"not by {trust.identity}; {told}"
