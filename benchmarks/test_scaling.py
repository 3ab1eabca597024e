"""Our own model against itself: small batches, more threads, larger images, in the same rounds."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case, case
from devices import Cpu
from measuring import measure
from presets import BATCH, LARGE_SIDE, THREADS, Preset
from recording import BenchmarkRecorder
from torch import Tensor
from work import of_model

from convmixer_fast.testing import assert_numerics

#: (batch, threads); the others are compared with the first.
POINTS = ((BATCH, THREADS), (1, THREADS), (BATCH, 1), (1, 1))


def _check(model: Case, x: Tensor, images: int) -> None:
    """Check the first images of the batch by the numerics rule."""
    some = x[:images]
    with torch.no_grad():
        assert_numerics(model.ours(x)[:images], model.plain(some), model.oracle(some))


def test_batches_and_threads(
    variant: str, benchmark: Any, preset: Preset, record: BenchmarkRecorder
) -> None:
    record.wanted("scaling", variant)
    model = case(variant)
    inputs = {batch: model.images(batch) for batch, _ in POINTS}

    def run(batch: int, threads: int) -> Tensor:
        torch.set_num_threads(threads)
        return model.ours(inputs[batch])

    for batch, threads in POINTS:
        torch.set_num_threads(threads)
        _check(model, inputs[batch], 1)
    runs = {f"{b}, {t}": (lambda b=b, t=t: run(b, t)) for b, t in POINTS}
    with torch.no_grad():
        counts = sorted({t for _, t in POINTS})
        measured = measure(runs, Cpu(THREADS), preset, benchmark, counts)
    rows = [
        {
            "model": variant,
            "batch": batch,
            **measured.row(f"{batch}, {threads}", of_model(model.arch, model.side, batch), threads),
            "system": "ours",
        }
        for batch, threads in POINTS
    ]
    record("scaling", variant, [*rows, *({"model": variant, **r} for r in measured.limit_rows())])


def test_large_image(
    large_variant: str, benchmark: Any, preset: Preset, record: BenchmarkRecorder
) -> None:
    """One large image against a batch of the usual size with about the same work.

    Work is counted in patches: 2048 pixels and patches of 14 are a grid of 146 x 146, compared with
    83 grids of 16 x 16. The measure is nanoseconds for a patch, which removes the remaining
    difference of 0.3 %.
    """
    group = f"{large_variant}, {LARGE_SIDE} pixels"
    record.wanted("scaling", group)
    model = case(large_variant)

    def patches(side: int) -> int:
        rows, columns = model.arch.grid(side)
        return rows * columns

    batches = {LARGE_SIDE: 1, model.side: round(patches(LARGE_SIDE) / patches(model.side))}
    inputs = {side: model.images(batch, side) for side, batch in batches.items()}
    torch.set_num_threads(THREADS)
    for x in inputs.values():
        _check(model, x, min(len(x), 4))
    runs = {str(side): (lambda x=x: model.ours(x)) for side, x in inputs.items()}
    with torch.no_grad():
        measured = measure(runs, Cpu(THREADS), preset, benchmark)
    rows = []
    for side, batch in batches.items():
        row = measured.row(str(side), of_model(model.arch, side, batch))
        row |= {"system": "ours", "ns / patch": 1e6 * row["ms"] / (batch * patches(side))}
        rows.append({"model": large_variant, "batch": batch, "side": side, **row})
    rows += [{"model": large_variant, **row} for row in measured.limit_rows()]
    record("scaling", group, rows)
