"""What does an image cost as it grows, and as more come at once? Ours beside eager PyTorch.

The measure is nanoseconds for a patch, one position of the grid: a cost that grew faster than the
image would show. The first images of each batch are held against float64.
"""

from __future__ import annotations

from typing import Any

import torch
from cases import case
from measuring import measure, peak_rows
from presets import THREADS, Preset
from recording import Recorder

from convmixer_fast.testing import assert_numerics


def _measure(
    variant: str, side: int | None, batch: int, benchmark: Any, preset: Preset, record: Recorder
) -> None:
    model = case(variant)
    side = side or model.side
    group = f"{variant}, {side} px, batch {batch}"
    record.wanted("resolution", group)
    x = model.images(batch, side)
    torch.set_num_threads(THREADS)
    runs = {"ours": lambda: model.ours(x), "eager NCHW": lambda: model.plain(x)}
    with torch.no_grad():
        one = x[:1]
        assert_numerics(model.ours(x)[:1], model.plain(one), model.oracle(one))
        measured = measure(runs, [THREADS], preset, benchmark)
    rows_, columns = model.arch.grid(side)
    patches = batch * rows_ * columns
    macs = batch * model.arch.macs(side).total
    place = {"model": variant, "side": side, "batch": batch}
    rows = []
    for name in runs:
        row = measured.row(name, THREADS, batch, macs)
        rows.append({**place, **row, "ns / patch": 1e6 * row["ms"] / patches})
    record("resolution", group, [*rows, *({**place, **row} for row in peak_rows(measured))])


def test_side(
    resolution_variant: str, side: int, benchmark: Any, preset: Preset, record: Recorder
) -> None:
    _measure(resolution_variant, side, 1, benchmark, preset, record)


def test_batch(
    resolution_variant: str,
    resolution_batch: int,
    benchmark: Any,
    preset: Preset,
    record: Recorder,
) -> None:
    _measure(resolution_variant, None, resolution_batch, benchmark, preset, record)
