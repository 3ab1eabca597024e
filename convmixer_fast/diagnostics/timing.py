"""Timing of calls: fair comparisons by taking turns in one process, on the same inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any


def wall_seconds(run: Callable[[], Any], calls: int) -> float:
    """Seconds of ``calls`` consecutive calls of ``run``."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def interleaved_times(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    *,
    repeats: Mapping[str, int] = MappingProxyType({}),
    pause: float = 0.0,
    clock: Callable[[Callable[[], Any], int], float] = wall_seconds,
) -> dict[str, list[float]]:
    """Seconds of every call, ``rounds`` for each callable, the callables taking turns.

    Turns spread any slowdown of the machine over all callables.

    Args:
        warmup: uncounted calls of each callable before the first round.
        repeats: calls in a turn, by name; 1 where absent. Their mean counts. One uncounted call
            precedes them, so that short calls find their own data in the caches.
        pause: seconds before each turn, in which the threads of the previous callable fall asleep:
            several libraries let theirs spin for a while.
        clock: the seconds of a turn's calls. A device that works asynchronously needs its own
            (`event_clock`).
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
            times[name].append(clock(run, calls) / calls)
    return times


def event_clock(cuda: Any = None) -> Callable[[Callable[[], Any], int], float]:
    """A clock for `interleaved_times` that reads the GPU's own time.

    One event precedes the first call and one follows the last, both on the current stream. The
    time runs from the start of the first kernel to the end of the last, waits for the host
    included. The clock first waits for the work of earlier turns.

    Args:
        cuda: a namespace with ``Event`` and ``synchronize``; None: `torch.cuda`.
    """
    if cuda is None:
        from torch import cuda

    def seconds(run: Callable[[], Any], calls: int) -> float:
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        cuda.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3

    return seconds


def timestamps(
    parts: Sequence[Callable[..., Any]],
    finish: Callable[[], None],
    between: Callable[[], None] | None = None,
) -> list[float]:
    """Seconds of each part of one step; a part is called with the previous part's result.

    Args:
        finish: waits until the device is idle, before the first reading and before the last.
        between: waits after every part but the last; without it their times are those of
            launching, and only the sum is meaningful.
    """
    finish()
    readings = [time.perf_counter()]
    handed: tuple[Any, ...] = ()
    for i, part in enumerate(parts):
        handed = (part(*handed),)
        if i == len(parts) - 1:
            finish()
        elif between is not None:
            between()
        readings.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(readings)]


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of times, in seconds."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
    }


def gpu_seconds(run: Callable[[], Any], budget: float = 0.2) -> float:
    """Median seconds of GPU time of what ``run`` launches on the current stream.

    Events on the GPU time each call alone. Before each, memory larger than the L2 cache is
    written, so that no call finds its input there, as in a network.

    Args:
        budget: GPU time to spend, in seconds, approximately; at least 5 calls are measured.

    Raises:
        RuntimeError: there is no GPU.
    """
    import torch

    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        run()

    def measure(calls: int) -> list[float]:
        pairs = []
        for _ in range(calls):
            flush.zero_()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            run()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    first = statistics.median(measure(5))
    return statistics.median(measure(max(5, min(200, round(budget / max(first, 1e-6))))))
