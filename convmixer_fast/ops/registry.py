"""The choice of a backend for an operator, and its reason.

``auto`` takes, for each operator, device and dtype, the fastest backend that can run and falls
through to PyTorch's own operators (``reference``). A backend that is asked for by name and cannot
run raises and says why. The environment variable ``CONVMIXER_FAST_BACKEND`` overrides
`use_backend`, so that a user can switch kernels off in a program that is not theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import environment
from ..backends import self_check, tuning_cache
from ..backends.cpu import native
from ..backends.cuda import native as native_cuda
from ..backends.kernel_key import UINT8_STEM, Case, case_of
from ..backends.stock import reason_stock_is_faster
from ..backends.triton import precision, support
from ..backends.triton.configs import TRITON, CudaConfig, ProductConfig, lookup_order, why_slower

ENVIRONMENT = "CONVMIXER_FAST_BACKEND"
#: From the most general to the most special.
BACKENDS = ("reference", "cpu", "triton", "cuda")

_requested: ContextVar[str] = ContextVar("convmixer_fast_backend", default="auto")
_log: ContextVar[list[Record] | None] = ContextVar("convmixer_fast_log", default=None)
_whole: ContextVar[bool] = ContextVar("convmixer_fast_whole", default=True)
_modes: ContextVar[int] = ContextVar("convmixer_fast_modes", default=0)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


class Choice(NamedTuple):
    """The backend of a call, and why it and no faster one.

    ``memory_format``: the layout in which PyTorch's operators were found to be fastest, if known;
    ``case``, ``config``: the kernel of a call on a GPU.
    """

    backend: str
    reason: str
    memory_format: torch.memory_format | None = None
    case: Case | None = None
    config: tuning_cache.Config | None = None


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
    environment.check()
    asked = os.environ.get(ENVIRONMENT)
    return _check_name(asked.strip().lower(), ENVIRONMENT) if asked else _requested.get()


def available_backends() -> dict[str, str]:
    """Every backend, with ``""`` where it can run on this machine, else the reason why not."""
    return {
        "reference": "",
        "cpu": "" if native.load() else native.why_unavailable(),
        "triton": support.why_not_here(),
        "cuda": native_cuda.why_not_here(),
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
    return "" if native.load() else native.why_unavailable()


_CPU_KERNELS = {
    "mixer_stack": "whole blocks in one C++ call",
    "depthwise_mix": "one C++ kernel",
    "pointwise_mix": "one C++ kernel; channels-last, PyTorch's convolution and one C++ pass",
    UINT8_STEM: "PyTorch normalises, then as pointwise_mix",
}


_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def uses_library_gemm(op: str, dtype: torch.dtype) -> bool:
    """Whether no kernel of ours computes ``op`` whole, but one ends PyTorch's product."""
    return op == "pointwise_mix" and dtype == torch.float64


def _why_not_triton(device: torch.device, dtype: torch.dtype, op: str = "") -> str:
    if dtype not in _TRITON_DTYPES and not uses_library_gemm(op, dtype):
        return (
            "the Triton kernels compute float32, bfloat16 and float16, "
            f"not {str(dtype).removeprefix('torch.')}"
        )
    return support.why_not(device)


def has_gpu_implementation(device: torch.device, dtype: torch.dtype, op: str = "") -> bool:
    """Whether kernels, as far as is known before a call, compute activations like these.

    Under ``auto`` only on a GPU; by name on CPU tensors too, where kernels are emulated.

    Args:
        op: of which operator; by default of both halves of a block. In float64, and where Triton
            cannot run, the pointwise half alone has kernels, and nothing is laid out for it.
    """
    if not support.is_kernel_device(device):
        return False
    asked = requested_backend()
    if asked not in ("triton", "cuda") and (asked != "auto" or not _auto_is_triton(device)):
        return False
    if not _why_not_triton(device, dtype, op):
        return True
    by_cuda = op == "pointwise_mix" and asked != "triton"
    return by_cuda and bool(native_cuda.type_of(dtype)) and not _why_not_cuda(device)


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
    if not has_gpu_implementation(device, dtype):
        return False
    return requested_backend() in ("triton", "cuda") or not _why_slower(op, dtype)


# What torch.compiler.assume_constant_result does, which would import the compiler and Triton here.
compiled_kernels_run._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Call(NamedTuple):
    """The properties of a call that decide about GPU kernels.

    ``shape``: N, H, W; ``verdict``: the entry that `convmixer_fast.tune` made for such calls.
    """

    case: Case
    shape: tuple[int, int, int]
    verdict: tuning_cache.TunedEntry | None


def call_of(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str | None,
    dtype: torch.dtype | None = None,
) -> Call | None:
    """The `Call` of an operator on ``x``; None where no GPU kernel may compute it.

    Args:
        dtype: that is computed in, where it is not that of ``x``.
    """
    if act is None or not support.is_kernel_device(x.device):
        return None
    case = case_of(op, x, weight, bias, act, dtype)
    shape = (x.shape[0], x.shape[2], x.shape[3])
    verdict = None if support.why_not(x.device) else tuning_cache.lookup(case, shape)
    return Call(case, shape, verdict)


def choose(
    op: str, device: torch.device, dtype: torch.dtype, channels: int, call: Call | None = None
) -> Choice:
    """The backend for the operator ``op`` on activations of that device and dtype.

    Args:
        channels: of the result.
        call: of a call on a GPU, what `call_of` makes of it; what was found out about its kernel
            then counts.

    Raises:
        BackendError: the backend asked for by name cannot run, with the reason.
    """
    asked = requested_backend()
    if asked == "reference":
        return Choice("reference", "asked for by name")
    if asked in ("triton", "cuda") or (asked == "auto" and _auto_is_triton(device)):
        return _choose_gpu(asked, op, device, dtype, call)
    why_not_cpu = _why_not_cpu(op, device, dtype)
    if asked == "auto":
        # First the reason for which no kernel would be wanted.
        why_not_cpu = stock_runs(device, dtype, channels) or why_not_cpu
        if why_not_cpu:
            return Choice("reference", f"cpu: {why_not_cpu}")
        return Choice("cpu", _CPU_KERNELS[op])
    _refuse(asked, why_not_cpu)
    return Choice(asked, _named(asked, _CPU_KERNELS[op]))


def _choose_gpu(
    asked: str, op: str, device: torch.device, dtype: torch.dtype, call: Call | None
) -> Choice:
    """`choose` where kernels for GPUs are wanted."""
    case_op = "" if call is None else call.case.op
    why_not = _why_not_triton(device, dtype, case_op)
    if asked == "triton":
        _refuse(asked, why_not)
    also = ""
    if asked == "cuda":
        _refuse(asked, _why_not_cuda(device))
        if call is not None and case_op == "pointwise_mix":
            usable = cuda_candidates(call.case, call.shape)
            if not usable:
                _refuse(asked, "; ".join(dict.fromkeys(_cuda_families(call).values())))
            return _first_trusted(asked, call, usable, "")
        also = "the cuda backend has the 1x1 convolutions only: "
    if why_not:
        if asked == "auto" and call is not None and case_op == "pointwise_mix":
            return _choose_without_triton(call, why_not)
        return Choice("reference", f"{also}triton: {why_not}")
    if call is None:
        return Choice("triton", _named(asked, f"{also}{_TRITON_KERNEL}, {_trust(None)}"))
    verdict = call.verdict
    if verdict is not None and isinstance(verdict.config, CudaConfig):
        # Tuned in another build, or with TF32 allowed.
        usable = cuda_candidates(call.case, call.shape)
        verdict = verdict if verdict.config in usable else None
    tuned = "" if verdict is None else f"; tuned: {verdict.reason()}"
    if asked != "auto":
        tile = None if verdict is None or verdict.winner != "triton" else verdict.config
        if uses_library_gemm(case_op, dtype):
            tile = ProductConfig()
        return _first_trusted(asked, call, [tile], tuned, also)
    if verdict is not None:
        if verdict.winner in _FORMATS:
            return Choice("reference", f"tuned: {verdict.reason()}", _FORMATS[verdict.winner])
        return _first_trusted(asked, call, [verdict.config], tuned)
    if uses_library_gemm(case_op, dtype):
        return _first_trusted(asked, call, [ProductConfig()], f"; {_NOT_FUSED}")
    # What was measured counts for more than what is expected.
    slower = _why_slower(case_op, dtype)
    if slower:
        return _first_trusted(asked, call, [ProductConfig()], f"; expected to be faster: {slower}")
    if case_op != "pointwise_mix" or not (device.type == "cuda" or native_cuda.is_emulated()):
        return _first_trusted(asked, call, [None], "")
    order = lookup_order(support.architecture(device))
    families = _cuda_families(call) if order.kernels != (TRITON,) else {}
    kernels: list[CudaConfig | None] = []
    because = f"; {order.reason}"
    for kernel in order.kernels:
        why = "" if kernel == TRITON else families.get(kernel, native_cuda.why_unavailable())
        if why:
            because += f"; not {kernel}: {why}"
        else:
            kernels.append(None if kernel == TRITON else CudaConfig(kernel))
    return _first_trusted(asked, call, kernels, because)


_TRITON_KERNEL = "one Triton kernel"
_NOT_FUSED = "float64 is multiplied by no kernel of ours"


def _choose_without_triton(call: Call, why_not: str) -> Choice:
    """A 1x1 convolution under ``auto`` where Triton cannot run: a CUDA kernel, else PyTorch.

    Only of those kernels that the architecture's row names: PyTorch's own product is expected to be
    faster than the others.
    """
    why_no_cuda = _why_not_cuda(torch.device(call.case.device))
    if why_no_cuda:
        # A reason that both share, such as no GPU, is given once.
        also = "" if why_no_cuda == why_not else f"; cuda: {why_no_cuda}"
        return Choice("reference", f"triton: {why_not}{also}")
    order = lookup_order(support.architecture(torch.device(call.case.device)))
    families = {name: why for name, why in _cuda_families(call).items() if name in order.kernels}
    usable = [CudaConfig(name) for name, why in families.items() if not why]
    missing = "".join(f"; not {name}: {why}" for name, why in families.items() if why)
    because = f"; {order.reason}; not triton: {why_not}{missing}"
    choice = _first_trusted("auto", call, usable, because)
    if choice.backend != "reference":
        return choice
    bad = f"; {choice.reason}" if choice.reason else ""
    return Choice("reference", f"triton: {why_not}{missing}{bad}; {order.reason}")


def _first_trusted(
    asked: str,
    call: Call,
    kernels: Sequence[tuning_cache.Config | None],
    because: str,
    also: str = "",
) -> Choice:
    """The first of some kernels that was not found to be bad, else PyTorch.

    Raises:
        BackendError: there is none, and a backend was asked for by name.
    """
    bad = []
    for config in kernels:
        case = call.case if config is None else call.case._replace(tile=str(config))
        backend, what = "triton", _TRITON_KERNEL
        if isinstance(config, CudaConfig):
            backend, what = "cuda", f"one CUDA kernel ({config.family})"
        elif isinstance(config, ProductConfig):
            what = "PyTorch's product and one Triton kernel for the rest"
        why = self_check.result(case)
        if why:
            bad.append(f"{config if backend == 'cuda' else backend}: {why}")
            continue
        rest = "".join(f"; not {row}" for row in bad)
        reason = _named(asked, f"{also}{what}, {_trust(case)}{because}{rest}")
        return Choice(backend, reason, None, case, config)
    why_not = "; ".join(bad)
    if asked == "triton" or (asked == "cuda" and not also):
        _refuse(asked, why_not)
    return Choice("reference", also + why_not)


def _why_not_cuda(device: torch.device) -> str:
    """Why the CUDA extension runs nothing on a device; ``""`` where it has kernels for it."""
    if device.type != "cuda" and not native_cuda.is_emulated():
        return f"the tensors are on {device.type}"
    if device.type == "cuda":
        why = support.why_no_gpu(device)
        if why:
            return why
    if native_cuda.load() is None:
        return native_cuda.why_unavailable()
    return native_cuda.why_not_gpu(support.architecture(device))


def cuda_candidates(case: Case, shape: tuple[int, int, int]) -> list[CudaConfig]:
    """The CUDA kernels that can run such calls of a 1x1 convolution, expected to be fast or not."""
    families = _cuda_families(Call(case, shape, None))
    return [CudaConfig(family) for family, why in families.items() if not why]


def _cuda_families(call: Call) -> dict[str, str]:
    """Every family of CUDA kernels for a 1x1 convolution, the best first, with ``""`` or
    why it cannot."""
    device = torch.device(call.case.device)
    why_not = _why_not_cuda(device)
    kind = native_cuda.type_of(call.case.dtype)
    if not why_not and not kind:
        why_not = (
            'float32 is multiplied exactly unless torch.set_float32_matmul_precision("high") '
            "allows TF32"
            if call.case.dtype == torch.float32
            else f"no kernel for {str(call.case.dtype).removeprefix('torch.')}"
        )
    if why_not:
        return dict.fromkeys(native_cuda.FAMILIES, why_not)
    n, h, w = call.shape
    case, found = call.case, {}
    capability = support.architecture(device)
    for family in native_cuda.FAMILIES:
        found[family] = native_cuda.refusal(
            family, capability, kind, n * h * w, case.out_channels, case.channels, case.act
        )
        if not found[family] and family == "wgmma" and not self_check.is_on():
            found[family] = f"not without its check at the first use ({self_check.ENVIRONMENT}=0)"
    return found


_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def _named(asked: str, what: str) -> str:
    return what if asked == "auto" else f"asked for by name: {what}"


def _trust(case: Case | None) -> str:
    if case is not None and self_check.result(case) == "":
        _, why = self_check.fallback_tile(case)
        plain = f", without the copy engine: {why}" if why else ""
        return f"checked against PyTorch{plain}"
    return "to be checked at its first use" if self_check.is_on() else "not checked"


def fall_back(op: str, choice: Choice) -> None:
    """Refuse the fallback from a kernel that failed its self-check if its backend was named.

    Raises:
        BackendError: the kernel's backend was asked for by name.
    """
    if requested_backend() == choice.backend:
        why = self_check.result(choice.case) if choice.case is not None else None
        _refuse(
            choice.backend,
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


def stock_runs(device: torch.device, dtype: torch.dtype, channels: int) -> str:
    """Why ``auto`` leaves activations of that kind to PyTorch, where it is faster.

    ``""`` where it does not, and where a backend was asked for by name.
    """
    why = reason_stock_is_faster(dtype, channels) if device.type == "cpu" else ""
    return why if why and requested_backend() == "auto" else ""


def whole_blocks_run(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether `mixer_stack` computes activations of that device, dtype and width.

    Never raises: where it does not, each half of a block asks for itself.
    """
    if not _whole.get() or stock_runs(device, dtype, channels):
        return False
    return requested_backend() in ("auto", "cpu") and not _why_not_cpu("mixer_stack", device, dtype)


class Record(NamedTuple):
    """One call of a fused module: the module, the operator and the choice."""

    module: nn.Module
    op: str
    choice: Choice
    call: Call | None = None


@contextmanager
def recording(whole_blocks: bool = True, modes: int = 0) -> Iterator[list[Record]]:
    """Collect what fused modules report inside the block.

    Args:
        whole_blocks: False for what a compiler gets to see: each half of a block by itself.
        modes: dispatch modes that the caller sets himself, which watch nothing.
    """
    rows: list[Record] = []
    log, whole, own = _log.set(rows), _whole.set(whole_blocks), _modes.set(modes)
    try:
        yield rows
    finally:
        _log.reset(log)
        _whole.reset(whole)
        _modes.reset(own)


def modes_of_recording() -> int:
    """How many dispatch modes are those of `recording` itself."""
    return _modes.get()


def is_recording() -> bool:
    return _log.get() is not None


def record(module: nn.Module, op: str, choice: Choice, call: Call | None = None) -> None:
    rows = _log.get()
    if rows is not None:
        rows.append(Record(module, op, choice, call))
