"""The command `python -m grpo.report`: a run's page, or a comparison of several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo.command import command
from grpo.errors import UserError
from grpo.report.page import COMPARISON, write_report
from grpo.run.records import REPORT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_args(arguments)
    return command("grpo.report", lambda: run(parsed))


def run(parsed: argparse.Namespace) -> None:
    """Write the page and print where it is. Raises UserError."""
    out = parsed.out or (parsed.runs[0] / REPORT if len(parsed.runs) == 1 else COMPARISON)
    try:
        write_report(parsed.runs, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    print(out)


def parser() -> argparse.ArgumentParser:
    """The options of `python -m grpo.report`."""
    result = argparse.ArgumentParser(
        prog="python -m grpo.report",
        description="Write the report of a run as one HTML file, or a comparison of several.",
        allow_abbrev=False,
    )
    result.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder; several are compared")
    result.add_argument(
        "--out", type=Path, metavar="FILE", help=f"the file (one run: its {REPORT}; several: {COMPARISON} here)"
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
