"""Measurement of one group of systems: interleaved rounds, next to the machine's own limits."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from devices import Device
from presets import Preset
from work import Limits, Work

from convmixer_fast.diagnostics.timing import interleaved_times, spread

#: Shortest turn in seconds; shorter calls are repeated within it.
TURN_SECONDS = 0.1


@dataclass(frozen=True)
class Measured:
    """``columns`` by system; ``limits`` by thread count, a GPU's under None."""

    device: Device
    columns: dict[str, dict[str, Any]]
    limits: dict[int | None, Limits]

    def row(self, system: str, work: Work, threads: int | None = None) -> dict[str, Any]:
        """The columns of one system's row; ``work`` is that of a call.

        Args:
            threads: the thread count, if it is not the device's own.
        """
        columns = dict(self.columns[system])
        seconds = columns["ms"] / 1e3
        at = dict(self.device.columns)
        if threads is not None:
            at["threads"] = threads
        rates: dict[str, Any] = {"img/s": work.images / seconds}
        rates["GMAC/s"] = work.macs / seconds / 1e9
        if work.bytes:
            rates["GB/s"] = work.bytes / seconds / 1e9
        limits = self.limits.get(at.get("threads"))
        if limits is not None and limits.bandwidth is None and limits.multiply_add is not None:
            rates["of peak"] = work.macs / seconds / limits.multiply_add
        elif limits is not None and work.bytes:
            rates["of limit"] = work.least_seconds(limits) / seconds
        return {**at, "system": system, **rates, **columns}

    def limit_rows(self) -> list[dict[str, Any]]:
        """The machine's limits as rows of their own."""
        rows: list[dict[str, Any]] = []
        for threads, limits in self.limits.items():
            if threads is not None:
                rate = (limits.multiply_add or 0.0) / 1e9
                rows.append({"threads": threads, "system": "peak", "GMAC/s": rate, "of peak": 1.0})
                continue
            for system, column, rate in (
                ("limit, multiply-adds", "GMAC/s", limits.multiply_add),
                ("limit, matrix products", "GMAC/s", limits.matrix),
                ("limit, bandwidth", "GB/s", limits.bandwidth),
            ):
                if rate is not None:
                    rows.append({**self.device.columns, "system": system, column: rate / 1e9})
        return rows


def measure(
    runs: Mapping[str, Callable[[], Any]],
    device: Device,
    preset: Preset,
    benchmark: Any,
    threads: Sequence[int] | None = None,
) -> Measured:
    """Time ``runs`` in interleaved rounds with the limits of the device.

    Each run was called once already, by the check of its output. The columns are: ms (median of the
    rounds), best ms, p20 ms, p80 ms, rounds, peak MiB (of the process, or of the GPU's allocator,
    while the system ran with everything else loaded), and on a CPU cores (CPU seconds a second)
    and faults (page faults a call, median).

    Args:
        threads: thread counts of a CPU to measure limits for; None: the device's own.
    """
    if threads is None:
        threads = [device.columns["threads"]] if "threads" in device.columns else []
    meters = {name: device.meter(run) for name, run in runs.items()}
    for meter in meters.values():
        for _ in range(device.warmup):
            meter()
    first = interleaved_times(
        {name: meter.first_call for name, meter in meters.items()},
        rounds=1,
        warmup=0,
        pause=device.pause,
        clock=device.clock,
    )
    limit_runs, limits_of = device.limits(threads)
    seconds = {name: times[0] for name, times in first.items()}
    repeats = {name: max(1, math.ceil(TURN_SECONDS / s)) for name, s in seconds.items()}
    round_seconds = sum(s * (repeats[name] + (repeats[name] > 1)) for name, s in seconds.items())
    rounds = min(preset.most_rounds, max(preset.least_rounds, int(preset.budget / round_seconds)))
    # Without short calls the first round is as good as the others.
    counts = max(repeats.values()) == 1
    if not counts:
        first = {name: [] for name in first}
        for meter in meters.values():
            meter.reset()
    repeats |= dict.fromkeys(limit_runs, device.limit_repeats)
    times = benchmark.pedantic(
        interleaved_times,
        args=({**meters, **limit_runs}, rounds - counts),
        kwargs={"warmup": 0, "repeats": repeats, "pause": device.pause, "clock": device.clock},
        rounds=1,
    )
    columns = {}
    for name, meter in meters.items():
        taken = first[name] + times[name]
        measured = spread(taken)
        columns[name] = {
            "ms": 1e3 * measured["median"],
            "best ms": 1e3 * min(taken),
            "p20 ms": 1e3 * measured["p20"],
            "p80 ms": 1e3 * measured["p80"],
            "rounds": rounds,
            **meter.found(),
        }
    return Measured(device, columns, limits_of(times))


def keep_freed_memory(keep: bool = True) -> bool:
    """Make the C library keep freed memory and reuse it, or restore its default.

    glibc returns large freed blocks to the system, or not, by rules that depend on the sizes seen
    so far. Each call may then touch every page of its output for the first time: 6 MB of output are
    1536 page faults, which take as long as the kernel's own work. With this setting
    (M_MMAP_MAX=0: no block of its own mapping; M_TRIM_THRESHOLD=-1: the heap never shrinks) every
    system finds its memory warm after its first call; the column ``faults`` shows it.

    Returns whether the C library has such a setting (glibc does; others keep their own rules).
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    # Otherwise glibc's values before any large block was freed.
    settings = (
        {trim_threshold: -1, mmap_max: 0} if keep else {trim_threshold: 2**17, mmap_max: 2**16}
    )
    return all(libc.mallopt(name, value) for name, value in settings.items())
