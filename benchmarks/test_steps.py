"""Gain of each step of fusion: one model, from PyTorch's operators to ours, step by step.

Each system is the one before it with one change, in the same rounds, and each meets the numerics
rule. The last one is the model as users have it; on a GPU a CUDA graph follows for small batches.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from typing import Any

import devices
import pytest
import torch
from cases import Case, case, oracle
from competitors import Unavailable, eager, eager_channels_last, ours_as_graph
from devices import Device, Inputs
from measuring import measure
from presets import Preset
from recording import BenchmarkRecorder
from torch import Tensor, nn
from work import of_model

from convmixer_fast import optimize
from convmixer_fast.backends.cpu import native
from convmixer_fast.modules.packing import batch_norm_affine
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
    packed = [native.mixer_pack(*spatial, *channel[1:]) for spatial, channel in halves]
    weights = [channel[0] for _, channel in halves]

    def head(features: Tensor) -> Tensor:
        logits: Tensor = plain.head(features.mean(dim=(2, 3)))
        return logits

    def depthwise_fused() -> Tensor:
        y = plain.stem(x)
        for (spatial, _), block in zip(halves, plain.blocks, strict=True):
            y = block[1:](native.depthwise_mix(y, *spatial, act))
        return head(y)

    def both_fused() -> Tensor:
        y = plain.stem(x)
        for spatial, channel in halves:
            y = native.pointwise_mix(native.depthwise_mix(y, *spatial, act), *channel, act)
        return head(y)

    def stack() -> Tensor:
        return head(native.mixer_stack(plain.stem(x), weights, packed, k, act))

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


def _gpu_steps(plain: nn.Module, ours: nn.Module, inputs: Inputs) -> dict[str, Run]:
    depthwise, both = copy.deepcopy(plain), copy.deepcopy(plain)
    for block in depthwise.blocks:
        block[0] = optimize(block[0])
    for i, block in enumerate(both.blocks):
        both.blocks[i] = optimize(block)
    steps = {
        "eager NCHW": eager(plain, inputs),
        "eager channels-last": eager_channels_last(plain, inputs),
        "depthwise half in one kernel": eager_channels_last(depthwise, inputs),
        "channel half in one kernel": eager_channels_last(both, inputs),
        "stem in one kernel": eager(ours, inputs),
    }
    with contextlib.suppress(Unavailable):
        steps["one CUDA graph"] = ours_as_graph(ours, inputs)
    return steps


def test_steps(
    variant: str,
    step_batch: int,
    device: Device,
    benchmark: Any,
    preset: Preset,
    record: BenchmarkRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_cpu = device.kind == "cpu"
    if on_cpu and native.load() is None:
        pytest.skip(native.why_unavailable())
    group = f"{variant}, batch {step_batch}, {device.label}"
    record.wanted("steps", group)
    # The steps set it; the fixture restores it.
    monkeypatch.setenv(STRASSEN, "1")
    model = case(variant)
    device.enter()
    inputs, checked = device.inputs(model.images(step_batch)), device.checked(step_batch)
    plain = device.model(model.plain)
    some = inputs.first[:checked]
    exact = oracle(variant, step_batch) if on_cpu else devices.oracle(plain, some)
    with torch.no_grad():
        if on_cpu:
            runs = _steps(model, inputs.first)
        else:
            runs = _gpu_steps(plain, device.model(model.ours), inputs)
        same = plain(inputs.first)[:checked]
        for run in runs.values():
            assert_numerics(run()[:checked], same, exact)
        measured = measure(runs, device, preset, benchmark)
    work = of_model(model.arch, model.side, step_batch, device.dtype.itemsize)
    at = {"model": variant, "batch": step_batch}
    rows = [{**at, **measured.row(name, work)} for name in runs]
    record("steps", group, [*rows, *({**at, **row} for row in measured.limit_rows())])
