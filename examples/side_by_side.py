"""A comparison of two models, results first, then speed, as the examples print it."""

from __future__ import annotations

import copy
import statistics

import torch
from torch import Tensor, nn

from convmixer_fast import explain
from convmixer_fast.diagnostics.timing import interleaved_times
from convmixer_fast.testing import assert_numerics


def compare(plain: nn.Module, fast: nn.Module, x: Tensor, rounds: int) -> None:
    """Hold ``fast`` against ``plain``, then time both in turns, and print it.

    Raises:
        AssertionError: ``fast`` is outside the numerics rule.
    """
    with torch.inference_mode():
        exact = copy.deepcopy(plain).double()(x[:1].double())
        print(f"right: {assert_numerics(fast(x)[:1], plain(x[:1]), exact)}")
        print(explain(fast, x))
        runs = {"plain": lambda: plain(x), "fast": lambda: fast(x)}
        median = {n: statistics.median(t) for n, t in interleaved_times(runs, rounds).items()}
    for name, seconds in median.items():
        print(f"{name}: {1e3 * seconds:.1f} ms, {len(x) / seconds:.2f} img/s")
    print(f"speed-up: {median['plain'] / median['fast']:.2f}")
