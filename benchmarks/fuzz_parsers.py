"""Fuzzing, guided by coverage, of everything that reads bytes which nobody vouches for.

Each reader of tests/helpers/fuzz_targets.py gets its share of the time in a process of its own, under atheris
(libFuzzer). It starts from the good inputs of tests/test_fuzz.py and from the corpus of former runs in
benchmarks/corpus/NAME.json. Of the inputs that reach something new the smallest are kept there. Time and memory of one
input are limited, so that a header which makes a reader allocate or loop is found as well as one that makes it raise.

    pip install atheris
    python -m benchmarks.fuzz_parsers --minutes 20 --out benchmarks/results/fuzz_parsers.json

Exit code 1 if a reader raised anything but a UserError; the input that did it is then in NAME.crash.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "benchmarks" / "corpus"
LONGEST = 4096
"""Bytes of an input."""
MEMORY_MB, SECONDS = 1024, 5
"""What one input may take before it counts as a defect."""
KEPT_BYTES = 1 << 13
"""Of a reader's corpus."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="for all readers together")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    parser.add_argument("--only", help="one reader")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.run:
        fuzz(parsed.run[0], parsed.run[1:])
    from grpo.run.versions import hardware, versions
    from tests.helpers.fuzz_targets import TARGETS

    names = [parsed.only] if parsed.only else list(TARGETS)
    seconds = parsed.minutes * 60 / len(names)
    found = {name: fuzzed(name, seconds) for name in names}
    result: dict[str, Any] = {
        "minutes": parsed.minutes,
        "readers": found,
        "executions": sum(entry["executions"] for entry in found.values()),
        "defects": [name for name, entry in found.items() if entry["defect"]],
        "versions": versions(),
        "hardware": hardware(),
    }
    if parsed.out is not None:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return int(bool(result["defects"]))


def fuzzed(name: str, seconds: float) -> dict[str, Any]:
    """Fuzz the reader `name`; its figures."""
    corpus, crash = CORPUS / f"{name}.json", ROOT / f"{name}.crash"
    known = [base64.b64decode(entry) for entry in json.loads(corpus.read_text())] if corpus.exists() else []
    with tempfile.TemporaryDirectory(prefix="grpo-fuzz-") as folder:
        for number, content in enumerate([example(name)[:LONGEST], *known]):
            (Path(folder) / str(number)).write_bytes(content)
        limits = [f"-max_len={LONGEST}", f"-rss_limit_mb={MEMORY_MB}", f"-timeout={SECONDS}"]
        ends = [f"-max_total_time={int(seconds)}", f"-exact_artifact_path={crash}", "-print_final_stats=1"]
        started = time.monotonic()
        log = child(name, folder, *limits, *ends)
        ran = time.monotonic() - started
        kept = smallest({file.read_bytes() for file in Path(folder).iterdir()})
    CORPUS.mkdir(exist_ok=True)
    corpus.write_text(json.dumps([base64.b64encode(content).decode() for content in kept], indent=0) + "\n")
    covered = re.findall(r"cov: (\d+)", log)
    executions = re.search(r"stat::number_of_executed_units:\s*(\d+)", log)
    entry = {
        "seconds": round(ran, 1),
        "executions": int(executions[1]) if executions else 0,
        "covered_edges": int(covered[-1]) if covered else 0,
        "corpus": len(kept),
        "defect": reason(log) if crash.exists() else None,
    }
    print(
        f"{name:28}{entry['executions']:>12,} inputs  {entry['covered_edges']:>6} edges  {entry['defect'] or ''}",
        flush=True,
    )
    return entry


def smallest(inputs: set[bytes]) -> list[bytes]:
    """The smallest of `inputs`, as many as there is room for."""
    kept, room = [], KEPT_BYTES
    for content in sorted(inputs, key=lambda content: (len(content), content)):
        room -= len(content)
        if room < 0:
            break
        kept.append(content)
    return kept


def reason(log: str) -> str:
    """What ended the fuzzing of a reader, in a line."""
    lines = [line for line in log.splitlines() if re.match(r"\s*(\w+\.)*\w*(Error|Exception)\b|==\d+== ERROR", line)]
    return lines[-1].strip() if lines else "ended without a reason"


def child(name: str, *arguments: str) -> str:
    """The log of atheris on the reader `name`."""
    command = [sys.executable, "-m", "benchmarks.fuzz_parsers", "--run", name, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    return done.stdout + done.stderr


def example(name: str) -> bytes:
    """A good input for the reader `name`."""
    from tests.test_fuzz import good_examples

    return good_examples()[name]


def fuzz(name: str, arguments: list[str]) -> None:
    """In a process of its own: libFuzzer with `arguments`. Does not return."""
    import atheris  # type: ignore[import-not-found]

    for module in ("json", "json.decoder", "json.scanner", "tomllib"):
        sys.modules.pop(module, None)  # imported again below, with counters in it
    with atheris.instrument_imports(include=["grpo", "tomllib", "json"]):
        from tests.helpers.fuzz_targets import feed

        feed(name, b"")  # imports what it needs
    atheris.Setup([name, *arguments], lambda data: feed(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
