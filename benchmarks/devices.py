"""Devices that groups are measured on: their inputs, clocks, limits and memory."""

from __future__ import annotations

import copy
import functools
import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from work import Limits

from convmixer_fast.backends.cpu import native
from convmixer_fast.diagnostics.doctor import cpu_name
from convmixer_fast.diagnostics.timing import event_clock, wall_seconds

Run = Callable[[], Any]
Clock = Callable[[Run, int], float]

#: Seconds that the loop of multiply-adds runs at its turn.
PEAK_SECONDS = 0.1
#: Inputs that take turns are together that many times as large as the L2 cache.
PAST_L2 = 4
#: At most so many copies, which limits the memory of small inputs.
MOST_INPUTS = 256
#: Images of a GPU's batch that are compared with float64, which a GPU computes slowly.
CHECKED = 2


class Inputs:
    """Copies of one input at several addresses, used by the calls in turn.

    A call with ``inputs()`` reads its input from memory and not from the cache that the last call
    filled, if the copies together are larger than that cache.
    """

    def __init__(self, first: Tensor, copies: int = 1) -> None:
        self.all = [first, *(first.clone() for _ in range(copies - 1))]
        self._next = 0

    @property
    def first(self) -> Tensor:
        return self.all[0]

    def __call__(self) -> Tensor:
        x = self.all[self._next]
        self._next = (self._next + 1) % len(self.all)
        return x

    def channels_last(self) -> Inputs:
        twin = copy.copy(self)
        twin.all = [x.contiguous(memory_format=torch.channels_last) for x in self.all]
        return twin


@dataclass
class Meter:
    """A run whose calls are counted, with the memory of its first call."""

    run: Run
    columns: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> None:
        self.run()

    def first_call(self) -> None:
        self()

    def reset(self) -> None: ...

    def found(self) -> dict[str, Any]:
        return self.columns


class Device(Protocol):
    """Interface of a device for `measuring.measure`.

    Attributes:
        kind: "cpu" or "cuda".
        dtype: of parameters and activations.
        columns: of every row of the device.
        label: the same, for the name of a group.
        clock: measures a turn.
        warmup: calls of each system before the first that counts.
        pause: seconds of rest before each turn.
        limit_repeats: calls of a limit's run in one turn.
    """

    kind: str
    dtype: torch.dtype
    columns: dict[str, Any]
    label: str
    clock: Clock
    warmup: int
    pause: float
    limit_repeats: int

    def model(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """A copy of the model on the device, in its dtype or the given one; on a CPU the model."""

    def inputs(self, x: Tensor, dtype: torch.dtype | None = None) -> Inputs:
        """The input on the device, in its dtype or the given one."""

    def checked(self, images: int) -> int:
        """Number of a batch's first images that are compared with float64."""

    def meter(self, run: Run) -> Meter: ...

    def limits(self, threads: Sequence[int]) -> tuple[dict[str, Run], Callable[[Any], Any]]:
        """Runs that take turns with the systems, and a function from their times to `Limits`.

        The limits are keyed by thread count, a GPU's by None.
        """

    def enter(self) -> None:
        """Prepare the process before systems are built."""


def oracle(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output in float64."""
    with torch.no_grad():
        exact: Tensor = copy.deepcopy(model).double()(x.double())
    return exact


# CPU


class CpuMeter(Meter):
    """Counts the cores that calls keep busy, and their page faults."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.reset()

    def __call__(self) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF)
        self.wall += wall_seconds(self.run, 1)
        after = resource.getrusage(resource.RUSAGE_SELF)
        self.cpu += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.faults.append(after.ru_minflt - before.ru_minflt)

    def first_call(self) -> None:
        asked = _forget_peak_memory()
        self()
        if asked:
            self.columns["peak MiB"] = _peak_memory()

    def reset(self) -> None:
        self.wall, self.cpu = 0.0, 0.0
        self.faults: list[int] = []

    def found(self) -> dict[str, Any]:
        return {
            "cores": round(self.cpu / self.wall, 2),
            "faults": round(statistics.median(self.faults)),
            **self.columns,
        }


def _forget_peak_memory() -> bool:
    """Reset the process's peak of memory; False on systems other than Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) / 1024)


class Cpu:
    """The processor with a number of threads, float32."""

    kind = "cpu"
    dtype = torch.float32
    #: The check of a system's output is its first call.
    warmup = 0
    #: The workers of ONNX Runtime and of OpenMP spin for some milliseconds after their last work,
    #: which slows the next system down.
    pause = 0.03
    limit_repeats = 1
    clock = staticmethod(wall_seconds)

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.columns = {"threads": threads}
        self.label = f"threads {threads}"

    def model(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return model

    def inputs(self, x: Tensor, dtype: torch.dtype | None = None) -> Inputs:
        return Inputs(x)

    def checked(self, images: int) -> int:
        return images

    def meter(self, run: Run) -> Meter:
        return CpuMeter(run)

    def limits(self, threads: Sequence[int]) -> tuple[dict[str, Run], Callable[[Any], Any]]:
        engine = native.load()
        rates: dict[int, list[float]] = {}
        runs: dict[str, Run] = {}
        if engine is not None:
            rate_of = engine.multiply_add_rate
            for count in threads:
                rates[count] = []
                runs[f"peak, {count}"] = lambda n=count: rates[n].append(rate_of(n, PEAK_SECONDS))

        def limits(_: Any) -> dict[int | None, Limits]:
            # A GEMM consists of the same multiply-adds.
            medians = {count: statistics.median(found) for count, found in rates.items()}
            return {count: Limits(rate, rate) for count, rate in medians.items()}

        return runs, limits

    def enter(self) -> None:
        torch.set_num_threads(self.threads)

    def name(self) -> str:
        return cpu_name()


# GPU


class GpuMeter(Meter):
    """Reads the peak of the first call from PyTorch's allocator; other allocators are not seen."""

    def __init__(self, run: Run, cuda: Any) -> None:
        super().__init__(run)
        self.cuda = cuda

    def first_call(self) -> None:
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        self()
        self.cuda.synchronize()
        self.columns["peak MiB"] = round(self.cuda.max_memory_allocated() / 2**20)


class Gpu:
    """The current GPU, in one dtype.

    Args:
        dtype: of parameters and activations.
        cuda: the module `torch.cuda`, or a test's fake.
        device: of the tensors.
        matrix_side, copied_bytes: of the loops that measure its limits.
    """

    kind = "cuda"
    #: Clocks rise, and first calls compile, capture and search.
    warmup = 3
    pause = 0.0
    limit_repeats = 4

    def __init__(
        self,
        dtype: torch.dtype,
        cuda: Any = torch.cuda,
        device: str = "cuda",
        matrix_side: int = 8192,
        copied_bytes: int = 1 << 30,
    ) -> None:
        self.dtype, self.cuda, self.device = dtype, cuda, torch.device(device)
        self.matrix_side, self.copied_bytes = matrix_side, copied_bytes
        self.clock: Clock = event_clock(cuda)
        name = str(dtype).removeprefix("torch.")
        self.columns: dict[str, Any] = {"device": self.name(), "dtype": name}
        self.label = f"{name} on the GPU"

    def name(self) -> str:
        return str(self.cuda.get_device_properties(self.cuda.current_device()).name)

    def model(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return copy.deepcopy(model).to(self.device, dtype or self.dtype)

    def inputs(self, x: Tensor, dtype: torch.dtype | None = None) -> Inputs:
        first = x.to(self.device, dtype or self.dtype)
        properties = self.cuda.get_device_properties(self.cuda.current_device())
        l2 = getattr(properties, "L2_cache_size", 0)
        size = max(1, first.numel() * first.element_size())
        # One more: the next copy is the least recently used one.
        return Inputs(first, min(MOST_INPUTS, -(-PAST_L2 * l2 // size) + 1))

    def checked(self, images: int) -> int:
        return min(images, CHECKED)

    def meter(self, run: Run) -> Meter:
        return GpuMeter(run, self.cuda)

    def limits(self, threads: Sequence[int]) -> tuple[dict[str, Run], Callable[[Any], Any]]:
        """GEMMs of square matrices, in float32 and in the dtype, and a copy of memory.

        cuBLAS's float32 GEMM without TF32 is the closest to the rate of multiply-adds that PyTorch
        can run; for float32 without TF32 it is both limits.
        """
        n = self.matrix_side
        make = functools.partial(torch.zeros, device=self.device)
        # Random values: multiplying zeros draws less power and runs at higher clocks.
        wide = torch.randn(n, n, device=self.device)
        own, out = wide.to(self.dtype), make(n, n, dtype=self.dtype)
        exact = make(n, n)
        source, target = (make(self.copied_bytes, dtype=torch.uint8) for _ in range(2))

        def multiply_add() -> None:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            torch.mm(wide, wide, out=exact)
            torch.set_float32_matmul_precision(before)

        runs: dict[str, Run] = {
            "limit, multiply-adds": multiply_add,
            "limit, matrix products": lambda: torch.mm(own, own, out=out),
            "limit, bandwidth": lambda: target.copy_(source),
        }

        def limits(times: dict[str, list[float]]) -> dict[int | None, Limits]:
            seconds = [statistics.median(times[name]) for name in runs]
            work = (n**3, n**3, 2 * self.copied_bytes)
            return {None: Limits(*(amount / s for amount, s in zip(work, seconds, strict=True)))}

        return runs, limits

    def enter(self) -> None:
        return None


def unavailable_reason() -> str:
    """Empty if torch sees a GPU."""
    return "" if torch.cuda.is_available() else "torch sees no GPU"


def gpu(dtype: str) -> Gpu:
    return Gpu(getattr(torch, dtype))
