"""A training step, forward, backward and SGD: our modules beside the plain ones.

While BatchNorm gathers batch statistics the children of our modules run one by one: PyTorch's own
speed is what to expect. Logits and the gradient that comes last, that of the stem, are held against
float64 first.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from cases import case
from measuring import measure
from presets import THREADS, Preset
from recording import Recorder
from torch import Tensor, nn

from convmixer_fast.testing import assert_numerics

#: Small enough that the steps of a measurement leave the weights what they are.
LEARNING_RATE = 1e-9


def _forward_and_backward(model: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the stem's weight."""
    model.zero_grad()
    logits = model(x)
    nn.functional.cross_entropy(logits, target).backward()
    return logits.detach(), model.stem[0].weight.grad.clone()


def test_step(
    variant: str, training_batch: int, benchmark: Any, preset: Preset, record: Recorder
) -> None:
    group = f"{variant}, batch {training_batch}, threads {THREADS}"
    record.wanted("training", group)
    it = case(variant)
    x = it.images(training_batch)
    target = torch.arange(training_batch) % it.arch.num_classes
    torch.set_num_threads(THREADS)
    models = {
        "ours": copy.deepcopy(it.ours).train(),
        "eager NCHW": copy.deepcopy(it.plain).train(),
    }
    exact = _forward_and_backward(copy.deepcopy(models["eager NCHW"]).double(), x.double(), target)
    found = {name: _forward_and_backward(model, x, target) for name, model in models.items()}
    for mine, same, oracle in zip(found["ours"], found["eager NCHW"], exact, strict=True):
        assert_numerics(mine, same, oracle)

    def step(model: nn.Module) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)

        def run() -> None:
            _forward_and_backward(model, x, target)
            optimizer.step()

        return run

    runs = {name: step(model) for name, model in models.items()}
    measured = measure(runs, [], preset, benchmark)
    rows = []
    for name in runs:
        row = measured.row(name, THREADS, training_batch, 0)
        del row["GMAC/s"]  # of a forward pass only we know the multiply-adds
        rows.append({"model": variant, "batch": training_batch, **row})
    record("training", group, rows)
