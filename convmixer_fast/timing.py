"""How long does it take, compared fairly? Calls take turns in one process, on the same inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any


def wall_seconds(run: Callable[[], Any], calls: int) -> float:
    """Seconds of ``calls`` calls of ``run``, one after the other."""
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

    A machine that slows down or is disturbed then does so to all of them.

    Args:
        warmup: calls of each that come first and do not count.
        repeats: how many calls a turn of that name is, 1 where it is not named. Their mean counts;
            one more call before them does not, so that short calls find their own data in the
            caches and not that of the others.
        pause: seconds of rest before each turn, for the threads of the one before: several
            libraries let them spin for a while in the hope of more work.
        clock: what a turn's calls took, in seconds; a device that is still at work when a call
            returns has a clock of its own (`event_clock`).
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

    An event before the first call and one after the last, both on the current stream: what the
    calls launched is timed, from the start of the first kernel to the end of the last, waits for
    the host in between included. Work of earlier turns is waited for first.

    Args:
        cuda: what has ``Event`` and ``synchronize``; None: `torch.cuda`.
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
    """Seconds of each part of one step; a part is called with what the one before returned.

    Args:
        finish: waits until the device is done, before the first reading and the last.
        between: the same after the parts before the last; without it their times are those of
            launching, and only the sum means something.
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
    """Median, 20th and 80th percentile of some times, in seconds."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
    }


def gpu_seconds(run: Callable[[], Any], budget: float = 0.2) -> float:
    """Median seconds that the current GPU needs for what ``run`` launches on its current stream.

    Measured by events on the GPU, each call by itself; before it, a stretch of memory larger than
    the L2 cache is written, so that no call finds its input there, as none does in a network.

    Args:
        budget: about how many seconds of GPU time to spend; at least 5 calls are measured.

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
