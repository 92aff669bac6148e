"""How a command of grpo ends: every `python -m grpo.NAME` runs its work here, and has the same exit codes.

    0    done
    1    a mistake of the program, with its traceback; of a rank, because another rank ended
    2    stopped, with the reason and the remedy in one sentence on standard error
    130  interrupted by Ctrl-C (SIGINT)
    143  by SIGTERM, where the command catches it (training does)

A reader that closes the pipe early ends a command in silence, as it ends other programs (code 141). Not here: what a
command does, and its options.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

from grpo.errors import UserError
from grpo.printable import printable

LOST, BAD_INPUT = 1, 2
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "make it writable",
    errno.EIO: "look after the disk",
    errno.EACCES: "let this user read and write it",
    errno.EPERM: "let this user read and write it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free some memory",
}
"""What to do about an error of the system before the command is run again."""


class CommandEnd(Exception):
    """Ends a command with exit code `code` and, unless it is None, with `sentence` on standard error."""

    def __init__(self, sentence: str | None, code: int):
        super().__init__(sentence or "")
        self.sentence, self.code = sentence, code


def command(
    program: str | Callable[[], str],
    work: Callable[[], object],
    *,
    interrupted: Callable[[], str | None] = lambda: "interrupted",
    again: str = "run it again",
) -> int:
    """Do `work` and return the exit code. What ends it is said in one sentence after the name of `program`.

    `interrupted` gives the sentence after Ctrl-C or SIGTERM, None for none; `again` is what to do once an error of the
    system is mended. Errors that are neither the user's nor the system's keep their traceback.
    """
    try:
        work()
        sys.stdout.flush()  # here, where a pipe that was closed can still be dealt with
        return 0
    except CommandEnd as end:
        sentence, code = end.sentence, end.code
    except UserError as error:
        sentence, code = str(error), BAD_INPUT
    except BrokenPipeError:
        leave_closed_pipe()
        return 128 + signal.SIGPIPE
    except OSError as error:
        sentence, code = system_error(error, again), BAD_INPUT
        if sentence is None:
            raise
    except KeyboardInterrupt as error:
        sentence, code = interrupted(), 128 + getattr(error, "number", signal.SIGINT)
    if sentence is not None:
        name = program if isinstance(program, str) else program()
        print(f"{name}: {printable(sentence)}", file=sys.stderr)
    return code


def system_error(error: OSError, again: str) -> str | None:
    """What to say of an error of the disk, the file system or the machine; None for one that names neither file nor
    a known reason, which is the program's own."""
    remedy = REMEDIES.get(error.errno or 0)
    if error.errno is None or (remedy is None and error.filename is None):
        return None
    where = error.filename if error.filename is not None else "the system"
    return f"{where}: {error.strerror}; {remedy or 'correct or remove it, or name another'} and {again}"


def leave_closed_pipe() -> None:
    """Let nothing more be written to standard output, at the interpreter's end either."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
