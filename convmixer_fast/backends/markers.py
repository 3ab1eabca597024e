"""Marks on disk of kernels that are being checked, for the process after one that dies of it.

A kernel with a fault can take the whole process with it, or the GPU's context. So a file says which
kernel is tried before it runs, and goes when the check has ended. The process that wrote it holds a
lock on it, which the system drops with the process: a file without a lock was left
by a process that died over that kernel. Files lie in the folder of `tuning_cache`, one for each
check, named for the machine (GPU, driver, versions, see `tuning_cache.machine`) and the kernel.

Where there is no folder to write to, or no locks (Windows), there are no marks.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from . import tuning_cache
from .kernel_key import KernelKey

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Marker:
    """The mark of one check. Without a file where none can be written."""

    def __init__(self, path: Path | None = None, file: Any = None) -> None:
        self._path, self._file = path, file

    def write(self, **held: Any) -> None:
        if self._file is not None:
            self._file.seek(0)
            self._file.truncate()
            json.dump(held, self._file)
            self._file.flush()
            # On the disk even if the machine has to be switched off.
            os.fsync(self._file.fileno())

    def keep(self, key: KernelKey, why: str) -> None:
        """Leave the mark for later processes, with what was found, though this one lives."""
        with suppress(OSError):
            self.write(kernel=str(key), found=why)
        self._path = None

    def end(self) -> None:
        # The name goes before the lock: a file without a lock is a dead process's.
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        if self._file is not None:
            self._file.close()


@contextmanager
def marked(key: KernelKey) -> Iterator[Marker]:
    """A mark on disk that the kernel of ``key`` runs inside the block, whatever ends the block."""
    marker = _begin(key)
    try:
        yield marker
    finally:
        with suppress(OSError):
            marker.end()


def _begin(key: KernelKey) -> Marker:
    stem = _stem(key)
    if fcntl is None or stem is None:
        return Marker()
    path = tuning_cache.folder() / f"{stem}{uuid.uuid4().hex}.json"
    # Locked before it has the name that others look for.
    hidden, file = path.with_suffix(".tmp"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(hidden, "x", encoding="utf-8")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Marker(file=file).write(kernel=str(key))
        os.replace(hidden, path)
    except OSError:
        if file is not None:
            file.close()
        with suppress(OSError):
            hidden.unlink(missing_ok=True)
        return Marker()
    return Marker(path, file)


def left(key: KernelKey) -> str:
    """Why the kernel of ``key`` is not to be tried: what an earlier process left; else ``""``."""
    stem = _stem(key)
    return next((why for why, _ in _found(stem).values()), "") if stem else ""


def all_left(device: torch.device) -> dict[str, str]:
    """Every kernel of ``device`` that an earlier process left a mark of, in words, and why."""
    stem = _machine_stem(device)
    return {kernel: why for why, kernel in _found(stem).values()} if stem else {}


def clear(key: KernelKey) -> None:
    """Remove what earlier processes left about the kernel of ``key``."""
    stem = _stem(key)
    for path in _found(stem) if stem else ():
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _found(stem: str) -> dict[Path, tuple[str, str]]:
    """The marks of dead processes whose names begin like this: why, and the kernel in words."""
    found: dict[Path, tuple[str, str]] = {}
    try:
        names = sorted(os.listdir(tuning_cache.folder())) if fcntl else []
    except OSError:
        return found
    for name in names:
        if name.startswith(stem) and name.endswith(".json"):
            path = tuning_cache.folder() / name
            held = _read_dead(path)
            if held is not None:
                what = held.get("found", "a process died, or was killed, while it was checked")
                kernel = str(held.get("kernel", "a kernel"))
                found[path] = (f"{what} (delete {path} to try it again)", kernel)
    return found


def _read_dead(path: Path) -> dict[str, Any] | None:
    """What a mark says; None where its process lives and found nothing yet, or has just ended."""
    try:
        with open(path, encoding="utf-8") as file:
            held: dict[str, Any] = dict(json.load(file))
            if "found" not in held:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # A check that ended between the two took the name away first.
            return held if path.exists() else None
    except OSError:
        return None
    except (ValueError, TypeError):  # cut short by a full disk
        return {}


def _machine_stem(device: torch.device) -> str | None:
    try:
        return f"checking-{tuning_cache.machine_key(device)}-"
    except (AssertionError, RuntimeError):  # torch sees no such GPU
        return None


def _stem(key: KernelKey) -> str | None:
    stem = _machine_stem(torch.device(key.device))
    text = " ".join(map(str, key._replace(device="")))
    return stem and f"{stem}{hashlib.sha256(text.encode()).hexdigest()[:16]}-"
