"""What does each step of fusion buy? One model, from PyTorch's operators to ours, step by step.

Each system is the one before it with one thing changed, in the same rounds, and each keeps the
numerics rule. The last is the model as it is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, case, oracle
from measuring import measure, peak_rows
from presets import BATCH, THREADS, Preset
from recording import Recorder
from torch import Tensor

from convmixer_fast import _native
from convmixer_fast.ops.packing import batch_norm_affine
from convmixer_fast.testing import assert_numerics

STRASSEN = "CONVMIXER_FAST_STRASSEN"
Run = Callable[[], Tensor]


def _steps(model: Case, x: Tensor) -> dict[str, Run]:
    plain, arch = model.plain, model.arch
    act, k = arch.act or "gelu", arch.kernel_size
    halves: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    for residual, pointwise, _, second in plain.blocks:
        depthwise, _, first = residual.fn
        halves.append(
            (
                (depthwise.weight, depthwise.bias, *batch_norm_affine(first, x.dtype)),
                (pointwise.weight, pointwise.bias, *batch_norm_affine(second, x.dtype)),
            )
        )
    packed = [_native.mixer_pack(*spatial, *channel[1:]) for spatial, channel in halves]
    weights = [channel[0] for _, channel in halves]

    def head(features: Tensor) -> Tensor:
        logits: Tensor = plain.head(features.mean(dim=(2, 3)))
        return logits

    def depthwise_fused() -> Tensor:
        y = plain.stem(x)
        for (spatial, _), block in zip(halves, plain.blocks, strict=True):
            y = block[1:](_native.depthwise_mix(y, *spatial, act))
        return head(y)

    def both_fused() -> Tensor:
        y = plain.stem(x)
        for spatial, channel in halves:
            y = _native.channel_mix(_native.depthwise_mix(y, *spatial, act), *channel, act)
        return head(y)

    def stack() -> Tensor:
        return head(_native.mixer_stack(plain.stem(x), weights, packed, k, act))

    def with_levels(levels: str, run: Run) -> Run:
        def call() -> Tensor:
            os.environ[STRASSEN] = levels
            return run()

        return call

    return {
        "eager NCHW": lambda: plain(x),
        "depthwise half in one kernel": with_levels("0", depthwise_fused),
        "channel half in one kernel": with_levels("0", both_fused),
        "all blocks in one call": with_levels("0", stack),
        "one level of Strassen": with_levels("1", stack),
        "stem in one kernel": with_levels("1", lambda: model.ours(x)),
    }


def test_steps(
    variant: str, benchmark: Any, preset: Preset, record: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    if _native.load() is None:
        pytest.skip(_native.why_unavailable())
    group = f"{variant}, batch {BATCH}, threads {THREADS}"
    record.wanted("steps", group)
    # The steps set it; the fixture puts back what was there.
    monkeypatch.setenv(STRASSEN, "1")
    model = case(variant)
    x = model.images(BATCH)
    exact = oracle(variant, BATCH)
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        runs = _steps(model, x)
        same = model.plain(x)
        for run in runs.values():
            assert_numerics(run(), same, exact)
        measured = measure(runs, [THREADS], preset, benchmark)
    macs = BATCH * model.arch.macs(model.side).total
    place = {"model": variant, "batch": BATCH}
    rows = [{**place, **measured.row(name, THREADS, BATCH, macs)} for name in runs]
    record("steps", group, [*rows, *({**place, **row} for row in peak_rows(measured))])
