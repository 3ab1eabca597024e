"""A training step, forward, backward and SGD: our modules and the plain ones.

While BatchNorm gathers batch statistics the children of our modules run one by one, at PyTorch's
own speed. On a GPU weights are float32, and a lower dtype is that of autocast. Logits and the last
gradient, that of the stem, are compared with float64 first.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import case
from competitors import EAGER, check_peer
from devices import Device
from measuring import measure
from presets import Preset
from recording import BenchmarkRecorder
from torch import Tensor, nn
from work import of_training_step

from convmixer_fast.testing import assert_numerics

#: Small enough that the steps of a measurement hardly change the weights.
LEARNING_RATE = 1e-9


def _forward_and_backward(
    model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the stem's weight; ``dtype`` is that of autocast, if lower."""
    model.zero_grad()
    low = dtype != torch.float32
    with torch.autocast(x.device.type, dtype) if low else contextlib.nullcontext():
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, target)
    loss.backward()
    return logits.detach().to(x.dtype), model.stem[0].weight.grad.clone()


def test_step(
    variant: str,
    training_batch: int,
    device: Device,
    benchmark: Any,
    preset: Preset,
    record: BenchmarkRecorder,
) -> None:
    if device.dtype == torch.float16:
        pytest.skip("float16 trains with a loss scaler, which is not what is measured here")
    group = f"{variant}, batch {training_batch}, {device.label}"
    record.wanted("training", group)
    it = case(variant)
    device.enter()
    # Weights and images stay float32; autocast converts them.
    dtype, wide = device.dtype, torch.float32
    inputs = device.inputs(it.images(training_batch), wide)
    x = inputs.first
    target = torch.arange(training_batch, device=x.device) % it.arch.num_classes
    models = {
        "ours": copy.deepcopy(device.model(it.ours, wide)).train(),
        EAGER: copy.deepcopy(device.model(it.plain, wide)).train(),
    }
    given = dict.fromkeys(models, inputs)
    if device.kind != "cpu":
        twin = copy.deepcopy(models[EAGER]).to(memory_format=torch.channels_last)
        models["eager channels-last"] = twin
        given["eager channels-last"] = inputs.channels_last()
    exact = _forward_and_backward(copy.deepcopy(models[EAGER]).double(), x.double(), target, wide)
    found = {
        name: _forward_and_backward(model, given[name].first, target, dtype)
        for name, model in models.items()
    }
    for name, answers in found.items():
        check = assert_numerics if name == "ours" else check_peer
        for mine, same, oracle in zip(answers, found[EAGER], exact, strict=True):
            check(mine, same, oracle)

    def step(name: str) -> Callable[[], None]:
        model, xs = models[name], given[name]
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)

        def run() -> None:
            _forward_and_backward(model, xs(), target, dtype)
            optimizer.step()

        return run

    measured = measure({name: step(name) for name in models}, device, preset, benchmark)
    work = of_training_step(it.arch, it.side, training_batch)
    at = {"model": variant, "batch": training_batch}
    rows = [{**at, **measured.row(name, work)} for name in models]
    rows += [{**at, **row} for row in measured.limit_rows()]
    record("training", group, rows)
