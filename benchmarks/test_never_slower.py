"""Ours under ``auto`` against the best of stock PyTorch, over dtype, batch, side and threads.

    pytest benchmarks/test_never_slower.py
    python benchmarks/cpu.py --preset full --suites never_slower --variants 256/8,1024/20

A cell is a model, a setting (`settings.SETTINGS`), a batch, a side and a thread count; its systems
take turns in one process. The output for the first image is compared with float64 first: ours by
the numerics rule, the others' by `competitors.check_peer`. A cell below `report.NEVER_SLOWER` is
measured once more with more rounds, and the second measurement counts.

The time is bounded: a system with a call of more than a second, and 1.5 times the fastest, is not
called again. A call that is expected to take more than ``Preset.cell_call_seconds``, at the rate of
the largest cell before it, is skipped and noted.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import devices
import pytest
import torch
from cases import case
from competitors import build, check_peer, eager
from devices import Cpu
from measuring import Measured, measure
from presets import Preset
from recording import BenchmarkRecorder
from report import NEVER_SLOWER, computed_by, stock_ratio
from results import Row, select
from settings import SETTINGS
from work import Work, of_model

from convmixer_fast import explain
from convmixer_fast.diagnostics.timing import wall_seconds
from convmixer_fast.testing import assert_numerics

#: A system is not called again if a call takes so many seconds and so many times the fastest's.
LONG, FAR = 1.0, 1.5
#: The note of a cell in which there is nothing to compare with.
OVERFLOW = "not run: PyTorch's result overflows in this dtype"
#: Rounds and seconds of a second measurement, as multiples of the first.
MORE = 3


def expected_seconds(before: Iterable[Row], work: Work) -> dict[str, float]:
    """Expected seconds of a call, by system.

    The rate is that of the system's largest cell in ``before`` with no more work than ``work``.
    """
    rates: dict[str, tuple[float, float]] = {}
    for row in before:
        if "ms" not in row:
            continue
        macs = row["GMAC/s"] * row["ms"] * 1e6
        if rates.get(row["system"], (0.0, 0.0))[0] < macs <= 1.001 * work.macs:
            rates[row["system"]] = (macs, row["GMAC/s"] * 1e9)
    return {system: work.macs / rate for system, (_, rate) in rates.items()}


def too_long(systems: Iterable[str], seconds: Mapping[str, float], most: float) -> dict[str, str]:
    """The systems that are not called, with the reason.

    Stock PyTorch is left out only if it is also expected to take twice as long as ours.
    """
    ours = seconds.get("ours", 0.0)
    return {
        system: f"not run: a call would take about {seconds[system]:.0f} s"
        for system in systems
        if seconds.get(system, 0.0) > most and (system == "ours" or seconds[system] > 2 * ours)
    }


def _measure(
    runs: Mapping[str, Callable[[], Any]], device: Cpu, preset: Preset, benchmark: Any
) -> Measured:
    """`measure` the systems that one call does not decide; the others keep that call's columns."""
    once = {name: wall_seconds(run, 1) for name, run in runs.items()}
    fastest = min(once.values())
    decided = {name: s for name, s in once.items() if s > max(LONG, FAR * fastest)}
    measured = measure(
        {name: run for name, run in runs.items() if name not in decided},
        device,
        preset,
        benchmark,
        threads=(),
    )
    columns = {
        name: {**dict.fromkeys(("ms", "best ms", "p20 ms", "p80 ms"), 1e3 * s), "rounds": 1}
        for name, s in decided.items()
    }
    return dataclasses.replace(measured, columns={**measured.columns, **columns})


def test_cell(
    cell_variant: str,
    setting: str,
    threads: int,
    cell_batch: int,
    cell_side: int,
    benchmark: Any,
    preset: Preset,
    record: BenchmarkRecorder,
) -> None:
    group = f"{cell_variant}, {setting}, batch {cell_batch}, {cell_side} px, threads {threads}"
    record.wanted("never_slower", group)
    how = SETTINGS[setting]
    if why := how.unavailable_reason():
        pytest.skip(why)
    model = case(cell_variant)
    work = of_model(model.arch, cell_side, cell_batch, how.dtype.itemsize)
    line = {"model": cell_variant, "dtype": setting, "threads": threads}
    at = {**line, "batch": cell_batch, "side": cell_side}
    before = select(record.recorder.rows("never_slower"), **line)
    systems = ("ours", *preset.stock)
    notes = too_long(systems, expected_seconds(before, work), preset.cell_call_seconds)
    rows = [{**at, "system": name, "note": note} for name, note in notes.items()]
    if "ours" in notes:
        record("never_slower", group, rows[:1])
        return

    device = Cpu(threads)
    device.enter()
    torch._dynamo.reset()
    plain, ours = (copy.deepcopy(m).to(how.dtype) for m in (model.plain, model.ours))
    inputs = device.inputs(model.images(cell_batch, cell_side).to(how.dtype))
    exact = devices.oracle(plain, inputs.first[:1])
    preset = dataclasses.replace(preset, budget=preset.cell_budget)
    more = dataclasses.replace(
        preset, budget=MORE * preset.budget, least_rounds=MORE * preset.least_rounds
    )
    with torch.no_grad(), how.context():
        same = plain(inputs.first[:1])
        mine = eager(ours, inputs)
        if not same.isfinite().all():
            rows += [{**at, "system": name, "note": OVERFLOW} for name in ("ours", *preset.stock)]
            record("never_slower", group, rows)
            return
        assert_numerics(mine()[:1], same, exact)
        stock, _, missing = build(
            [name for name in preset.stock if name not in notes],
            device.kind,
            plain,
            inputs,
            lambda out: check_peer(out[:1], same, exact),
        )
        runs = {"ours": mine, **stock}
        by = computed_by(explain(ours, inputs.first))
        for attempt, how_long in (benchmark, preset), (SimpleNamespace(pedantic=_call), more):
            measured = _measure(runs, device, how_long, attempt)
            found = [{**at, **measured.row(name, work)} for name in runs]
            ratio = stock_ratio(found)
            if ratio is None or ratio >= NEVER_SLOWER:
                break
    found[0]["computed by"] = by
    rows += [{**at, "system": name, "note": note} for name, note in missing.items()]
    record("never_slower", group, found + rows)


def _call(run: Callable[..., Any], args: Any, kwargs: Any, rounds: int) -> Any:
    """Replacement of pytest-benchmark's `pedantic`, which a test may call only once."""
    return run(*args, **kwargs)
