"""What does an image cost as it grows, and as more come at once? Ours beside eager PyTorch.

The measure is nanoseconds for a patch, one position of the grid: a cost that grew faster than the
image would show. The first image of each batch is held against float64. On a GPU eager PyTorch runs
in both layouts; a size that does not fit into its memory is told and not timed.
"""

from __future__ import annotations

from typing import Any

import places
import torch
from cases import case
from measuring import measure
from places import Place
from presets import Preset
from recording import BenchmarkRecorder
from systems import EAGER, build, check_peer, eager
from work import of_model

from convmixer_fast.testing import assert_numerics

RIVALS = {"cpu": (EAGER,), "cuda": (EAGER, "eager channels-last")}


def _measure(
    variant: str,
    side: int | None,
    batch: int,
    place: Place,
    benchmark: Any,
    preset: Preset,
    record: BenchmarkRecorder,
) -> None:
    model = case(variant)
    side = side or model.side
    group = f"{variant}, {side} px, batch {batch}"
    group += "" if place.kind == "cpu" else f", {place.label}"
    record.wanted("resolution", group)
    place.enter()
    plain, ours = place.model(model.plain), place.model(model.ours)
    inputs = place.inputs(model.images(batch, side))
    mine = eager(ours, inputs)
    with torch.no_grad():
        one = inputs.first[:1]
        same, exact = plain(one), places.oracle(plain, one)
        assert_numerics(mine()[:1], same, exact)
        others, _, notes = build(
            RIVALS[place.kind], place.kind, plain, inputs, lambda y: check_peer(y[:1], same, exact)
        )
        measured = measure({"ours": mine, **others}, place, preset, benchmark)
    rows_, columns = model.arch.grid(side)
    patches = batch * rows_ * columns
    work = of_model(model.arch, side, batch, place.dtype.itemsize)
    at = {"model": variant, "side": side, "batch": batch}
    rows = []
    for name in ("ours", *others):
        row = measured.row(name, work)
        rows.append({**at, **row, "ns / patch": 1e6 * row["ms"] / patches})
    rows += [{**at, **row} for row in measured.limit_rows()]
    rows += [{**at, **place.columns, "system": name, "note": why} for name, why in notes.items()]
    record("resolution", group, rows)


def test_side(
    resolution_variant: str,
    side: int,
    place: Place,
    benchmark: Any,
    preset: Preset,
    record: BenchmarkRecorder,
) -> None:
    _measure(resolution_variant, side, 1, place, benchmark, preset, record)


def test_batch(
    resolution_variant: str,
    resolution_batch: int,
    place: Place,
    benchmark: Any,
    preset: Preset,
    record: BenchmarkRecorder,
) -> None:
    _measure(resolution_variant, None, resolution_batch, place, benchmark, preset, record)
