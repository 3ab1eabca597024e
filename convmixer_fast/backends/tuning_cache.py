"""The results of `convmixer_fast.tune` on this GPU, kept on disk between processes.

One file for each GPU model, driver, version of torch, Triton and this package: an entry of another
combination is never used. The folder is the platform's cache folder, or ``CONVMIXER_FAST_CACHE``.
Files are replaced as a whole; one that cannot be read is left alone, with a warning, and counts as
empty.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import typing
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import environment
from ..files import whole_or_absent
from .kernel_key import KernelKey
from .triton import configs, support

ENVIRONMENT = "CONVMIXER_FAST_CACHE"
#: Of the files; another number is another format, and not read.
FORMAT = 1

Config = (
    configs.DepthwiseConfig | configs.PointwiseConfig | configs.CudaConfig | configs.ProductConfig
)

_TYPES = {kind.__name__: kind for kind in typing.get_args(Config)}


class TunedEntry(NamedTuple):
    """Who was fastest at a call.

    ``winner``: a backend, an implementation, or the layout in which PyTorch's operators, with both
    conversions, were faster (``channels_last``, ``contiguous``); ``config``: the kernel's tile
    where it is not the shipped one; ``seconds``: of each candidate, whose name begins with such a
    word.
    """

    winner: str
    config: Config | None
    seconds: Mapping[str, float]

    def reason(self) -> str:
        best: dict[str, float] = {}
        for name, seconds in self.seconds.items():
            kind = name.split(" ")[0]
            best[kind] = min(seconds, best.get(kind, seconds))
        return ", ".join(f"{kind} {1e3 * t:.3g} ms" for kind, t in best.items())


def folder() -> Path:
    """Where the files are."""
    named = environment.read("CACHE")
    if named:
        return Path(named).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "convmixer_fast"


@cache
def machine(device: torch.device) -> dict[str, str]:
    """What an entry depends on except the call: the GPU, its driver, and versions."""
    try:
        own = metadata.version("convmixer_fast")
    except metadata.PackageNotFoundError:
        own = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "emulated",
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": support.triton_version(),
        "convmixer_fast": own,
    }


def _driver() -> str:
    with suppress(OSError):
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  ..."
        words = Path("/proc/driver/nvidia/version").read_text().split()
        numbers = [w for w in words if w.count(".") >= 1 and w.replace(".", "").isdigit()]
        if numbers:
            return numbers[0]
    with suppress(AttributeError, RuntimeError):
        return str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]
    return "unknown"


def machine_key(device: torch.device) -> str:
    """`machine` as a part of file names."""
    text = json.dumps(machine(device), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_for(device: torch.device) -> Path:
    return folder() / f"tuned-{machine_key(device)}.json"


_known: dict[Path, dict[str, TunedEntry]] = {}
_lock = threading.Lock()


def forget() -> None:
    """Forget what was read: the next look reads the files again."""
    with _lock:
        _known.clear()
        support.invalidate_routes()
    _file_of.cache_clear()
    machine.cache_clear()


@cache
def _file_of(device: str, environment: str | None) -> Path:
    return file_for(torch.device(device))


def lookup(key: KernelKey, shape: tuple[int, int, int]) -> TunedEntry | None:
    """The entry for exactly this call, or None.

    Args:
        shape: N, H, W of the activations.
    """
    path = _file_of(key.device, os.environ.get(ENVIRONMENT))
    table = _known.get(path)
    if table is None:
        with _lock:
            table = _known.setdefault(path, _read(path))
    return table.get(_key(key, shape)) if table else None


def keep(
    device: torch.device,
    found: Mapping[tuple[KernelKey, tuple[int, int, int]], TunedEntry],
    save: bool = True,
) -> Path:
    """Use entries from now on, and add them to the device's file; returns the file.

    Args:
        save: False leaves the file as it is.

    Raises:
        OSError: it cannot be written; the entries hold for this process all the same.
    """
    path = file_for(device)
    new = {_key(*call): entry for call, entry in found.items()}
    with _lock:
        # What another process wrote meanwhile stays, and so does what is known here alone.
        held = _read(path)
        _known[path] = held | _known.get(path, {}) | new
        support.invalidate_routes()
        if save:
            _write(path, device, held | new)
    return path


def _key(key: KernelKey, shape: tuple[int, int, int]) -> str:
    dtype = str(key.dtype).removeprefix("torch.")
    fields = (key.op, dtype, key.channels, key.out_channels, key.kernel_size, key.act)
    return " ".join(map(str, (*fields, int(key.bias), *shape)))


def _read(path: Path) -> dict[str, TunedEntry]:
    try:
        held = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(path, error)
        return {}
    try:
        if held["format"] != FORMAT:
            return {}
        return {key: _entry(row) for key, row in held["verdicts"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _warn(path, error)
        return {}


def _warn(path: Path, error: Exception) -> None:
    warnings.warn(
        f"{path} is not used, the shipped choices are: {type(error).__name__}: {error}. "
        "Delete it, or let convmixer_fast.tune write it again",
        RuntimeWarning,
        stacklevel=3,
    )


def _entry(row: dict[str, Any]) -> TunedEntry:
    config = None
    if row["config"] is not None:
        fields = dict(row["config"])
        config = _TYPES[fields.pop("type")](**fields)
    return TunedEntry(
        str(row["winner"]), config, {str(k): float(v) for k, v in row["seconds"].items()}
    )


def _row(entry: TunedEntry) -> dict[str, Any]:
    config = entry.config
    held = None if config is None else {"type": type(config).__name__, **asdict(config)}
    return {"winner": entry.winner, "config": held, "seconds": dict(entry.seconds)}


def _write(path: Path, device: torch.device, table: Mapping[str, TunedEntry]) -> None:
    held = {
        "format": FORMAT,
        "machine": machine(device),
        "verdicts": {key: _row(entry) for key, entry in sorted(table.items())},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_absent(path) as file:
        json.dump(held, file, indent=1)
