"""Names of the machine and of the software that a figure was measured with."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import convmixer_fast
from convmixer_fast.backends.cpu import native
from convmixer_fast.backends.extensions import build_info
from convmixer_fast.diagnostics.doctor import cpu_name, usable_cores, version_of

# Cloud machines often report only "AMD EPYC"; family and model identify the generation. The table
# is that of Linux, arch/x86/kernel/cpu/amd.c (bsp_init_amd).
_ZEN: dict[int, list[tuple[range, int]]] = {
    0x17: [
        (range(0x00, 0x30), 1),
        (range(0x30, 0x50), 2),
        (range(0x50, 0x60), 1),
        (range(0x60, 0x80), 2),
        (range(0x90, 0xB0), 2),
    ],
    0x19: [
        (range(0x00, 0x10), 3),
        (range(0x10, 0x20), 4),
        (range(0x20, 0x60), 3),
        (range(0x60, 0xB0), 4),
    ],
    0x1A: [(range(0x00, 0x30), 5), (range(0x40, 0x50), 5), (range(0x60, 0x80), 5)],
}
# Intel's by the model of family 6, named as in Linux, arch/x86/include/asm/intel-family.h; Cascade
# Lake and Cooper Lake have Skylake's.
_XEON = {
    0x3F: "haswell",
    0x4F: "broadwell",
    0x55: "skylake",
    0x6A: "icelake",
    0x6C: "icelake",
    0x8F: "sapphirerapids",
    0xAD: "graniterapids",
    0xCF: "emeraldrapids",
}
_NOISE = re.compile(
    r"\((r|tm|c)\)|@.*|\bwith\b.*|\d+-core\b|\b(cpu|processor|amd|intel|genuine)\b", re.IGNORECASE
)


def zen_generation(family: int, model: int) -> int | None:
    """The generation of an AMD Zen core, None for an unknown family and model."""
    return next((zen for models, zen in _ZEN.get(family, []) if model in models), None)


def machine_name(cpu: str, cores: int, family: int | None = None, model: int | None = None) -> str:
    """A folder's name for a machine, like ``epyc-zen1-2c`` or ``xeon-platinum-8375c-8c``.

    Args:
        cpu: the system's name of the processor.
        cores: number of usable cores.
        family, model: of an x86 processor; they make a name without a model number ("AMD
            EPYC", "Intel Xeon Processor") exact.
    """
    words = re.findall(r"[a-z0-9]+", _NOISE.sub(" ", cpu).lower()) or ["cpu"]
    named = any(re.search(r"\d", word) for word in words)
    if "amd" in cpu.lower() and not named and family is not None and model is not None:
        zen = zen_generation(family, model)
        words.append(f"zen{zen}" if zen else f"family{family}-model{model}")
    if "xeon" in words and not named and family == 6 and model is not None:
        words.append(_XEON.get(model, f"model{model}"))
    return "-".join([*words, f"{cores}c"])


def _cpuinfo(text: str) -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo."""
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def this_machine(gpu: str = "") -> dict[str, Any]:
    """name, cpu, cores, isa, system, and gpu where one is measured.

    Only figures of equal machines are compared. The name includes the instruction set where
    ``CONVMIXER_FAST_ISA`` requests less than the machine's best.

    Args:
        gpu: the driver's name of the GPU; the machine is named after it.
    """
    try:
        fields = _cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        fields = {}
    numbers = [int(v) if (v := fields.get(k, "")).isdigit() else None for k in _FIELDS]
    cpu, cores, isa = cpu_name(), usable_cores(), native.isa()
    name = machine_name(cpu, cores, *numbers)
    engine = native.load()
    if engine is not None and isa != engine.isas()[-1]:
        name += f"-{isa}"
    if gpu:
        name = "-".join(re.findall(r"[a-z0-9]+", gpu.lower()))
    if None not in numbers:
        cpu += f" (family {numbers[0]}, model {numbers[1]})"
    return {
        "name": name,
        "cpu": cpu,
        "cores": cores,
        "isa": isa or "no engine",
        "system": f"{platform.system()} {platform.machine()}",
        **({"gpu": gpu} if gpu else {}),
    }


_FIELDS = ("cpu family", "model")
_PREFIX = "CONVMIXER_FAST_"
_FOR_BUILDS_AND_TESTS = frozenset(
    ("BUILD_CACHE", "CI_CACHE", "CI_TORCH", "CPU", "CUDA", "CUTLASS", "WERROR")
)
_CPU_PEERS = ("onnxruntime", "openvino")


def this_software(gpu: str = "") -> dict[str, Any]:
    """Date, versions, a digest of the compiled engine, and the package's environment variables.

    The versions include the system's kernel, and with a GPU the compilers of its kernels.
    """
    engine = native.load()
    digest = ""
    if engine is not None:
        digest = hashlib.blake2b(Path(engine.__file__).read_bytes(), digest_size=4).hexdigest()
    asked = sorted(
        # Values with a path are private to the machine.
        k if os.sep in v else f"{k}={v}"
        for k, v in os.environ.items()
        if k.startswith(_PREFIX) and k.removeprefix(_PREFIX) not in _FOR_BUILDS_AND_TESTS
    )
    libraries = ("torch", "triton", "torch_tensorrt") if gpu else ("torch", *_CPU_PEERS)
    versions: dict[str, Any] = {name: version_of(name) for name in libraries}
    if gpu:
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {
        "date": datetime.date.today().isoformat(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version},
        "convmixer_fast": convmixer_fast.__version__,
        "engine": digest or "none",
        "compiler": build_info().get("compiler", ""),
        **({"environment": " ".join(asked)} if asked else {}),
    }
