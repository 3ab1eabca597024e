"""Who computes an operator? The one place that decides a backend, and says why.

``auto`` takes, for each operator, device and dtype, the fastest backend that can run and falls
through to PyTorch's own operators (``reference``). A backend that is asked for by name and cannot
run raises and says why. The environment variable ``CONVMIXER_FAST_BACKEND`` overrides
`use_backend`, so that a user can switch kernels off in a program that is not theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn

from .. import _native

ENVIRONMENT = "CONVMIXER_FAST_BACKEND"
#: From the most general to the most special.
BACKENDS = ("reference", "cpu", "triton", "cuda")

_requested: ContextVar[str] = ContextVar("convmixer_fast_backend", default="auto")
_log: ContextVar[list[Record] | None] = ContextVar("convmixer_fast_log", default=None)
_whole: ContextVar[bool] = ContextVar("convmixer_fast_whole", default=True)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


class Choice(NamedTuple):
    """The backend that serves a call, and why it and no faster one."""

    backend: str
    reason: str


def _check_name(name: str, where: str) -> str:
    wanted = name.strip().lower() or "auto"
    if wanted != "auto" and wanted not in BACKENDS:
        raise BackendError(f"{where}: unknown backend {name!r}: one of auto, {', '.join(BACKENDS)}")
    return wanted


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ask for a backend by name (or ``"auto"``) inside a ``with`` block, in this thread and task.

    ``CONVMIXER_FAST_BACKEND``, where set, wins.

    Raises:
        BackendError: no backend has that name.
    """
    token = _requested.set(_check_name(name, "use_backend"))
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str:
    """What the environment or `use_backend` asks for: a name in `BACKENDS`, or ``"auto"``."""
    asked = os.environ.get(ENVIRONMENT)
    return _check_name(asked, ENVIRONMENT) if asked else _requested.get()


def available_backends() -> dict[str, str]:
    """Every backend, with ``""`` where it can run on this machine, else the reason why not."""
    return {
        "reference": "",
        "cpu": "" if _native.load() else _native.why_unavailable(),
        "triton": _NOT_IN_RELEASE,
        "cuda": _NOT_IN_RELEASE,
    }


_NOT_IN_RELEASE = "this release has no GPU kernels: PyTorch's own operators serve the GPU"


#: Whole blocks convert half precision at their edges, two passes for a stack; for one half of a
#: block that would cost what the kernel gains.
_CPU_DTYPES = {
    "mixer_stack": (torch.float32, torch.bfloat16, torch.float16),
    "depthwise_mix": (torch.float32,),
    "pointwise_mix": (torch.float32,),
}


def _why_not_cpu(op: str, device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    if dtype not in _CPU_DTYPES[op]:
        return f"the C++ kernels compute in float32, not {str(dtype).removeprefix('torch.')}"
    return "" if _native.load() else _native.why_unavailable()


_CPU_KERNELS = {
    "mixer_stack": "whole blocks in one C++ call",
    "depthwise_mix": "one C++ kernel",
    "pointwise_mix": "one C++ kernel; channels-last, PyTorch's convolution and one C++ pass",
}


def choose(op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend for the operator ``op`` on activations of that device and dtype.

    Raises:
        BackendError: the backend asked for by name cannot run, with the reason.
    """
    asked = requested_backend()
    if asked == "reference":
        return Choice("reference", "asked for by name")
    why_not_cpu = _why_not_cpu(op, device, dtype)
    if asked == "auto":
        if why_not_cpu:
            return Choice("reference", f"cpu: {why_not_cpu}")
        return Choice("cpu", _CPU_KERNELS[op])
    _refuse(asked, why_not_cpu if asked == "cpu" else available_backends()[asked])
    return Choice(asked, f"asked for by name: {_CPU_KERNELS[op]}")


def composed(reason: str) -> Choice:
    """PyTorch's own operators, for what no backend computes as one operator.

    Raises:
        BackendError: the backend asked for by name is not on this machine.
    """
    asked = requested_backend()
    if asked not in ("auto", "reference"):
        _refuse(asked, available_backends()[asked])
    return Choice("reference", reason)


def _refuse(asked: str, why_not: str) -> None:
    if why_not:
        raise BackendError(
            f"backend {asked!r} was asked for but cannot run: {why_not}. "
            f"Use backend 'auto', or unset {ENVIRONMENT}"
        )


def whole_blocks_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `mixer_stack` serves activations of that device and dtype.

    Never raises: where it does not, each half of a block asks for itself.
    """
    if not _whole.get():
        return False
    return requested_backend() in ("auto", "cpu") and not _why_not_cpu("mixer_stack", device, dtype)


class Record(NamedTuple):
    """One call of a fused module: which, what it wanted to compute, and who serves it."""

    module: nn.Module
    op: str
    choice: Choice


@contextmanager
def recording(whole_blocks: bool = True) -> Iterator[list[Record]]:
    """Collect what fused modules report inside the block.

    Args:
        whole_blocks: False for what a compiler gets to see: each half of a block by itself.
    """
    rows: list[Record] = []
    log, whole = _log.set(rows), _whole.set(whole_blocks)
    try:
        yield rows
    finally:
        _log.reset(log)
        _whole.reset(whole)


def is_recording() -> bool:
    return _log.get() is not None


def record(module: nn.Module, op: str, choice: Choice) -> None:
    rows = _log.get()
    if rows is not None:
        rows.append(Record(module, op, choice))
