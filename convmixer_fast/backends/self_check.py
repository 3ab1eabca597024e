"""The self-check of a GPU kernel, before its first result.

A kernel that was compiled for a device, a dtype and a size for the first time is run on a small
random input and held against PyTorch by the numerics rule (`convmixer_fast.testing`). Where it
disagrees, or cannot be compiled or launched, one warning says so and PyTorch's own operators
compute its calls for as long as the process lives; `explain` and ``convmixer-fast doctor`` show it.
A kernel that moves its tiles by the copy engine (TMA) is tried without it before that, and a
warning says so too. ``CONVMIXER_FAST_VERIFY=0`` switches the check off.

Some faults leave nothing of a process's GPU context. After every caught error the GPU is
synchronized; where that fails, too, `ContextLostError` says so. A kernel that took a context or a
whole process with it in its check is not tried again by later ones (`markers`).

The check waits for the GPU, so it does not run while a CUDA graph is captured: PyTorch computes the
calls of a kernel that comes up there for the first time, until a call outside a capture.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import environment
from . import markers
from .kernel_key import KernelKey
from .triton import support
from .triton.support import is_capturing as is_capturing

ENVIRONMENT = "CONVMIXER_FAST_VERIFY"

#: "" for a kernel that was found right, else the reason for the fallback to PyTorch.
_results: dict[KernelKey, str] = {}
#: The tile that replaces a kernel's own, and what was wrong with that one.
_fallback_tiles: dict[KernelKey, tuple[Any, str]] = {}
_lock = threading.RLock()


class ContextLostError(RuntimeError):
    """The GPU runs nothing more in this process."""


def is_on() -> bool:
    return environment.flag("VERIFY", default=True)


def result(key: KernelKey) -> str | None:
    """``""`` for a kernel that was checked and is right, the reason for one that is PyTorch's, else
    None. What an earlier process left counts, too."""
    known = _results.get(key)
    if known is None and is_on():
        why = markers.left(key)
        if why:
            with _lock:
                if key not in _results:
                    _settle(key, why)
            return _results.get(key)
    return known


def results() -> dict[KernelKey, str]:
    """Every kernel so far, with ``""`` or the reason for the fallback to PyTorch."""
    with _lock:
        return dict(_results)


def fallback_tiles() -> dict[KernelKey, str]:
    """Every kernel that another tile replaces than its own, and what was wrong with that one."""
    with _lock:
        return {key: why for key, (_, why) in _fallback_tiles.items()}


def fallback_tile(key: KernelKey) -> tuple[Any, str]:
    """The tile that replaces the kernel's own, and what was wrong; (None, "") for none."""
    return _fallback_tiles.get(key, (None, ""))


def forget() -> None:
    """Forget every result: the next call of each kernel checks again."""
    with _lock:
        _results.clear()
        _fallback_tiles.clear()
        support.invalidate_routes()


def ready(
    key: KernelKey, check: Callable[[Any], str], plainer: Callable[[], Any] = lambda: None
) -> bool:
    """Whether the kernel of ``key`` is right, the fallback tile's if any; the first call checks it.

    Args:
        check: runs the kernel with a tile (None: its own) against PyTorch; returns ``""`` or what
            is wrong, or raises. `torch.OutOfMemoryError` proves nothing: PyTorch computes this
            call, the next one checks.
        plainer: the tile to try where the kernel's own is not right; None for none.

    Raises:
        ContextLostError: the check, or what ran before it, lost the GPU's context.
    """
    known = result(key)
    if known is not None:
        return not known
    if not is_on():
        return True
    if is_capturing(torch.device(key.device)):
        return False
    # One thread checks; others that need the same kernel wait for its result.
    with _lock:
        known = _results.get(key)
        if known is None:
            # What went wrong before is no fault of the kernel.
            raise_if_lost(torch.device(key.device), f"what ran before the check of {key}")
            try:
                known = _found(key, check, None)
                tile = plainer() if known else None
                if tile is not None and not _found(key, check, tile):
                    _fallback_tiles[key] = (tile, known)
                    _warn(f"the copy engine's form of the kernel for {key} is not used: {known}")
                    known = ""
            except torch.OutOfMemoryError:
                return False
            _settle(key, known)
    return not known


def _found(key: KernelKey, check: Callable[[Any], str], tile: Any) -> str:
    why = left(key, tile)
    if why:
        return why
    try:
        with trying(key, tile):
            return check(tile)
    except (torch.OutOfMemoryError, ContextLostError):
        raise
    except Exception as error:  # whatever a compiler or a driver raises is the finding
        return describe(error)


def _tiled(key: KernelKey, tile: Any) -> KernelKey:
    return key if tile is None else key._replace(tile=str(tile))


@contextmanager
def trying(key: KernelKey, tile: Any = None) -> Iterator[None]:
    """Mark on disk that the kernel of ``key``, with ``tile`` if any, is tried inside the block.

    Raises:
        ContextLostError: the block raised, and the GPU's context is lost. The mark stays.
    """
    key = _tiled(key, tile)
    with markers.marked(key) as marker:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            try:
                raise_if_lost(torch.device(key.device), str(key), error)
            except ContextLostError:
                marker.keep(key, f"the GPU's context was lost in its check: {describe(error)}")
                raise
            raise


def left(key: KernelKey, tile: Any = None) -> str:
    """Why an earlier process says that a kernel is not to be tried; ``""`` where none does."""
    return markers.left(_tiled(key, tile))


def found_right(key: KernelKey, tile: Any = None) -> None:
    """A kernel that an earlier process left a mark of is right after all: remove the mark."""
    markers.clear(_tiled(key, tile))


def raise_if_lost(device: torch.device, what: str, error: BaseException | None = None) -> None:
    """Synchronize a GPU after a caught error: a fault of the context shows there again.

    Nothing is waited for while a CUDA graph is captured.

    Args:
        what: ran there, for the message.

    Raises:
        ContextLostError: it cannot be synchronized.
    """
    if device.type != "cuda" or is_capturing(device):
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as fault:
        if "captur" in str(fault):  # another thread's graph forbids to wait
            return
        raise ContextLostError(
            f"the GPU context of {device} is lost after {what}: {describe(error or fault)}. This "
            "process can run nothing more there: start it again, with CONVMIXER_FAST_BACKEND="
            "reference to go on without kernels"
        ) from (error or fault)


def fail(key: KernelKey, error: BaseException) -> None:
    """A kernel that was right once could not be launched: PyTorch computes its calls from now on.

    Raises:
        ContextLostError: the GPU's context is lost.
    """
    raise_if_lost(torch.device(key.device), f"the launch of {key}", error)
    with _lock:
        if not _results.get(key):
            _settle(key, describe(error))


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


def _settle(key: KernelKey, why: str) -> None:
    _results[key] = why
    support.invalidate_routes()
    if not why:
        return
    tile = f" ({key.tile})" if key.tile else ""
    _warn(f"the kernel for {key}{tile} is not used: {why}")


def _warn(what: str) -> None:
    warnings.warn(
        f"{what}. Its calls are computed in the next best way; "
        "`convmixer-fast doctor --gpu` writes a report to send in",
        RuntimeWarning,
        stacklevel=2,
    )
