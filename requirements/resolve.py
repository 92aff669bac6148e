"""Whether the extras for a GPU resolve on a fresh machine, for every Python that is supported: nothing is installed.

python requirements/resolve.py            # with the constraints of cuda.txt: minutes
python requirements/resolve.py --write    # without them, and write what the newest packages are
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "requirements" / "cuda.txt"
EXTRAS = "cuda,sft,math,trackers"
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
HEADING = f"""\
# Constraints for a GPU: what `pip install -c requirements/cuda.txt ".[{EXTRAS}]"` takes on x86-64 Linux. Written
# by requirements/resolve.py --write; vLLM 0.26, torch 2.11 and triton 3.6 of these ran on H100 and H200.
"""


def resolved(python: str, *more: str) -> dict[str, str]:
    """Name -> version of what pip would install for `python`. Raises CalledProcessError where nothing fits together."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--target",
            folder,
        ]
        words += [
            "--python-version",
            python,
            "--implementation",
            "cp",
            "--only-binary=:all:",
            "--report",
            str(report),
            "--target",
            folder,
        ]
        words += [word for platform in PLATFORMS for word in ("--platform", platform)]
        subprocess.run([*words, *more, f".[{EXTRAS}]"], cwd=ROOT, check=True)
        found = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    names = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in found}
    return {name: version for name, version in sorted(names.items()) if name != "grpo"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true", help="write cuda.txt anew")
    parser.add_argument("--python", nargs="*", default=PYTHONS)
    options = parser.parse_args()
    if options.write:
        pins = [f"{name}=={version}" for name, version in resolved("3.12").items()]
        CONSTRAINTS.write_text(HEADING + "\n".join(pins) + "\n", encoding="utf-8")
    for python in options.python:
        found = resolved(python, "-c", str(CONSTRAINTS))
        print(f"Python {python}: {len(found)} packages, vllm {found['vllm']}, torch {found['torch']}")


if __name__ == "__main__":
    main()
