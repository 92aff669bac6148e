"""Write `docs/benchmarks.md` from `docs/benchmarks.md.jinja` and `benchmarks/results`: `make docs`.

Every figure of that page is an expression over a file of results, so that none can differ from what was measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"


class Results(dict[str, Any]):
    """Results by the name of their file, read when a page asks for them."""

    def __missing__(self, name: str) -> Any:
        self[name] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        return self[name]


def render(template: Path) -> str:
    """The page that `template` describes. Raises jinja2.UndefinedError for a figure that no file has."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    environment.filters |= {
        "count": lambda value: f"{value:,.0f}",
        "gb": lambda value: f"{value / 1e9:.1f}",
        **{f"f{places}": lambda value, places=places: f"{value:.{places}f}" for places in range(5)},
    }
    return environment.from_string(template.read_text(encoding="utf-8")).render(results=Results(), best=best)


def best(rows: dict[str, dict[str, Any]], *words: str) -> dict[str, Any]:
    """The fastest of the rows whose name has all `words`, without those that ran out of memory."""
    ran = [row for name, row in rows.items() if all(word in name for word in words) and "tokens_per_second" in row]
    return max(ran, key=lambda row: row["tokens_per_second"])


if __name__ == "__main__":
    (DOCS / "benchmarks.md").write_text(render(DOCS / "benchmarks.md.jinja"), encoding="utf-8")
