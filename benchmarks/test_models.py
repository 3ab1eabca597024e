"""Whole models in float32: ours beside everything else that runs them.

    pytest benchmarks/test_models.py
    pytest benchmarks/test_models.py --preset full --variants 768/32

A group is a model, a batch size and a thread count. Its systems take turns in one process, on the
same images. Each output is checked first, every image of the batch: ours by the numerics rule
(`convmixer_fast.testing.assert_numerics`), a peer's by `systems.check_peer`; one that fails is not
timed. The limit is the machine's own: multiply-adds of a loop on registers alone, measured in the
same rounds. "of peak" counts all multiply-adds of the model, the depthwise ones included.

The allocator is left as it is: that large outputs are fresh pages is part of what a model costs.
"""

from __future__ import annotations

from typing import Any

import torch
from cases import case, oracle
from measuring import measure, peak_rows
from presets import Preset
from recording import Recorder
from systems import SYSTEMS, Run, Unavailable, check_peer

from convmixer_fast.testing import ErrorReport, assert_numerics


def test_model(
    variant: str, batch: int, threads: int, benchmark: Any, preset: Preset, record: Recorder
) -> None:
    group = f"{variant}, batch {batch}, threads {threads}"
    record.wanted("models", group)
    model = case(variant)
    x = model.images(batch)
    exact = oracle(variant, max(preset.batches))[:batch]
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    runs: dict[str, Run] = {"ours": lambda: model.ours(x)}
    errors: dict[str, ErrorReport] = {}
    notes: dict[str, str] = {}
    with torch.no_grad():
        same = model.plain(x)
        errors["ours"] = assert_numerics(runs["ours"](), same, exact)
        for name in preset.systems:
            try:
                run = SYSTEMS[name](model.plain, x)
                errors[name] = check_peer(run(), same, exact)
                runs[name] = run
            except Unavailable as reason:
                notes[name] = str(reason)
            except Exception as error:  # whatever keeps a peer from running is the finding
                notes[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        measured = measure(runs, [threads], preset, benchmark)
    macs = batch * model.arch.macs(model.side).total
    place = {"model": variant, "batch": batch}
    rows = [
        {
            **place,
            **measured.row(name, threads, batch, macs),
            "max error": errors[name].max_error,
            "error / eager's": errors[name].max_error / errors[name].torch_max_error,
        }
        for name in runs
    ]
    rows += [{**place, **row} for row in peak_rows(measured)]
    rows += [
        {**place, "threads": threads, "system": name, "note": note} for name, note in notes.items()
    ]
    record("models", group, rows)
