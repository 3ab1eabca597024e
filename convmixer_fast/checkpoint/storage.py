"""Files of weights: safetensors and PyTorch's pickles, opened without running their code.

Files are recognised by their first bytes, never by their names. Pickles go through PyTorch's
weights-only loader, which refuses every global that it does not know. Training scripts store
numbers, dates, paths and settings next to the tensors; `SAFE_GLOBALS` makes these known:

* NumPy's arrays and scalars load as themselves, since arrays may be the weights.
* Containers load as a plain dict or list, since weights may be inside.
* All else loads as `Inert`, whatever its arguments: its own constructor never runs.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .formats import CheckpointError, one_line

#: Where a checkpoint may come from: a file, or the object that such a file holds.
Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]


def open_source(source: Source) -> tuple[Any, Mapping[str, str], str]:
    """What a source holds, the metadata of its file, and its name for messages.

    Raises:
        CheckpointError: the file cannot be opened, is damaged or unsafe, or is no checkpoint.
    """
    if isinstance(source, Mapping):
        return source, {}, "the state dict"
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise CheckpointError(f"cannot read a checkpoint from a {kind}: pass a path or a mapping")
    label = " ".join(os.fspath(source).split())
    try:
        with open(source, "rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{label}: no such file, check the path") from None
    except IsADirectoryError:
        raise CheckpointError(f"{label} is a folder: name the checkpoint file in it") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{label} cannot be opened: {one_line(e)}") from None
    if not head:
        raise CheckpointError(f"{label} is empty: download or copy it again")
    # safetensors: the length of a JSON header in eight bytes, then the header.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return *_open_safetensors(os.fspath(source), label), label
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _open_pickle(os.fspath(source), label), {}, label
    if head.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer instead of the weights: run 'git lfs pull'"
    elif head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        what = "a web page instead of the weights: download the file itself"
    else:
        what = (
            f"not a checkpoint (it begins with {head[:12]!r}): a safetensors file or one written "
            "by torch.save is expected"
        )
    raise CheckpointError(f"{label} is {what}")


def _open_safetensors(path: str, label: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(
            f"{label} is a truncated or damaged safetensors file ({one_line(e)[:200]}): "
            "download or copy it again"
        ) from None


def _open_pickle(path: str, label: str) -> Any:
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            # Warnings about damaged files would precede the one line of the error.
            warnings.simplefilter("ignore")
            # An open file: given a path, torch.load judges the file by its extension.
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(e))
        what = f"wants {wanted[1][:160]}" if wanted else "is damaged or holds pickled objects"
        raise CheckpointError(
            f"{label} {what}: PyTorch's weights-only loading takes plain weights alone, and more "
            "could run code, so it is refused; if you trust where it comes from, load it in the "
            "environment that made it and save its state_dict() with save_checkpoint or safetensors"
        ) from None
    # A damaged file can make the unpickler raise any exception.
    except Exception as e:
        if "TorchScript" in str(e):
            raise CheckpointError(
                f"{label} is a TorchScript program, not weights: load it with torch.jit.load and "
                "save its state_dict()"
            ) from None
        reason = one_line(e).split(". ")[0][:200] or type(e).__name__
        raise CheckpointError(
            f"{label} is truncated, damaged or not a PyTorch checkpoint ({reason}): download or "
            "copy it again"
        ) from None


class Inert:
    """Placeholder for a pickled value that nothing reads."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _dict(*default_factory: object) -> dict[Any, Any]:
    return {}


def _list(items: Iterable[Any] = (), maxlen: object = None) -> list[Any]:
    return list(items)


#: Module -> names of the globals that load as `Inert`.
_INERT = {
    "argparse": "Namespace",
    "builtins": "bool dict float frozenset int list object range slice str tuple",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "ipaddress": "IPv4Address IPv6Address",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "types": "SimpleNamespace",
    "uuid": "SafeUUID UUID",
    # NumPy's scalar types themselves, as in `dtype=np.float32`.
    "numpy": " ".join({"bool_", *(np.dtype(code).type.__name__ for code in np.typecodes["All"])}),
}
# Python 3.13 pickles paths under the name of a private module.
_INERT["pathlib._local"] = _INERT["pathlib"]


def _safe_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    found: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
    found = [(Inert, f"{module}.{name}") for module in _INERT for name in _INERT[module].split()]
    found += [(_dict, "collections.defaultdict"), (_list, "collections.deque")]
    found += [(bytes, "builtins.bytes")]
    # A scalar and an array pickle as a call of these, under NumPy 1's name or NumPy 2's.
    for value in (np.zeros(1), np.float64(0)):
        function: Any = value.__reduce__()[0]
        for core in ("core", "_core"):
            found.append((function, f"numpy.{core}.multiarray.{function.__name__}"))
    found += [(np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype")]
    # The loader restores the state of an object whose class it knows: each dtype has its own.
    for kind in {type(np.dtype(code)) for code in np.typecodes["All"]}:
        found.append((kind, f"numpy.dtypes.{kind.__name__}"))
    return found


#: For `torch.serialization.safe_globals`.
SAFE_GLOBALS = _safe_globals()
