"""The one exception that a user is meant to read, and how a command ends with a sentence."""

import errno
import sys

from grpo.printable import printable

BAD_INPUT, INTERRUPTED = 2, 130
"""Exit codes of every command; a run that SIGTERM ends has 143."""
DISK_REFUSES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "make it writable",
    errno.EIO: "look after the disk",
}
"""What to do about an error of the disk before the run is continued."""


class UserError(Exception):
    """Bad input: one sentence that names the file, line or key, and the remedy.

    The command line prints it without a traceback and exits with code 2; nothing has been written by then. It stays
    one line where it repeats text of several.
    """

    def __init__(self, sentence: str):
        super().__init__(" ".join(sentence.split()) if "\n" in sentence else sentence)


def fail(program: str, sentence: object, code: int = BAD_INPUT) -> int:
    """Say why `program` ends, on standard error, and return its exit code. What may stand in a file is escaped."""
    print(f"{program}: {printable(str(sentence))}", file=sys.stderr)
    return code


def disk_refusal(error: OSError) -> str | None:
    """What to say of an error that is the disk's and not the program's, None for any other."""
    remedy = DISK_REFUSES.get(error.errno or 0)
    location = error.filename or "the disk"
    return None if remedy is None else f"{location}: {error.strerror}; {remedy} and continue with --resume"
