"""`python -m grpo.watch [FOLDER]`: the reports of all runs in a folder, in the browser, growing while they train.

    python -m grpo.watch runs          # then open the address that it prints

The server listens on this machine alone; from another one, forward the port: `ssh -L 8765:127.0.0.1:8765 HOST`. It
reads run folders and writes nothing.

Exit codes: those of `grpo.command`.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo.command import command
from grpo.errors import UserError

HOST, PORT = "127.0.0.1", 8765


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_args(arguments)
    return command("grpo.watch", lambda: run(parsed.folder, parsed.port), interrupted=lambda: None)


def parser() -> argparse.ArgumentParser:
    """The options of `python -m grpo.watch`."""
    result = argparse.ArgumentParser(
        prog="python -m grpo.watch",
        description="Show the reports of all runs in a folder, in the browser, growing while they train.",
        allow_abbrev=False,
    )
    result.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="where the runs are (default: runs)")
    result.add_argument("--port", type=int, default=PORT, help=f"on {HOST} (default: {PORT}; 0: any that is free)")
    return result


def run(folder: Path, port: int) -> None:
    """Serve until Ctrl-C. Raises UserError for a folder that is not there and a port that cannot be had."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; pass the one that your runs are in")
    import uvicorn

    from grpo.report.watched import Pages

    with listening(port) as listener:
        print(f"watching {folder} at http://{HOST}:{listener.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(Pages(folder).app(), log_level="warning", lifespan="off")).run([listener])


def listening(port: int) -> socket.socket:
    """A socket on the loopback address."""
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--port {port}: {reason}; choose another, or 0 for any that is free") from None


if __name__ == "__main__":
    sys.exit(main())
