"""How long does it take, compared fairly? Calls take turns in one process, on the same inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any


def interleaved_times(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    *,
    repeats: Mapping[str, int] = MappingProxyType({}),
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of every call, ``rounds`` for each callable, the callables taking turns.

    A machine that slows down or is disturbed then does so to all of them.

    Args:
        warmup: calls of each that come first and do not count.
        repeats: how many calls a turn of that name is, 1 where it is not named. Their mean counts;
            one more call before them does not, so that short calls find their own data in the
            caches and not that of the others.
        pause: seconds of rest before each turn, for the threads of the one before: several
            libraries let them spin for a while in the hope of more work.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            calls = repeats.get(name, 1)
            if pause:
                time.sleep(pause)
            if calls > 1:
                run()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times[name].append((time.perf_counter() - start) / calls)
    return times


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of some times, in seconds."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
    }
