"""Does a kernel compute the right numbers on this very GPU? Checked before its first result.

A kernel that was compiled for a device, a dtype and a size for the first time is run on a small
random input and held against PyTorch by the numerics rule (`convmixer_fast.testing`). Where it
disagrees, or cannot be compiled or launched, one warning says so and PyTorch's own operators serve
that case for as long as the process lives; `explain` and ``convmixer-fast doctor`` show it.
``CONVMIXER_FAST_VERIFY=0`` switches the check off.

The check waits for the GPU, so it does not run while a CUDA graph is captured: a case that comes up
there for the first time is PyTorch's until a call outside a capture.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable

import torch

from .cases import Case

ENVIRONMENT = "CONVMIXER_FAST_VERIFY"

#: "" for a case that was found right, else the reason why PyTorch serves it.
_verdicts: dict[Case, str] = {}
_lock = threading.RLock()


def is_on() -> bool:
    return os.environ.get(ENVIRONMENT, "1") != "0"


def verdict(case: Case) -> str | None:
    """``""`` for a case that was checked and is right, the reason for one that is PyTorch's, else
    None."""
    return _verdicts.get(case)


def results() -> dict[Case, str]:
    """Every case so far, with ``""`` or the reason why PyTorch serves it."""
    with _lock:
        return dict(_verdicts)


def forget() -> None:
    """Forget every verdict: the next call of each case checks anew."""
    with _lock:
        _verdicts.clear()


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph, when nothing may wait for the GPU."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def ready(case: Case, check: Callable[[Case], str]) -> bool:
    """Whether the kernel serves ``case``; the first time, ``check`` finds out.

    Args:
        check: runs the kernel beside PyTorch; returns ``""`` or what is wrong, or raises.
            `torch.OutOfMemoryError` proves nothing: PyTorch serves this call, the next one checks.
    """
    known = _verdicts.get(case)
    if known is not None:
        return not known
    if not is_on():
        return True
    if is_capturing(torch.device(case.device)):
        return False
    # One thread checks; others that need the same kernel wait for its verdict.
    with _lock:
        known = _verdicts.get(case)
        if known is None:
            try:
                known = check(case)
            except torch.OutOfMemoryError:
                return False
            except Exception as error:  # whatever a compiler or a driver raises is the finding
                known = describe(error)
            _settle(case, known)
    return not known


def fail(case: Case, error: BaseException) -> None:
    """A kernel that was right once could not be launched: PyTorch serves ``case`` from now on."""
    with _lock:
        if not _verdicts.get(case):
            _settle(case, describe(error))


def describe(error: BaseException) -> str:
    """An error in one line that is not too long to read.

    Compilers print the source first and the fault last: of a long text both ends are kept, and the
    error that caused it counts.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-175:]}"


def _settle(case: Case, why: str) -> None:
    _verdicts[case] = why
    if why:
        warnings.warn(
            f"the Triton kernel for {case} is not used, PyTorch's own operators are: {why}. "
            "`convmixer-fast doctor --gpu` writes a report to send in",
            RuntimeWarning,
            stacklevel=2,
        )
