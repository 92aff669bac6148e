"""Benchmarks whose peer is not installed leave its column out, say so, and go on."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from benchmarks import nf4_as_other_card, nf4_gemm, weight_update
from benchmarks.common.nf4_weights import bitsandbytes_copies


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bitsandbytes: None in `sys.modules` makes its import raise."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def test_what_is_not_installed_is_left_out_and_named(bare: None) -> None:
    with pytest.warns(UserWarning, match="bitsandbytes is left out"):
        assert bitsandbytes_copies(torch.zeros(128, 64), (64, 64), 2) == []
    with pytest.warns(UserWarning, match="bitsandbytes is left out"):
        systems = weight_update.systems()
    assert len(systems) > 3 and not any("bitsandbytes" in name for name in systems)


@pytest.mark.parametrize("peers", [("bf16",), ("bf16", "bitsandbytes")])
def test_the_table_of_products_has_the_columns_that_were_measured(
    peers: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"ours": 2.0, "bf16": 6.0, "bitsandbytes": 9.0}
    measured = {name: time for name, time in times.items() if name in ("ours", *peers)}
    records = [
        {"model": "M", "linear": linear, "rows": rows, "floor": 1.0, **measured}
        for linear in ("qkv", "o")
        for rows in (1, 8)
    ]
    sums = nf4_gemm.layer_sums(records)
    assert [(row["rows"], row["ours"]) for row in sums] == [(1, 4.0), (8, 4.0)]
    assert all(row[f"against_{peer}"] == times[peer] / times["ours"] for row in sums for peer in peers)
    assert {key for row in sums for key in row if "bitsandbytes" in key} == (
        {"bitsandbytes", "against_bitsandbytes"} if "bitsandbytes" in peers else set()
    )
    nf4_gemm.print_table(records, sums)
    _, heading, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and ("bitsandbytes" in heading) == ("bitsandbytes" in peers)
    assert {len(line) for line in (heading, *lines)} == {len(heading)}


@pytest.mark.parametrize("there", [False, True])
def test_another_cards_table_judges_against_what_was_measured(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    rows = {str(count): 4.0 for count in nf4_as_other_card.ROWS}
    times: dict[str, Any] = {"ours": {"o": rows}, "cublas": {"o": rows}, "bitsandbytes": {"o": rows} if there else {}}
    options = type("Options", (), {"model": "Llama-3.1-8B"})
    table = nf4_as_other_card.compared(
        options, {"times": times, "bandwidth": 1e12}, {"times": {"o": rows}, "by_rule": {"o": rows}}
    )
    assert len(table) == len(rows) and all(("against_bitsandbytes" in row) == there for row in table)
