"""The command `python -m grpo.report`: a run's page, or a comparison of several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo.errors import UserError, fail
from grpo.report.page import COMPARISON, write_report
from grpo.run.records import REPORT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_args(arguments)
    out = parsed.out or (parsed.runs[0] / REPORT if len(parsed.runs) == 1 else COMPARISON)
    try:
        write_report(parsed.runs, out)
    except UserError as error:
        return fail("grpo.report", error)
    except OSError as error:
        return fail("grpo.report", f"{out}: cannot be written ({error.strerror}); choose another --out")
    print(out)
    return 0


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
