"""Whether Triton kernels can run on a device, found out without importing Triton.

They run where Triton is installed and the device is a GPU of compute capability 8.0 or later, or
one that ROCm drives. On CPU tensors they run only in Triton's own interpreter
(``TRITON_INTERPRET=1``, before Triton is imported).
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ... import environment

#: bf16 tensor-core instructions and asynchronous copies begin here.
MIN_CAPABILITY = (8, 0)
MIN_TRITON = (3, 4)

#: Names under which Triton is distributed.
_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")

_dispatch_version = 0
#: Devices that were found able: this is asked at every call of an operator.
_capable: set[int] = set()


def dispatch_version() -> int:
    """The version of the dispatch state: results of self-checks, emulation.

    A decision that was made under an older version is stale.
    """
    return _dispatch_version


def invalidate_routes() -> None:
    global _dispatch_version
    _dispatch_version += 1


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, on the host, where `triton.cdiv` first asks what its arguments are."""
    return -(-a // b)


def is_emulated() -> bool:
    """Whether kernels run on CPU tensors, in Triton's own interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def is_kernel_device(device: torch.device) -> bool:
    """Whether tensors of that device are laid out for these kernels, channels-last."""
    return device.type == "cuda" or (device.type == "cpu" and is_emulated())


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one. Triton, CUDA graphs and new streams and events use the current
    device and its current stream."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of ``device`` records a CUDA graph. Nothing may wait for the GPU
    then."""
    if device.type != "cuda":
        return False
    with on_device(device):
        return torch.cuda.is_current_stream_capturing()


def architecture(device: torch.device) -> int:
    """Compute capability of ``device`` as in sm_89; 0 under ROCm, and 80 for tensors on the CPU."""
    if device.type != "cuda":
        return 80
    if torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def why_not(device: torch.device) -> str:
    """Why Triton kernels cannot run on tensors of ``device``; ``""`` where they can.

    A GPU that was found able stays so: the environment is not asked again.
    """
    if device.type == "cuda" and device.index in _capable:
        return ""
    if off := environment.why_off("DISABLE_TRITON"):
        return off
    if device.type == "cpu" and is_emulated():
        return _why_no_triton()
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    why = _why_no_triton() or _why_not_gpu(device.index) or why_no_compiler()
    if not why and device.index is not None:
        _capable.add(device.index)
    return why


def why_not_here() -> str:
    """Why Triton kernels run on no device of this machine; ``""`` where they run on one."""
    return why_not(torch.device("cpu" if is_emulated() else "cuda"))


@cache
def _why_no_triton() -> str:
    # find_spec looks for the package and does not run it.
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    version = triton_version()
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < MIN_TRITON:
        wanted = ".".join(map(str, MIN_TRITON))
        return f"Triton {version} is too old: the kernels need {wanted}"
    return ""


def compiler() -> str | None:
    """The C compiler that Triton finds: ``CC``, else gcc, else clang; None where there is none."""
    named = os.environ.get("CC")
    if named is not None:
        return shutil.which(named)
    return shutil.which("gcc") or shutil.which("clang")


def why_no_compiler() -> str:
    """Why Triton cannot compile its launcher, the C module that every kernel is started by.

    ``""`` where it can, or where that is not known beforehand: with another builder, or with a
    launcher in Triton's cache.
    """
    variables = ("CC", "PATH", "CPATH", "C_INCLUDE_PATH")
    places = ("TRITON_CACHE_MANAGER", "TRITON_CACHE_DIR", "TRITON_HOME")
    return _why_no_compiler(*map(os.environ.get, (*variables, *places)))


@cache
def _why_no_compiler(*environment: str | None) -> str:
    if os.environ.get("TRITON_CACHE_MANAGER"):
        return ""
    why = lacks_for_compiling()
    if not why or _has_a_launcher():
        return ""
    loaded = sys.modules.get("triton.knobs")
    if loaded is not None and getattr(loaded.build, "impl", None) is not None:
        return ""
    return f"Triton compiles its launcher at run time and {why}"


def lacks_for_compiling() -> str:
    """What Triton would fail at if it had to compile its launcher now, and the remedy; ``""`` for
    nothing, and where Triton brings a compiler along."""
    if sys.platform != "linux":
        return ""
    if compiler() is None:
        named = os.environ.get("CC")
        if named is not None:
            return f"CC names {named!r}, which is no program: unset CC or name a C compiler"
        other = shutil.which("cc")
        if other is not None:
            return f"finds neither gcc nor clang: set CC={other}"
        return "finds no C compiler: install gcc or clang, or name a compiler in CC"
    # As in triton.runtime.build. The two variables are the compiler's own search path.
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    if header.exists() or os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH"):
        return ""
    return f"{header} is missing: install Python's headers (python3-dev or python3-devel)"


def _has_a_launcher() -> bool:
    """Whether Triton's cache holds a compiled launcher of this Python, of whatever Triton."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return any(folder.glob(f"*/*_utils{suffix}"))


def triton_version() -> str:
    """The installed Triton's version from its metadata, ``""`` where that is not known."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def why_no_gpu(device: torch.device) -> str:
    """Why no kernel can run on that GPU, whoever compiled it; ``""`` where one can."""
    return _why_not_gpu(device.index)


def _why_not_gpu(index: int | None) -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "torch sees no GPU" + ("" if built else ": it is built without CUDA and ROCm")
    return _why_not_capable(torch.cuda.current_device() if index is None else index)


def _why_not_capable(index: int) -> str:
    if index >= torch.cuda.device_count():
        return f"torch sees no device cuda:{index}"
    if torch.version.hip:
        # ROCm's capability numbers are those of another maker; Triton decides at compile time.
        return ""
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {have}, "
            f"the kernels need {need}"
        )
    return ""
