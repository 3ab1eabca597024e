"""Cost by image size and by batch size: ours and eager PyTorch.

The measure is nanoseconds for a patch, one position of the grid: it is constant if the cost is
proportional to the image. The first image of each batch is compared with float64. On a GPU eager
PyTorch runs in both layouts; a size that does not fit into its memory is noted and not timed.
"""

from __future__ import annotations

from typing import Any

import devices
import torch
from cases import case
from competitors import EAGER, build, check_peer, eager
from devices import Device
from measuring import measure
from presets import Preset
from recording import BenchmarkRecorder
from work import of_model

from convmixer_fast.testing import assert_numerics

RIVALS = {"cpu": (EAGER,), "cuda": (EAGER, "eager channels-last")}


def _measure(
    variant: str,
    side: int | None,
    batch: int,
    device: Device,
    benchmark: Any,
    preset: Preset,
    record: BenchmarkRecorder,
) -> None:
    model = case(variant)
    side = side or model.side
    group = f"{variant}, {side} px, batch {batch}"
    group += "" if device.kind == "cpu" else f", {device.label}"
    record.wanted("resolution", group)
    device.enter()
    plain, ours = device.model(model.plain), device.model(model.ours)
    inputs = device.inputs(model.images(batch, side))
    mine = eager(ours, inputs)
    with torch.no_grad():
        one = inputs.first[:1]
        same, exact = plain(one), devices.oracle(plain, one)
        assert_numerics(mine()[:1], same, exact)
        others, _, notes = build(
            RIVALS[device.kind],
            device.kind,
            plain,
            inputs,
            lambda y: check_peer(y[:1], same, exact),
        )
        measured = measure({"ours": mine, **others}, device, preset, benchmark)
    rows_, columns = model.arch.grid(side)
    patches = batch * rows_ * columns
    work = of_model(model.arch, side, batch, device.dtype.itemsize)
    at = {"model": variant, "side": side, "batch": batch}
    rows = []
    for name in ("ours", *others):
        row = measured.row(name, work)
        rows.append({**at, **row, "ns / patch": 1e6 * row["ms"] / patches})
    rows += [{**at, **row} for row in measured.limit_rows()]
    rows += [{**at, **device.columns, "system": name, "note": why} for name, why in notes.items()]
    record("resolution", group, rows)


def test_side(
    resolution_variant: str,
    side: int,
    device: Device,
    benchmark: Any,
    preset: Preset,
    record: BenchmarkRecorder,
) -> None:
    _measure(resolution_variant, side, 1, device, benchmark, preset, record)


def test_batch(
    resolution_variant: str,
    resolution_batch: int,
    device: Device,
    benchmark: Any,
    preset: Preset,
    record: BenchmarkRecorder,
) -> None:
    _measure(resolution_variant, None, resolution_batch, device, benchmark, preset, record)
