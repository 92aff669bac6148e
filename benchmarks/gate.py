"""What the gate at the start of a run sees on this machine: how far the two graphs are apart, beside its limits.

    python -m benchmarks.gate --device cuda --budget 240 --out gate.json

For every family, precision and base: the largest relative difference of what reaches a linear module and of what one
makes, with an adapter that acts on all of them, and the mean difference of logprobs. Tiny random models, whose layers
are as families have them and whose sizes are not. Where the budget of seconds ends, the rest is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.processes import write_result
from benchmarks.families import save
from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.model.checks import BEYOND_FLOAT16
from grpo.model.source import open_source
from grpo.session import find_layout
from grpo.training import self_check
from grpo.training.module_check import differences
from tests.helpers.families import NEWCOMERS, WITH_IMAGES
from tests.helpers.graph_comparison import gate_session
from tests.helpers.tiny import FAMILIES


def measured(family: str, dtype: str, four_bit: bool, device: str) -> dict[str, Any]:
    """The differences of one tiny model, and what the gate says."""
    start, result = time.perf_counter(), {"family": family, "dtype": dtype, "nf4": four_bit}
    with tempfile.TemporaryDirectory() as name:
        save(Path(name), family)
        try:
            find_layout(open_source(Model(name=name)).config, name)
            session = gate_session(Path(name), dtype, load_in_4bit=four_bit, device=device)
        except Exception as error:  # whatever keeps this family from starting here
            return result | {"refused": f"{type(error).__name__}: {error}"[:400]}
        try:
            result |= apart(session)
        finally:
            session.engine.close()
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def apart(session: Any) -> dict[str, Any]:
    """The largest of each kind of difference, by module, and the gate's sentence."""
    prompt = self_check.gate_prompt(session)
    sampled = self_check.sample_with_choice(session, prompt)
    logprobs = self_check.mean_abs_diff(sampled.logprobs, self_check.scored(session.policy, prompt, sampled))
    with self_check.served_move(session, self_check.even_move):
        found = list(differences(session, prompt.text))
    result: dict[str, Any] = {"logprobs": logprobs, "logprobs_limit": self_check.tolerance(session)}
    for kind, reached in (("reached", True), ("made", False)):
        of_kind = [each for each in found if each.reached == reached]
        if of_kind:
            worst = max(of_kind, key=lambda each: each.size)
            result |= {kind: worst.size, f"{kind}_limit": worst.limit, f"{kind}_at": worst.module}
    try:
        result["gate"] = self_check.check_start(session) or "passed"
    except UserError as error:
        result["gate"] = str(error)
    return result


def cases(families: list[str], dtypes: list[str]) -> list[tuple[str, str, bool]]:
    """(family, dtype, NF4), the most telling first."""
    every = [(family, dtype, four_bit) for four_bit in (True, False) for dtype in dtypes for family in families]
    return [case for case in every if case[1] != "float16" or case[0] not in BEYOND_FLOAT16]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--only", help="families, with commas between")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no other case is begun")
    parser.add_argument("--out", type=Path, help="write the result here, after every case")
    parsed = parser.parse_args(arguments)
    every = list(dict.fromkeys([*FAMILIES, *NEWCOMERS, *WITH_IMAGES]))
    start, results = time.perf_counter(), []
    result = {"benchmark": "gate", "cases": results}
    for case in cases(parsed.only.split(",") if parsed.only else every, parsed.dtypes.split(",")):
        if time.perf_counter() - start > parsed.budget:
            break
        results.append(measured(*case, parsed.device))
        print(json.dumps(results[-1]), flush=True)
        write_result(parsed.out, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
