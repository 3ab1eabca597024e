"""The never-slower table says what the rows say, and documentation names every slower cell.

Nothing is timed.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import figures
import presets
import pytest
import report
import results
import settings
import torch
import work

from convmixer_fast import create_model, explain

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
MACHINE = {"name": "epyc-zen1-2c", "cpu": "AMD EPYC", "cores": 2, "isa": "avx2", "system": "Linux"}
RUN = {"date": "2025-01-31", "torch": "2.9.0", "engine": "aa"}
BY = "mixer_stack: cpu (whole blocks in one C++ call)"
STOCK = "mixer_stack: reference (stock PyTorch is faster here)"


def cell(
    *,
    dtype: str = "float32",
    threads: int = 2,
    batch: int = 1,
    side: int = 64,
    by: str = BY,
    notes: tuple[str, ...] = (),
    **ms: float,
) -> list[dict[str, Any]]:
    """The rows of a cell of 1024/20: ``ms`` of ours, nchw and last; ``notes``: those not run."""
    at = {"model": "1024/20", "dtype": dtype, "threads": threads, "batch": batch, "side": side}
    group = f"1024/20, {dtype}, batch {batch}, {side} px, threads {threads}"
    names = {"ours": "ours", "nchw": "eager NCHW", "last": "eager channels-last"}
    rows = [{"system": names[name], "ms": value} for name, value in ms.items()]
    rows += [{"system": names[name], "note": "not run: a call would take 99 s"} for name in notes]
    for row in rows:
        row |= {"suite": "never_slower", "group": group, **at}
        if row["system"] == "ours" and "ms" in row:
            row["computed by"] = by
    return rows


def made_of(*found: list[dict[str, Any]]) -> dict[str, Any]:
    return results.new_report(MACHINE, RUN, [row for rows in found for row in rows])


@pytest.mark.parametrize(
    ("ms", "ratio", "slower"),
    [
        ({"ours": 10.0, "nchw": 12.0, "last": 11.0}, 1.10, False),
        ({"ours": 10.0, "nchw": 9.0, "last": 11.0}, 0.90, True),
        ({"ours": 100.0, "nchw": 97.0, "last": 99.0}, 0.97, False),
        ({"ours": 100.0, "nchw": 96.9, "last": 99.0}, 0.969, True),
    ],
)
def test_a_cell_is_ours_against_the_faster_layout_of_stock_pytorch(ms, ratio, slower):
    (found,) = report.cells(cell(**ms))
    assert found.ratio == pytest.approx(ratio)
    assert found.slower is slower
    assert str(found) == "1024/20, float32, batch 1, 64 px, threads 2"


def test_what_was_not_run_has_no_ratio_and_is_not_slower():
    one_layout = cell(ours=10.0, nchw=20.0, notes=("last",))
    no_stock = cell(ours=10.0, notes=("nchw", "last"), side=128)
    nothing = cell(notes=("ours",), side=448)
    found = report.cells(one_layout + no_stock + nothing)
    assert [c.ratio for c in found] == [2.0, None, None]
    assert not any(c.slower for c in found)
    columns, (row,) = report.cell_table(found)
    assert [row[c] for c in columns[3:6]] == ["2.00", "not run", "not run"]


def test_the_table_has_a_row_a_line_and_a_column_a_place_in_order():
    found = report.cells(
        cell(ours=10.0, nchw=15.0, batch=4, side=64)
        + cell(ours=10.0, nchw=9.06, batch=1, side=224)
        + cell(ours=10.0, nchw=10.0, batch=1, side=64, by=STOCK)
        + cell(ours=10.0, nchw=30.0, dtype="bfloat16", threads=1)
    )
    columns, rows = report.cell_table(found)
    places = ("1 x 64", "1 x 224", "4 x 64")
    assert columns == ("model", "dtype", "threads", *places, "computed by")
    assert [[row.get(c, "") for c in columns[:-1]] for row in rows] == [
        ["1024/20", "float32", 2, "1.00", "**0.906**", "1.50"],
        ["1024/20", "bfloat16", 1, "3.00", "", ""],
    ]
    assert [row["computed by"] for row in rows] == [f"{BY}. 1 x 64: {STOCK}", BY]


def test_the_report_shows_the_table_and_holds_the_slowest_cell_against_its_promise():
    measured = made_of(
        cell(ours=10.0, nchw=15.0), cell(ours=10.0, nchw=9.0, side=128), cell(notes=("ours",))
    )
    (found,) = [x for x in report.findings(measured) if "stock PyTorch" in x.what]
    assert found.measured == pytest.approx(0.9)
    assert (found.kept, found.promise) == ("no", report.NEVER_SLOWER)
    assert "128 px" in found.detail
    assert "1 of " in found.detail
    text = report.markdown(measured)
    assert "## Never slower than stock PyTorch" in text
    assert "**0.900**" in text
    assert not report.findings(made_of())


def test_every_slower_cell_is_named_by_the_figures_and_no_other(tmp_path):
    assert figures.slower_cells(tmp_path) == "No machine has been measured yet."
    fast = made_of(cell(ours=10.0, nchw=15.0), cell(ours=10.0, notes=("nchw",), side=128))
    results.save(fast, tmp_path / "fast" / "cpu.json")
    told = figures.slower_cells(tmp_path)
    assert told == "Below 0.97 of stock PyTorch's speed, fast: 0 of 2 cells."
    slow = made_of(cell(ours=10.0, nchw=9.0), cell(ours=10.0, nchw=9.9, side=128))
    results.save(slow, tmp_path / "slow" / "cpu.json")
    told = figures.slower_cells(tmp_path).splitlines()
    assert told[0].endswith("fast: 0 of 2 cells; slow: 1 of 2 cells.")
    assert told[-1] == f"| slow | 1024/20, float32, batch 1, 64 px, threads 2 | 0.900 | {BY} |"
    assert len(told) == 5
    assert figures.slower_count(tmp_path) == told[0]


@pytest.mark.parametrize(
    "path", sorted((BENCHMARKS / "results").glob("*/cpu.json")), ids=lambda p: p.parent.name
)
def test_the_documentation_names_every_stored_cell_that_is_slower(path):
    page = (ROOT / "docs" / "measured.md").read_text()
    stored = results.load(path)
    unnamed = [
        str(found)
        for found in report.cells(stored["rows"])
        if found.slower and f"| {path.parent.name} | {found} | " not in page
    ]
    assert not unnamed, "run: python benchmarks/report.py --readme"


# What is run


@pytest.fixture
def suite() -> ModuleType:
    pytest.importorskip("pytest_benchmark", reason='pip install ".[bench]"')
    return importlib.import_module("test_never_slower")


def test_a_call_is_expected_to_run_at_the_rate_of_the_largest_cell_before_it(suite):
    rows = [
        {"system": "ours", "ms": 10.0, "GMAC/s": 1.0},
        {"system": "ours", "ms": 10.0, "GMAC/s": 50.0},
        {"system": "ours", "ms": 1000.0, "GMAC/s": 99.0},  # more work than is asked about
        {"system": "eager NCHW", "ms": 100.0, "GMAC/s": 5.0},
        {"system": "eager channels-last", "note": "not run"},
    ]
    asked = work.Work(1, (work.Part(2_000_000_000, 0, matrix=True),))
    seconds = suite.expected_seconds(rows, asked)
    assert seconds == {"ours": pytest.approx(0.04), "eager NCHW": pytest.approx(0.4)}


@pytest.mark.parametrize(
    ("seconds", "left_out"),
    [
        ({}, set()),
        ({"ours": 1.0, "eager NCHW": 30.0}, {"eager NCHW"}),
        ({"ours": 9.0, "eager NCHW": 15.0}, set()),  # not far from ours: worth its time
        ({"ours": 11.0, "eager NCHW": 15.0}, {"ours"}),
        ({"eager NCHW": 10.0}, set()),
    ],
)
def test_long_calls_are_left_out_with_the_reason(suite, seconds, left_out):
    notes = suite.too_long(("ours", "eager NCHW"), seconds, 10.0)
    assert set(notes) == left_out
    for name, note in notes.items():
        assert f"{seconds[name]:.0f} s" in note


def test_every_setting_of_a_preset_is_known_and_leaves_no_state_behind():
    for name in presets.PRESETS:
        preset = presets.preset_of(name, "cpu")
        assert set(preset.cell_settings) <= set(settings.SETTINGS)
        assert set(preset.stock) <= {"eager NCHW", "eager channels-last"}
    assert set(presets.PRESETS["full"].cell_settings) == set(settings.SETTINGS)

    def state() -> tuple[Any, ...]:
        switches = (getattr(torch.backends.mkldnn, n, None) for n in ("conv", "matmul"))
        found = [getattr(switch, "fp32_precision", None) for switch in switches]
        # torch refuses to tell the older switch while one of these is set.
        older = () if any(found) else (torch.get_float32_matmul_precision(),)
        return (*found, *older, torch.is_autocast_enabled("cpu"))

    before = state()
    inside = {}
    for name, setting in settings.SETTINGS.items():
        with setting.context():
            inside[name] = state()
        assert state() == before, name
    assert inside["autocast"] != before
    assert inside["reduced"] != before
    assert inside["bfloat16"] == before


def test_computed_by_names_each_backend_and_reason_once():
    model = create_model("256/8", depth=2).eval()
    told = report.computed_by(explain(model, torch.zeros(1, 3, 32, 32)))
    rows = explain(model, torch.zeros(1, 3, 32, 32))
    assert rows
    for row in rows:
        assert told.count(f"{row.backend} ({row.reason})") == 1
        assert row.op in told
