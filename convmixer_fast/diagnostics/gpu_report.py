"""Errors and times of every operator on this GPU: one JSON file, made to be sent in.

``convmixer-fast doctor --gpu`` writes it. Each operator has a process of its own, so that a fault
of one does not take the others. The file holds the GPU's name and limits, versions, and a row for
each operator, dtype and published width: errors against float64 next to PyTorch's own, and
times next to PyTorch's in both layouts. No paths, no names of hosts or users.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..arch import VARIANTS
from ..backends import self_check, tuning_cache
from ..backends.kernel_key import KernelKey
from ..backends.layout import in_layout
from ..backends.triton import precision
from ..backends.triton.support import on_device
from ..backends.tuning_cache import Config
from ..files import write_whole
from ..ops import BackendError, execution
from ..ops.depthwise import DEPTHWISE
from ..ops.pointwise import PATCH_EMBED, POINTWISE
from ..ops.registry import (
    OPERATORS,
    Call,
    Implementation,
    Operator,
    implementation_of,
    implementations,
)
from ..ops.stem import PATCH_EMBED_UINT8
from .timing import gpu_seconds
from .tune import LAYOUTS, reason_nothing_compiles

FORMAT = 1
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BATCHES = (1, 64)
#: The name of the times of a tile that took the place of a wrong one.
WITHOUT_TMA = "triton without TMA"
#: Seconds after which a process that works on one row is taken for hung.
PATIENCE = 600.0


class Problem(NamedTuple):
    """One operator of a published variant at its own image size."""

    variant: str
    op: str
    dtype: torch.dtype
    #: N, H, W of the activations; C and D channels; k of the convolution.
    shape: tuple[int, int, int]
    channels: int
    out_channels: int
    kernel_size: int
    act: str

    def case(self, device: torch.device) -> KernelKey:
        n, h, w = self.shape
        k, operator = self.kernel_size, self.operator()
        one = torch.empty((), dtype=self.dtype, device=device)
        with FakeTensorMode():  # contiguous, as images come
            x = torch.empty((n, self.channels, h, w), dtype=self.pixels(), device=device)
        weight = one.expand(self.out_channels, self.inputs(), k, k)
        return operator.key_of(x, weight, one.expand(self.out_channels), self.act, self.dtype)

    def operator(self) -> Operator:
        return OPERATORS[self.op]

    def pixels(self) -> torch.dtype:
        return torch.uint8 if self.operator() is PATCH_EMBED_UINT8 else self.dtype

    def inputs(self) -> int:
        """Channels that each output is a sum over."""
        return 1 if self.operator().depthwise else self.channels

    def outputs(self) -> int:
        n, h, w = self.shape
        stride = self.kernel_size if self.operator().strided else 1
        return n * (h // stride) * (w // stride) * self.out_channels

    def macs(self) -> int:
        return self.outputs() * self.inputs() * self.kernel_size**2

    def bytes(self) -> int:
        """Read and written once: activations in, out, and the weight."""
        n, h, w = self.shape
        weight = self.out_channels * self.inputs() * self.kernel_size**2
        pixels = self.pixels().itemsize * n * h * w * self.channels
        return pixels + self.dtype.itemsize * (self.outputs() + weight)


def problems(
    dtypes: Iterable[torch.dtype] = DTYPES, batches: Iterable[int] = BATCHES
) -> Iterator[Problem]:
    """Every operator of every published variant, in each dtype and batch size."""
    batches = tuple(batches)
    for dtype in dtypes:
        for variant in VARIANTS.values():
            arch = variant.arch
            size = variant.input_size[1:]
            grid = arch.grid(size)
            act = arch.act or "gelu"
            for n in batches:
                at = (n, *grid)
                for stem in (PATCH_EMBED, PATCH_EMBED_UINT8):
                    yield Problem(
                        *(variant.paper_name, stem.key, dtype, (n, *size)),
                        *(arch.in_chans, arch.dim, arch.patch_size, act),
                    )
                yield Problem(
                    *(variant.paper_name, DEPTHWISE.key, dtype, at),
                    *(arch.dim, arch.dim, arch.kernel_size, act),
                )
                yield Problem(
                    *(variant.paper_name, POINTWISE.key, dtype, at), *(arch.dim, arch.dim, 1, act)
                )


def report(
    device: torch.device | None = None,
    *,
    which: Iterable[Problem] | None = None,
    timer: Callable[[Callable[[], Any]], float] = gpu_seconds,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Check and time every operator on a GPU; takes some minutes, most of them for compiling.

    Args:
        device: the current GPU by default.
        which: `problems` by default.
        timer: seconds of a call; on a GPU a function that a process of its own can import.
        progress: gets a line for each row.

    Returns:
        What the module's docstring says, ready for JSON. A kernel that fails is a row with a
        ``reason``. Where a tile that the copy engine (TMA) moves is not right, ``substitute`` says
        whether the one without it is, which is then used and timed.

    Raises:
        BackendError: no GPU kernels can run here, with the reason.
    """
    device = torch.device("cuda") if device is None else device
    why_not = reason_nothing_compiles(device)
    if why_not:
        raise BackendError(f"there is no GPU to report on: {why_not}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    chosen = problems() if which is None else which
    run = partial(_row, device=device, timer=timer)
    rows = []
    # What emulates a GPU is in this process alone.
    for row in isolated(chosen, run) if device.type == "cuda" else map(run, chosen):
        rows.append(row)
        progress(line(row))
    return {
        "format": FORMAT,
        "machine": tuning_cache.machine(device) | _limits(device),
        "tf32": dict(zip(("matmul", "convolutions"), precision.settings(), strict=True)),
        "rows": rows,
    }


def _limits(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.system()}
    if device.type != "cuda":
        return found
    p = torch.cuda.get_device_properties(device)
    return found | {
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": getattr(p, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
    }


def isolated(
    problems: Iterable[Problem], run: Callable[[Problem], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The row of each problem, made by a process of its operator.

    A process that made a row with a ``reason`` makes no other: its GPU context may be lost. Of one
    that dies or hangs, the row says so.

    Args:
        run: makes a row; picklable.
    """
    workers: dict[str, _Worker] = {}
    try:
        for problem in problems:
            worker = workers.get(problem.op) or _Worker(run)
            workers[problem.op] = worker
            row = worker.row(problem)
            if "reason" in row:
                workers.pop(problem.op).end()
            yield row
    finally:
        for worker in workers.values():
            worker.end()


class _Worker:
    """A process that makes rows, one at a time."""

    def __init__(self, run: Callable[[Problem], dict[str, Any]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, run), daemon=True)
        self._process.start()
        theirs.close()

    def row(self, problem: Problem) -> dict[str, Any]:
        try:
            self._pipe.send(problem)
            if self._pipe.poll(PATIENCE):
                row: dict[str, Any] = self._pipe.recv()
                return row
            why = f"no answer in {PATIENCE:.0f} s"
        except (EOFError, OSError):
            self._process.join(PATIENCE)
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            why = f"its process ended by {how}"
        return _described(problem) | {"ok": False, "reason": why}

    def end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()


def _work(pipe: Any, run: Callable[[Problem], dict[str, Any]]) -> None:
    while True:
        try:
            problem = pipe.recv()
        except EOFError:
            return
        pipe.send(run(problem))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the others need the room


def _described(problem: Problem) -> dict[str, Any]:
    return problem._asdict() | {
        "dtype": str(problem.dtype).removeprefix("torch."),
        "shape": list(problem.shape),
        "macs": problem.macs(),
        "bytes": problem.bytes(),
        "seconds": {},
    }


@torch.no_grad()
def _row(
    problem: Problem, device: torch.device, timer: Callable[[Callable[[], Any]], float]
) -> dict[str, Any]:
    with on_device(device):
        return _checked_and_timed(problem, problem.case(device), timer)


def _checked_and_timed(
    problem: Problem, case: KernelKey, timer: Callable[[Callable[[], Any]], float]
) -> dict[str, Any]:
    fused = implementation_of(case, None)
    row = _described(problem) | _errors(fused, case, None)
    # A speed of wrong numbers is none. Where the copy engine's form is wrong, users get another.
    right: dict[str, Config | None] = {fused.name: None} if row["ok"] else {}
    tile = None if row["ok"] else fused.plainer(case, None)
    if tile is not None:
        row["substitute"] = {"tile": str(tile)} | _errors(fused, case, tile)
        if row["substitute"]["ok"]:
            right[WITHOUT_TMA] = tile
    operator = problem.operator()
    try:
        operands = execution.sample(case, problem.shape)
        for name, config in right.items():
            with self_check.trying(case, config):
                row["seconds"][name] = timer(execution.launcher(fused, operands, config))
        row["others"] = _others(problem, case, operands, timer, row["seconds"])
        wanted = operator.result_format(*operands[:2])
        for name, memory_format in LAYOUTS.items():
            arguments = (memory_format, wanted, operator.reference, *operands)
            row["seconds"][name] = timer(lambda arguments=arguments: in_layout(*arguments))  # type: ignore[misc]
    except Exception as error:  # whatever a broken kernel raises is the finding
        row |= {"ok": False, "reason": row.get("reason", self_check.describe(error))}
    return row


def _errors(
    implementation: Implementation, case: KernelKey, config: Config | None
) -> dict[str, Any]:
    """Whether the kernel with that tile is right, and its errors, or the reason why it failed."""
    try:
        with self_check.trying(case, config):
            errors = execution.measure_errors(implementation, case, config)
    except Exception as error:  # as above
        return {"ok": False, "reason": self_check.describe(error)}
    if errors.ok:
        self_check.found_right(case, config)
    return {
        "ok": errors.ok,
        "max_error": errors.max_error,
        "rms_error": errors.rms_error,
        "torch_max_error": errors.torch_max_error,
        "torch_rms_error": errors.torch_rms_error,
        "max_bar": errors.max_bar,
        "rms_bar": errors.rms_bar,
    }


def _others(
    problem: Problem,
    case: KernelKey,
    operands: list[Any],
    timer: Callable[[Callable[[], Any]], float],
    seconds: dict[str, float],
) -> dict[str, str]:
    """The other implementations: seconds of those that are right, and the faults."""
    operator, device = problem.operator(), torch.device(case.device)
    call = Call(operator, device, case.dtype, case.out_channels, case, problem.shape)
    faults: dict[str, str] = {}
    for other in implementations(operator):
        config = other.config
        if config is None or not other.compiles_for(device) or other.unavailable(call):
            continue
        try:
            with self_check.trying(case, config):
                faults[str(config)] = execution.check(other, case, config)
                if not faults[str(config)]:
                    seconds[str(config)] = timer(execution.launcher(other, operands, config))
        except Exception as error:  # as above
            faults[str(config)] = self_check.describe(error)
    return {name: why for name, why in faults.items() if why}


def line(row: dict[str, Any]) -> str:
    """A row as text: operator, shape, errors or what went wrong, times, rates of ours."""
    n, h, w = row["shape"]
    what = (
        f"{row['op']:<17} {row['variant']:<8} {row['dtype']:<8} {n} x {row['channels']} x {h} x {w}"
    )
    if "max_error" in row:
        verdict = "ok" if row["ok"] else "WRONG"
        found = (
            f"{verdict}, max error {row['max_error']:.1e} (PyTorch {row['torch_max_error']:.1e})"
        )
    else:
        found = "no result"
    for name, why in row.get("others", {}).items():
        found += f", {name} NOT RIGHT: {why}"
    if "reason" in row:
        found += f", FAILED: {row['reason']}"
    if "substitute" in row:
        plain = row["substitute"]
        found += ", without TMA " + ("ok" if plain["ok"] else plain.get("reason", "WRONG too"))
    times = ", ".join(f"{name} {1e3 * t:.3g} ms" for name, t in row["seconds"].items())
    ours = row["seconds"].get("triton", row["seconds"].get(WITHOUT_TMA))
    if ours:
        times += (
            f" ({2e-12 * row['macs'] / ours:.3g} TFLOP/s, {1e-9 * row['bytes'] / ours:.3g} GB/s)"
        )
    return f"{what}: {found}; {times}" if times else f"{what}: {found}"


def write(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """The report as a JSON file, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before is left.
    """
    write_whole(path, json.dumps(report, indent=1) + "\n")


def healthy(report: dict[str, Any]) -> bool:
    """Whether every operator computes right numbers."""
    return all(row["ok"] and not row.get("others") for row in report["rows"])
