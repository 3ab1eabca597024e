"""How is one group of systems measured? They take turns, beside the machine's own limit."""

from __future__ import annotations

import ctypes
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from presets import Preset

from convmixer_fast import _native
from convmixer_fast.timing import interleaved_times, spread

#: A turn lasts at least that many seconds: shorter calls are repeated within it.
TURN_SECONDS = 0.1
#: Rest before a turn, in seconds. The workers of ONNX Runtime and of OpenMP spin for some
#: milliseconds after their last work, at the cost of whoever comes next.
PAUSE_SECONDS = 0.03
#: How long the loop of multiply-adds runs at its turn, in seconds.
PEAK_SECONDS = 0.1


@dataclass
class Meter:
    """A run that counts what its calls use: cores kept busy, and pages of memory first touched."""

    run: Callable[[], Any]
    wall: float = 0.0
    cpu: float = 0.0
    faults: list[int] = field(default_factory=list)

    def __call__(self) -> None:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        self.run()
        self.wall += time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        self.cpu += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.faults.append(after.ru_minflt - before.ru_minflt)

    def reset(self) -> None:
        self.wall, self.cpu, self.faults = 0.0, 0.0, []


@dataclass(frozen=True)
class Measured:
    """``columns`` by system; ``peak`` by thread count, in multiply-adds a second."""

    columns: dict[str, dict[str, Any]]
    peak: dict[int, float]

    def row(self, system: str, threads: int, images: int, macs: int) -> dict[str, Any]:
        """The columns of one system's row; ``macs`` are the multiply-adds of a call."""
        columns = dict(self.columns[system])
        seconds = columns["ms"] / 1e3
        rates: dict[str, Any] = {"img/s": images / seconds, "GMAC/s": macs / seconds / 1e9}
        if threads in self.peak:
            rates["of peak"] = macs / seconds / self.peak[threads]
        return {"threads": threads, "system": system, **rates, **columns}


def measure(
    runs: Mapping[str, Callable[[], Any]], threads: Sequence[int], preset: Preset, benchmark: Any
) -> Measured:
    """Time ``runs`` in interleaved rounds, beside the peak of each of those thread counts.

    Each run was called once already, by the check of its output. The columns are: ms (median of the
    rounds), p20 ms, p80 ms, rounds, cores (CPU seconds a second: what a thread count comes to) and
    faults (page faults a call, median).
    """
    meters = {name: Meter(run) for name, run in runs.items()}
    first = interleaved_times(meters, rounds=1, warmup=0, pause=PAUSE_SECONDS)
    seconds = {name: times[0] for name, times in first.items()}
    repeats = {name: max(1, math.ceil(TURN_SECONDS / s)) for name, s in seconds.items()}
    round_seconds = sum(s * (repeats[name] + (repeats[name] > 1)) for name, s in seconds.items())
    rounds = min(preset.most_rounds, max(preset.least_rounds, int(preset.budget / round_seconds)))
    # Where no call is short, the round that found it out is as good as the others.
    counts = max(repeats.values()) == 1
    if not counts:
        first = {name: [] for name in first}
        for meter in meters.values():
            meter.reset()
    turns: dict[str, Callable[[], Any]] = dict(meters)
    rates: dict[int, list[float]] = {}
    engine = _native.load()
    if engine is not None:
        rate_of = engine.multiply_add_rate
        for count in threads:
            rates[count] = []
            turns[f"peak, {count}"] = lambda n=count: rates[n].append(rate_of(n, PEAK_SECONDS))
    times = benchmark.pedantic(
        interleaved_times,
        args=(turns, rounds - counts),
        kwargs={"warmup": 0, "repeats": repeats, "pause": PAUSE_SECONDS},
        rounds=1,
    )
    columns = {}
    for name, meter in meters.items():
        measured = spread(first[name] + times[name])
        columns[name] = {
            "ms": 1e3 * measured["median"],
            "p20 ms": 1e3 * measured["p20"],
            "p80 ms": 1e3 * measured["p80"],
            "rounds": rounds,
            "cores": round(meter.cpu / meter.wall, 2),
            "faults": round(statistics.median(meter.faults)),
        }
    medians = {count: statistics.median(found) for count, found in rates.items()}
    benchmark.extra_info.update({name: c["ms"] for name, c in columns.items()})
    return Measured(columns, medians)


def peak_rows(measured: Measured) -> list[dict[str, Any]]:
    """The machine's limit as rows of its own."""
    return [
        {"threads": threads, "system": "peak", "GMAC/s": rate / 1e9, "of peak": 1.0}
        for threads, rate in measured.peak.items()
    ]


def keep_freed_memory(keep: bool = True) -> bool:
    """Tell the C library to keep what is freed and to hand it out again, or to stop that.

    glibc gives large blocks back to the system when they are freed, or not, by rules that move with
    the sizes seen so far; each call then touches its new output page by page, for the first time:
    6 MB of output are 1536 page faults, as long as the kernel's own work. With this setting
    (M_MMAP_MAX=0: no block of its own mapping; M_TRIM_THRESHOLD=-1: the heap never shrinks) every
    system finds its memory warm after its first call; the column ``faults`` shows it.

    Returns whether the C library has such a setting (glibc does; others keep their own rules).
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    # Else glibc's values before any block of a size was freed.
    settings = (
        {trim_threshold: -1, mmap_max: 0} if keep else {trim_threshold: 2**17, mmap_max: 2**16}
    )
    return all(libc.mallopt(name, value) for name, value in settings.items())
