"""A benchmark that is a table: rows measured one after another in processes of their own, written as they come.

A script says which rows are wanted, how one is measured, how it is shown and what is concluded from all of them; here
are the arguments that such scripts have in common and the loop. Rows that share what is slow to make, a model above
all, form a job and are measured by one process. A row that fails, or for which no time is left, keeps the reason under
"failed" and costs no other row: what remains of its job goes on in a new process. Whoever ends the script finds the
rows so far in its `--out`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.processes import TIME_UP, end, write_result

Row = dict[str, Any]
Job = list[Row]
"""What identifies each row, in the order in which one process measures them."""
BEGINS, TOLD = "ROW BEGINS", "ROW "


def parser(doc: str, *, rank: int, chunk: int, budget: float = 560) -> argparse.ArgumentParser:
    """The arguments of every such script, with its defaults."""
    made = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    made.add_argument("--rank", type=int, default=rank)
    made.add_argument("--chunk", type=int, default=chunk, help="tokens whose logits exist at once")
    made.add_argument("--device", default="cuda")
    made.add_argument("--budget", type=float, default=budget, help="seconds for everything")
    made.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: tries the script")
    made.add_argument("--out", type=Path, help="a JSON file, written anew with every row")
    made.add_argument("--one", type=json.loads, metavar="JSON", help="measure these rows in this process")
    return made


def add_step(parser: argparse.ArgumentParser, form: str) -> None:
    """The arguments of scripts that measure one form of the training step."""
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--form", default=form, choices=("none", "mlp", "layer", "offload"), help="what is recomputed")


def words(text: str) -> list[str]:
    """ "a,b" -> ["a", "b"]; nothing for an empty text."""
    return text.split(",") if text else []


def settings(options: argparse.Namespace, *left_out: str) -> Row:
    """The arguments that a result repeats: all but `left_out` and those that say how the script is run."""
    return {name: value for name, value in vars(options).items() if name not in ("one", "out", "budget", *left_out)}


def against_plan(measured: Sequence[Row], bar: float) -> Row:
    """How far rows with an "error" are from their plans: the worst, and how many are within `bar`, a share."""
    errors = [abs(row["error"]) for row in measured if "error" in row]
    return {
        "bar": bar, "worst_error": max(errors, default=None), "within_bar": sum(error <= bar for error in errors),
        "measured": len(errors),
    }  # fmt: skip


def run(
    options: argparse.Namespace,
    jobs: Sequence[Job],
    measurer: Callable[[argparse.Namespace], Callable[[Row], Row]],
    line: Callable[[Row], str],
    conclude: Callable[[list[Row]], Row],
) -> int:
    """Measure all `jobs`, or here what `--one` names; the script's exit code.

    `measurer` makes, in the process that measures, the function from what identifies a row to the measured row.
    `line` is what is printed of such a row, `conclude` what the result says beside the rows so far.
    """
    if options.one:
        measure_here(options.one, measurer(options))
        return 0
    ends = time.monotonic() + options.budget
    table = Table(options.out, line, conclude)
    for job in jobs:
        while job:
            job = job[measure_job(job, ends - time.monotonic(), table) :]
    print(json.dumps(table.write()))
    return 0


def measure_here(job: Job, measure: Callable[[Row], Row]) -> None:
    """In the process of a job: measure its rows and tell the process that waits."""
    for row in job:
        print(f"\n{BEGINS}", flush=True)
        tell(measure(row))


def tell(row: Row) -> None:
    """Make known the row that is being measured, whole or as far as it has come."""
    print(f"\n{TOLD}{json.dumps(row)}", flush=True)


class Table:
    """The rows so far: where they are written, and how they are shown."""

    def __init__(self, out: Path | None, line: Callable[[Row], str], conclude: Callable[[list[Row]], Row]):
        self.out, self.line, self.conclude = out, line, conclude
        self.rows: list[Row] = []

    def add(self, identity: Row) -> Row:
        self.rows.append(dict(identity))
        return self.rows[-1]

    def show(self, identity: Row, row: Row) -> None:
        name = ", ".join(f"{key} {value}" for key, value in identity.items())
        print(f"{name}: {row['failed'][-500:]}" if "failed" in row else self.line(row), flush=True)

    def write(self) -> Row:
        result = {**self.conclude(self.rows), "rows": self.rows}
        write_result(self.out, result)
        return result


def measure_job(job: Job, seconds: float, table: Table) -> int:
    """Put the rows of `job` into `table`, measured by a new process; how many of them are there, failed ones included.

    Where the process ends early the row that it was at has failed, and those after it are left for another process;
    where it never came to a row all have.
    """
    begun: list[Row] = []

    def hear(line: str) -> None:
        if line == BEGINS:
            if begun:
                table.show(job[len(begun) - 1], begun[-1])
            begun.append(table.add(job[len(begun)]))
        elif line.startswith(TOLD):
            begun[-1] |= json.loads(line.removeprefix(TOLD))
            table.write()

    # Of an option given twice the last counts.
    command = [sys.executable, *sys.orig_argv[1:], "--one", json.dumps(job)]
    failed = listen(command, seconds, hear) if seconds > 0 else TIME_UP
    ended = [(job[len(begun) - 1], begun[-1])] if begun else [(identity, table.add(identity)) for identity in job]
    for identity, row in ended:
        if failed or not begun:
            row["failed"] = failed or "nothing was measured"
        table.show(identity, row)
    table.write()
    return len(begun) or len(job)


def listen(command: list[str], seconds: float, hear: Callable[[str], None]) -> str | None:
    """Run `command` for at most so many seconds and give each line that it prints to `hear`, soon after it is printed.

    None after a good end, else what went wrong, with the end of the output. Nothing of the process runs on.
    """
    ends = time.monotonic() + seconds
    lines: list[str] = []
    # A file and not a pipe: whatever else holds the output open cannot keep this waiting.
    with tempfile.NamedTemporaryFile() as log, open(log.name, errors="replace", newline="\n") as output:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            part, code, late = "", None, False
            while code is None and not late:
                time.sleep(0.1)
                code, late = process.poll(), time.monotonic() > ends
                *whole, part = (part + output.read()).split("\n")
                for line in whole:
                    hear(line)
                lines += [line for line in whole if line and not line.startswith(TOLD)]
        finally:
            end(process)
    if code == 0:
        return None
    said = TIME_UP if code is None else f"exit code {code}"
    return f"{said}: " + "\n".join([*lines, part])[-1200:].strip()
