"""Fake of `torch.cuda` for the benchmarks: a GPU with a queue of its own, on CPU tensors.

Work launched on it is not done when the launch returns: it waits in a queue with its own clock, as
on a GPU, and only events and `synchronize` see that clock.

As a plugin (``pytest -p fakes.torch_cuda benchmarks/...``) it makes the suites find a GPU whose
kernels are PyTorch's own on the CPU, in small loops.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

NAME = "Fake GPU 3000"


class FakeTorchCuda:
    """`torch.cuda` of one GPU.

    Args:
        l2: bytes of its cache.
        real: events read the process's own clock, for work that is done when its launch returns.
    """

    def __init__(self, l2: int = 4096, real: bool = False) -> None:
        self.l2, self.real = l2, real
        #: Clocks in seconds: the host's, and the time at which the queue is empty.
        self.host = self.queue = 0.0
        self.synchronized = 0
        self.allocated = self.peak = 0
        owner = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing, "an event without timing cannot be read"
                self.at: float | None = None

            def record(self) -> None:
                owner.queue = max(owner.queue, owner.host)
                self.at = time.perf_counter() if owner.real else owner.queue

            def elapsed_time(self, end: Event) -> float:
                assert self.at is not None
                assert end.at is not None
                assert owner.real or owner.host >= end.at, "read before the GPU reached it"
                return 1e3 * (end.at - self.at)

        self.Event = Event

    def launch(self, seconds: float, host_seconds: float = 0.0) -> None:
        """Queue work of so many seconds; the launch returns after ``host_seconds``."""
        self.host += host_seconds
        self.queue = max(self.queue, self.host) + seconds

    def synchronize(self) -> None:
        self.synchronized += 1
        self.host = max(self.host, self.queue)

    def allocate(self, count: int) -> None:
        """Allocate bytes; a negative count frees them."""
        self.allocated += count
        self.peak = max(self.peak, self.allocated)

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.allocated

    def max_memory_allocated(self) -> int:
        return self.peak

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, index: int) -> SimpleNamespace:
        assert index == 0
        return SimpleNamespace(name=NAME, L2_cache_size=self.l2)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: Any) -> None:
    """Install the fake before the ``conftest.py`` of the benchmarks looks for a GPU."""
    import devices
    import torch

    def gpu(dtype: str) -> devices.Gpu:
        cuda = FakeTorchCuda(l2=1 << 20, real=True)
        return devices.Gpu(getattr(torch, dtype), cuda, "cpu", matrix_side=64, copied_bytes=1 << 16)

    devices.unavailable_reason = lambda: ""
    devices.gpu = gpu
