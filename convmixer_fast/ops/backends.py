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
from torch import Tensor, nn

from .. import _native
from ..kernels import precision, support
from ..kernels.configs import why_slower
from . import first_use, verdicts
from .cases import UINT8_STEM, Case, case_of

ENVIRONMENT = "CONVMIXER_FAST_BACKEND"
#: From the most general to the most special.
BACKENDS = ("reference", "cpu", "triton", "cuda")

_requested: ContextVar[str] = ContextVar("convmixer_fast_backend", default="auto")
_log: ContextVar[list[Record] | None] = ContextVar("convmixer_fast_log", default=None)
_whole: ContextVar[bool] = ContextVar("convmixer_fast_whole", default=True)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


class Choice(NamedTuple):
    """The backend that serves a call, and why it and no faster one.

    ``memory_format``: the layout in which PyTorch's operators were found to be fastest, if known.
    """

    backend: str
    reason: str
    memory_format: torch.memory_format | None = None


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
        "triton": support.why_not_here(),
        "cuda": "this release has no C++ kernels for GPUs: triton's serve them",
    }


#: Whole blocks convert half precision at their edges, two passes for a stack; for one half of a
#: block that would cost what the kernel gains.
_CPU_DTYPES = {
    "mixer_stack": (torch.float32, torch.bfloat16, torch.float16),
    "depthwise_mix": (torch.float32,),
    "pointwise_mix": (torch.float32,),
    UINT8_STEM: (torch.float32,),
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
    UINT8_STEM: "PyTorch normalises, then as pointwise_mix",
}


_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str:
    if dtype not in _TRITON_DTYPES:
        return (
            "the Triton kernels compute float32, bfloat16 and float16, "
            f"not {str(dtype).removeprefix('torch.')}"
        )
    return support.why_not(device)


def gpu_kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels, as far as is known before a call, serve activations like these.

    Under ``auto`` only on a GPU; by name on CPU tensors too, where kernels are emulated.
    """
    if not support.is_kernel_device(device):
        return False
    asked = requested_backend()
    wanted = asked == "triton" or (asked == "auto" and _auto_is_triton(device))
    return wanted and not _why_not_triton(device, dtype)


def _why_slower(op: str, dtype: torch.dtype) -> str:
    """Why PyTorch is expected to be faster at ``op`` than a kernel; ``""`` where the kernel is."""
    if op != "pointwise_mix":
        return ""
    return why_slower(dtype, precision.dot_precision(dtype) == "tf32")


def _auto_is_triton(device: torch.device) -> bool:
    return device.type != "cpu"


def compiled_kernels_run(device: torch.device, dtype: torch.dtype, op: str = "") -> bool:
    """Whether a compiler is to see our operators, ``op`` among them; asked once while it traces.

    Where no kernel of ours stands behind an operator, plain ones make the faster graph.
    """
    if not gpu_kernels_run(device, dtype):
        return False
    return requested_backend() == "triton" or not _why_slower(op, dtype)


# What torch.compiler.assume_constant_result does, which would import the compiler and Triton here.
compiled_kernels_run._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Call(NamedTuple):
    """What `choose` wants to know of a call that a GPU kernel may serve.

    ``shape``: N, H, W; ``verdict``: what `convmixer_fast.tune` found out about such calls.
    """

    case: Case
    shape: tuple[int, int, int]
    verdict: verdicts.Verdict | None


def call_of(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str | None,
    dtype: torch.dtype | None = None,
) -> Call | None:
    """The `Call` of an operator on ``x``; None where no GPU kernel may serve it.

    Args:
        dtype: that is computed in, where it is not that of ``x``.
    """
    if act is None or not support.is_kernel_device(x.device):
        return None
    case = case_of(op, x, weight, bias, act, dtype)
    shape = (x.shape[0], x.shape[2], x.shape[3])
    verdict = None if support.why_not(x.device) else verdicts.lookup(case, shape)
    if verdict is not None and verdict.config is not None:
        case = case._replace(tile=str(verdict.config))
    return Call(case, shape, verdict)


def choose(op: str, device: torch.device, dtype: torch.dtype, call: Call | None = None) -> Choice:
    """The backend for the operator ``op`` on activations of that device and dtype.

    Args:
        call: of a call on a GPU, what `call_of` makes of it; what was found out about its kernel
            then counts.

    Raises:
        BackendError: the backend asked for by name cannot run, with the reason.
    """
    asked = requested_backend()
    if asked == "reference":
        return Choice("reference", "asked for by name")
    if asked == "triton" or (asked == "auto" and _auto_is_triton(device)):
        why_not = _why_not_triton(device, dtype)
        if not why_not and call is not None:
            why_not = first_use.verdict(call.case) or ""
        if asked == "triton":
            _refuse(asked, why_not)
        if why_not:
            return Choice("reference", f"triton: {why_not}")
        verdict = None if call is None else call.verdict
        if asked == "auto":
            if verdict is not None and verdict.winner != "triton":
                return Choice("reference", f"tuned: {verdict.reason()}", _FORMATS[verdict.winner])
            # What was measured counts for more than what is expected.
            slower = _why_slower(op if call is None else call.case.op, dtype)
            if slower and verdict is None:
                return Choice("reference", f"expected to be faster: {slower}")
        reason = f"one Triton kernel, {_trust(call)}"
        if verdict is not None:
            reason += f"; tuned: {verdict.reason()}"
        return Choice("triton", _named(asked, reason))
    why_not_cpu = _why_not_cpu(op, device, dtype)
    if asked == "auto":
        if why_not_cpu:
            return Choice("reference", f"cpu: {why_not_cpu}")
        return Choice("cpu", _CPU_KERNELS[op])
    _refuse(asked, why_not_cpu if asked == "cpu" else available_backends()[asked])
    return Choice(asked, _named(asked, _CPU_KERNELS[op]))


_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def _named(asked: str, what: str) -> str:
    return what if asked == "auto" else f"asked for by name: {what}"


def _trust(call: Call | None) -> str:
    if call is not None and first_use.verdict(call.case) == "":
        _, why = first_use.retreat(call.case)
        plain = f", without the copy engine: {why}" if why else ""
        return f"checked against PyTorch{plain}"
    return "to be checked at its first use" if first_use.is_on() else "not checked"


def fall_back(op: str, call: Call | None) -> None:
    """PyTorch is to serve a call that `choose` gave to Triton, whose kernel is not to be trusted.

    Raises:
        BackendError: ``triton`` was asked for by name.
    """
    if requested_backend() == "triton":
        why = first_use.verdict(call.case) if call is not None else None
        _refuse(
            "triton",
            why
            or f"the kernel of {op} could not be checked here (a CUDA graph is being captured, or "
            "memory is short): run the model once before",
        )


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
    call: Call | None = None


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


def record(module: nn.Module, op: str, choice: Choice, call: Call | None = None) -> None:
    rows = _log.get()
    if rows is not None:
        rows.append(Record(module, op, choice, call))
