"""What the process says when it ends, for scripts."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """The exit statuses of every command."""

    DONE = 0
    """Done, same, or verified."""
    NO = 1
    """The answer is no: differs, does not verify, would not apply."""
    USAGE = 2
    """The command line makes no sense."""
    MALFORMED = 3
    """A file is malformed, hostile or unsupported."""
    MISMATCH = 4
    """A patch and a checkpoint do not belong together."""
    SYSTEM = 5
    """The system failed us: disk full, permission, not found."""
    INTERRUPTED = 130
    """By Ctrl-C."""
    TERMINATED = 143
    """By SIGTERM: 128 and its number, as shells say it."""
