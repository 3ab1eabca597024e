"""What is installed, which backends run, why others do not, and whether results are right."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__, environment
from ..arch import ACTIVATIONS
from ..backends import markers, self_check
from ..backends.cpu import native
from ..backends.cuda import native as native_cuda
from ..backends.extensions import build_info
from ..backends.kernel_key import KernelKey
from ..backends.triton import support
from ..modules.blocks import MixerBlock
from ..ops import BackendError, available_backends, depthwise_mix, pointwise_mix, use_backend
from ..ops.depthwise import DEPTHWISE
from ..ops.dispatch import ENVIRONMENT, requested_backend
from ..ops.pointwise import POINTWISE
from ..ops.registry import Operator
from ..reference import reference_block
from ..testing import error_report, trained_like_

#: Libraries that some commands or import lines can use, with the extra that brings each.
OPTIONAL = {
    "timm": "",
    "torchvision": "",
    "huggingface_hub": "hub",
    "scikit-learn": "demo",
    "mmpretrain": "",
    "ray": "",
}
REQUIRED = ("torch", "numpy", "safetensors", "pillow", "tqdm")

# (N, C, H, W, k): an odd and an even kernel, an odd number of channels, a map narrower than a
# vector and smaller than the window, where an index goes wrong first.
_SHAPES = ((2, 24, 13, 11, 7), (1, 5, 6, 3, 4))


def version_of(library: str) -> str | None:
    """The installed version, from its metadata: nothing is imported."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's marketing name, as well as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _extension() -> dict[str, Any]:
    module = native.load()
    if module is None:
        return {"usable": False, "reason": native.why_unavailable(), "build": build_info()}
    return {
        "usable": True,
        "isa": module.isa(),
        "isas": list(module.isas()),
        "threading": module.threading_backend(),
        "build": build_info(),
    }


def _cuda_extension() -> dict[str, Any]:
    build = build_info().get("cuda", {})
    module = native_cuda.load()
    if module is None:
        return {"usable": False, "reason": native_cuda.why_unavailable(), "build": build}
    return {
        "usable": True,
        "kernels": list(module.families()),
        "architectures": module.architectures(),
        "build": build,
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(
            {
                "name": p.name,
                "memory_gib": round(p.total_memory / 2**30, 1),
                "capability": f"{p.major}.{p.minor}",
            }
        )
    return found


@contextmanager
def _backend(name: str) -> Iterator[None]:
    """`use_backend`, for once stronger than the environment variable: each backend is checked."""
    asked = os.environ.pop(ENVIRONMENT, None)
    try:
        with use_backend(name):
            yield
    finally:
        if asked is not None:
            os.environ[ENVIRONMENT] = asked


def _device_of(backend: str) -> str:
    return "cuda" if backend in ("triton", "cuda") else "cpu"


def _dtype_of(backend: str) -> torch.dtype:
    """In which dtype a backend is checked: the CUDA kernels have no exact float32."""
    return torch.float16 if backend == "cuda" else torch.float32


def _of_operator(operator: Operator, run: Any, name: str, act: str) -> Iterator[tuple[Tensor, ...]]:
    """A backend's result, PyTorch's in the same dtype and float64's, of each small input."""
    device, dtype = _device_of(name), _dtype_of(name)
    for n, c, height, width, k in _SHAPES:
        kernel_size = k if operator.depthwise else 1
        key = KernelKey(operator.key, "cpu", dtype, c, c, kernel_size, act, True)
        *tensors, _ = operator.sample(key, (n, height, width))
        with _backend(name):
            ours = run(*(t.to(device) for t in tensors), act).cpu()
        yield (
            ours,
            operator.reference(*tensors, act),
            operator.reference(*(t.double() for t in tensors), act),
        )


def _of_block(name: str, act: str) -> Iterator[tuple[Tensor, ...]]:
    """The same of a whole block."""
    device, dtype = _device_of(name), _dtype_of(name)
    generator = torch.Generator("cpu").manual_seed(0)
    for n, c, height, width, k in _SHAPES:
        shape = (n, c, height, width)
        x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        block = trained_like_(reference_block(c, k, ACTIVATIONS[act]), x.shape).to(dtype)
        fused = MixerBlock(c, k, act).eval().to(dtype)
        fused.load_state_dict(block.state_dict())
        with _backend(name):
            ours = fused.to(device)(x.to(device)).cpu()
        yield ours, block(x), block.double()(x.double())


def check_backend(name: str) -> list[dict[str, Any]]:
    """Run a backend's operators and a whole block on small inputs, against PyTorch's.

    Returns a row for each of them and each activation: the largest error against float64,
    PyTorch's own in the same dtype, the bar (see `testing`), ``ok``, and ``reason`` where it failed
    in another way.
    """
    checks: dict[str, Callable[[str], Iterator[tuple[Tensor, ...]]]] = {
        DEPTHWISE.name: lambda act: _of_operator(DEPTHWISE, depthwise_mix, name, act),
        POINTWISE.name: lambda act: _of_operator(POINTWISE, pointwise_mix, name, act),
        "block": lambda act: _of_block(name, act),
    }
    rows = []
    for what, results in checks.items():
        for act in ACTIVATIONS:
            row: dict[str, Any] = {"backend": name, "op": what, "act": act}
            row["device"] = _device_of(name)
            try:
                with torch.inference_mode():
                    columns = zip(*results(act), strict=True)
                    report = error_report(*(torch.cat([*map(Tensor.flatten, c)]) for c in columns))
                row |= {
                    "ok": report.ok,
                    "max_error": report.max_error,
                    "torch_max_error": report.torch_max_error,
                    "bar": report.max_bar,
                }
            except Exception as error:  # whatever a broken backend raises is the finding
                reason = " ".join(str(error).split()) or type(error).__name__
                row |= {"ok": False, "reason": reason}
            rows.append(row)
    return rows


def examine() -> dict[str, Any]:
    """Everything `render` shows, ready for JSON. Takes a second; changes nothing."""
    backends = available_backends()
    with warnings.catch_warnings():
        # PyTorch's own convolutions copy for even kernels, and say so.
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
        checks = [row for name, why in backends.items() if not why for row in check_backend(name)]
    return {
        "convmixer_fast": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "os": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "isa": torch.backends.cpu.get_cpu_capability(),
            "cores": usable_cores(),
            "torch_threads": torch.get_num_threads(),
        },
        "libraries": {name: version_of(name) for name in REQUIRED},
        "optional": {name: version_of(name) for name in OPTIONAL},
        # Looked up by its metadata alone: importing Triton takes a second and starts compilers.
        "triton": version_of("triton"),
        "cuda": {"torch_built_with": torch.version.cuda, "gpus": _gpus()},
        "extension": _extension(),
        "cuda_extension": _cuda_extension(),
        "backends": backends,
        "compiler": {"path": support.compiler(), "lacks": support.lacks_for_compiling()},
        # What became of GPU kernels at their first use: in the checks above, and in earlier
        # processes that died of one.
        "kernels": {str(case): why for case, why in self_check.results().items()} | _left_behind(),
        "kernels_without_copy_engine": {
            str(case): why for case, why in self_check.fallback_tiles().items()
        },
        "environment": environment.given(),
        "environment_error": _environment_error(backends),
        "self_check": checks,
    }


def _left_behind() -> dict[str, str]:
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        kernel: why
        for index in range(devices)
        for kernel, why in markers.all_left(torch.device("cuda", index)).items()
    }


def _environment_error(backends: dict[str, str]) -> str:
    """Why every forward pass will raise, where the environment asks for what cannot run."""
    if wrong := environment.problems():
        return "; ".join(wrong)
    try:
        asked = requested_backend()
    except (BackendError, ValueError) as error:
        return str(error)
    why = backends.get(asked, "")
    return f"{ENVIRONMENT} asks for {asked}, which cannot run: {why}" if why else ""


def healthy(report: dict[str, Any]) -> bool:
    """Whether the environment asks for what can run, and all that runs computes right numbers.

    Missing parts are no illness.
    """
    return not report["environment_error"] and all(row["ok"] for row in report["self_check"])


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}".rstrip() for name, value in rows)])


def _extension_rows(extension: dict[str, Any]) -> list[tuple[str, str]]:
    build = extension["build"]
    rows = [("built with", str(build["compiler"]))] if build.get("compiler") else []
    if not extension["usable"]:
        return [("not usable", extension["reason"]), *rows]
    rows.append(("vectors", f"{extension['isa']} (here: {', '.join(extension['isas'])})"))
    rows += [("left out", f"{isa}: {why}") for isa, why in build.get("omitted", {}).items()]
    return [*rows, ("threads", extension["threading"])]


def _cuda_extension_rows(extension: dict[str, Any]) -> list[tuple[str, str]]:
    build = extension["build"]
    rows = [("built with", str(build["compiler"]))] if build.get("compiler") else []
    if not extension["usable"]:
        return [("not usable", extension["reason"]), *rows]
    rows += [("kernels", ", ".join(extension["kernels"])), ("for", extension["architectures"])]
    return rows + [("left out", f"{name}: {why}") for name, why in build.get("omitted", {}).items()]


def _compiler_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    if not report["triton"]:
        return []
    found = report["compiler"]
    if found["lacks"]:
        return [("C compiler", f"Triton needs one at run time and {found['lacks']}")]
    return [("C compiler", f"{found['path'] or 'not needed here'}, for Triton")]


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    cpu, checks = report["cpu"], report["self_check"]
    gpus = report["cuda"]["gpus"]
    cuda = report["cuda"]["torch_built_with"]
    built = f"for CUDA {cuda}" if cuda else "without CUDA"
    machine = [
        ("system", report["os"]),
        ("CPU", f"{cpu['name']} ({cpu['isa']})"),
        ("cores", f"{cpu['cores']} usable, {cpu['torch_threads']} torch threads"),
    ]
    machine += [
        ("GPU", f"{g['name']}, {g['memory_gib']} GiB, compute capability {g['capability']}")
        for g in gpus
    ] or [("GPU", f"none that torch sees (torch is built {built})")]

    def optional(name: str) -> str:
        extra = OPTIONAL[name]
        hint = f' (pip install "convmixer_fast[{extra}]")' if extra else ""
        return report["optional"][name] or f"not installed{hint}"

    backends = []
    for name, why in report["backends"].items():
        mine = [row for row in checks if row["backend"] == name]
        if why:
            backends.append((name, f"not here: {why}"))
        elif all(row["ok"] for row in mine):
            worst = max(mine, key=lambda row: row["max_error"])
            backends.append(
                (
                    name,
                    f"runs; {len(mine)} checks passed, largest error {worst['max_error']:.1e} "
                    f"(PyTorch {worst['torch_max_error']:.1e})",
                )
            )
        else:
            bad = sum(not row["ok"] for row in mine)
            backends.append((name, f"FAILED {bad} of {len(mine)} checks, see below"))
    parts = [
        _section(
            f"convmixer_fast {report['convmixer_fast']}",
            [
                ("python", f"{report['python']} ({report['executable']})"),
                *((name, version or "missing") for name, version in report["libraries"].items()),
            ],
        ),
        _section("Machine", machine),
        _section("C++ extension", _extension_rows(report["extension"])),
        _section("CUDA extension", _cuda_extension_rows(report["cuda_extension"])),
        _section("Backends", backends),
        _section(
            "Optional",
            [("triton", report["triton"] or "not installed"), *_compiler_rows(report)]
            + [(name, optional(name)) for name in report["optional"]],
        ),
    ]
    bad_kernels = {case: why for case, why in report["kernels"].items() if why}
    if bad_kernels:
        parts.append(_section("GPU kernels that PyTorch replaces", list(bad_kernels.items())))
    plainer = report["kernels_without_copy_engine"]
    if plainer:
        parts.append(_section("GPU kernels without the copy engine", list(plainer.items())))
    if report["environment"]:
        parts.append(_section("Environment", list(report["environment"].items())))
    failures: dict[tuple[str, str], list[str]] = {}
    for row in checks:
        if not row["ok"]:
            what = row.get("reason")
            what = what or f"max error {row['max_error']:.1e}, allowed {row['bar']:.1e}"
            failures.setdefault((f"{row['backend']}: {row['op']}", what), []).append(row["act"])
    if failures:
        rows = [(where, f"({', '.join(acts)}) {what}") for (where, what), acts in failures.items()]
        parts.append(_section("Failed checks", rows))
    if report["environment_error"]:
        parts.append(f"Not well, every forward pass will fail: {report['environment_error']}.")
    elif failures:
        parts.append("Not well: see the failed checks.")
    else:
        parts.append("Everything that runs computes the right numbers.")
    return "\n\n".join(parts)
