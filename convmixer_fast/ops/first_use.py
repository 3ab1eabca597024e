"""Does a kernel compute the right numbers on this very GPU? Checked before its first result.

A kernel that was compiled for a device, a dtype and a size for the first time is run on a small
random input and held against PyTorch by the numerics rule (`convmixer_fast.testing`). Where it
disagrees, or cannot be compiled or launched, one warning says so and PyTorch's own operators serve
that case for as long as the process lives; `explain` and ``convmixer-fast doctor`` show it.
A kernel that moves its tiles by the copy engine (TMA) is tried without it before that, and a
warning says so too. ``CONVMIXER_FAST_VERIFY=0`` switches the check off.

The check waits for the GPU, so it does not run while a CUDA graph is captured: a case that comes up
there for the first time is PyTorch's until a call outside a capture.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .. import environment
from ..kernels import support
from .cases import Case

ENVIRONMENT = "CONVMIXER_FAST_VERIFY"

#: "" for a case that was found right, else the reason why PyTorch serves it.
_verdicts: dict[Case, str] = {}
#: The tile that serves a case in the place of its own, and what was wrong with that one.
_retreats: dict[Case, tuple[Any, str]] = {}
_lock = threading.RLock()


def is_on() -> bool:
    return environment.flag("VERIFY", default=True)


def verdict(case: Case) -> str | None:
    """``""`` for a case that was checked and is right, the reason for one that is PyTorch's, else
    None."""
    return _verdicts.get(case)


def results() -> dict[Case, str]:
    """Every case so far, with ``""`` or the reason why PyTorch serves it."""
    with _lock:
        return dict(_verdicts)


def retreats() -> dict[Case, str]:
    """Every case that another tile serves than its own, and what was wrong with that one."""
    with _lock:
        return {case: why for case, (_, why) in _retreats.items()}


def retreat(case: Case) -> tuple[Any, str]:
    """The tile that was found right where the case's own was not, and why; (None, "") for none."""
    return _retreats.get(case, (None, ""))


def forget() -> None:
    """Forget every verdict: the next call of each case checks anew."""
    with _lock:
        _verdicts.clear()
        _retreats.clear()
        support.new_epoch()


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph, when nothing may wait for the GPU."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def ready(
    case: Case, check: Callable[[Any], str], plainer: Callable[[], Any] = lambda: None
) -> bool:
    """Whether a kernel serves ``case``, the one of `retreat` if any; the first time, finds out.

    Args:
        check: runs the kernel with a tile (None: the case's own) beside PyTorch; returns ``""`` or
            what is wrong, or raises. `torch.OutOfMemoryError` proves nothing: PyTorch serves this
            call, the next one checks.
        plainer: the tile to try where the case's own is not right; None for none.
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
                known = _found(check, None)
                tile = plainer() if known else None
                if tile is not None and not _found(check, tile):
                    _retreats[case] = (tile, known)
                    _warn(
                        f"the copy engine's form of the Triton kernel for {case} is not used", known
                    )
                    known = ""
            except torch.OutOfMemoryError:
                return False
            _settle(case, known)
    return not known


def _found(check: Callable[[Any], str], tile: Any) -> str:
    try:
        return check(tile)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver raises is the finding
        return describe(error)


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
    support.new_epoch()
    if not why:
        return
    if case.tile.startswith("cuda "):
        _warn(f"the CUDA kernel ({case.tile[5:]}) for {case} is not used, the next best is", why)
    else:
        _warn(f"the Triton kernel for {case} is not used, PyTorch's own operators are", why)


def _warn(what: str, why: str) -> None:
    warnings.warn(
        f"{what}: {why}. `convmixer-fast doctor --gpu` writes a report to send in",
        RuntimeWarning,
        stacklevel=2,
    )
