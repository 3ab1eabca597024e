"""Whole models: ours and every other system that runs them, on the CPU and on a GPU.

    pytest benchmarks/test_models.py
    pytest benchmarks/test_models.py --preset full --variants 768/32

A group is a model, a batch size and a thread count (on a GPU, a dtype). Its systems take turns in
one process, on the same images. Each output is checked first, on a CPU every image of the batch:
ours by the numerics rule (`convmixer_fast.testing.assert_numerics`), a peer's by
`competitors.check_peer`; one that fails is not timed. The limit is the machine's own, measured in
the same rounds. On a CPU it is multiply-adds of a loop on registers alone; "of peak" counts all
multiply-adds of the model, the depthwise ones included. On a GPU it is three loops
(`devices.Gpu`); "of limit" is the time of `work.Work` at those rates over the measured time.

The allocator has its default settings: new pages for large outputs are part of a model's cost.
"""

from __future__ import annotations

from typing import Any

import devices
import torch
from cases import case, oracle
from competitors import build, check_peer, eager
from devices import Device
from measuring import measure
from presets import Preset
from recording import BenchmarkRecorder
from work import of_model

from convmixer_fast.testing import assert_numerics


def test_model(
    variant: str,
    batch: int,
    threads: int,
    device: Device,
    benchmark: Any,
    preset: Preset,
    record: BenchmarkRecorder,
) -> None:
    group = f"{variant}, batch {batch}, {device.label}"
    record.wanted("models", group)
    model = case(variant)
    device.enter()
    torch._dynamo.reset()
    plain, ours = device.model(model.plain), device.model(model.ours)
    inputs = device.inputs(model.images(batch))
    checked = device.checked(batch)
    if device.kind == "cpu":
        exact = oracle(variant, max(preset.batches))[:batch]
    else:
        exact = devices.oracle(plain, inputs.first[:checked])
    with torch.no_grad():
        same = plain(inputs.first)[:checked]
        mine = eager(ours, inputs)
        errors = {"ours": assert_numerics(mine()[:checked], same, exact)}
        others, found, notes = build(
            preset.systems,
            device.kind,
            plain,
            inputs,
            lambda out: check_peer(out[:checked], same, exact),
        )
        errors |= found
        measured = measure({"ours": mine, **others}, device, preset, benchmark)
    work = of_model(model.arch, model.side, batch, device.dtype.itemsize)
    at = {"model": variant, "batch": batch}
    rows = [
        {
            **at,
            **measured.row(name, work),
            "max error": errors[name].max_error,
            "error / eager's": errors[name].max_error / errors[name].torch_max_error,
        }
        for name in ("ours", *others)
    ]
    rows += [{**at, **row} for row in measured.limit_rows()]
    rows += [{**at, **device.columns, "system": name, "note": note} for name, note in notes.items()]
    record("models", group, rows)
