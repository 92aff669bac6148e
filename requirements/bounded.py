"""The packages that pyproject.toml gives an upper bound, as far as they are installed: for `make test-newest`."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
VERSIONS = (
    "import json, sys; from importlib import metadata as m; found = {n: m.version(n) for n in sys.argv[1:] "
    "if any(True for _ in m.distributions(name=n))}; print(json.dumps(found))"
)


def bounded() -> list[str]:
    """Names of the dependencies, those of extras too, that have an upper bound."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    entries = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    return sorted({re.split(r"[<>=!~ ]", entry)[0] for entry in entries if "<" in entry or "==" in entry})


def installed(python: str) -> dict[str, str]:
    """Versions of the bounded packages that `python` imports."""
    done = subprocess.run([python, "-c", VERSIONS, *bounded()], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--except", nargs="*", default=[], dest="without", metavar="NAME", help="leave these out")
    parser.add_argument("--changed", nargs=2, metavar="PYTHON", help="print what the second has in another version")
    options = parser.parse_args()
    if options.changed is None:
        print(*(name for name in installed(sys.executable) if name not in options.without))
        return
    before, now = map(installed, options.changed)
    changes = [f"{name} {before.get(name, '-')} -> {now[name]}" for name in now if now[name] != before.get(name)]
    print("newer than tested:", ", ".join(changes) or "nothing")


if __name__ == "__main__":
    main()
