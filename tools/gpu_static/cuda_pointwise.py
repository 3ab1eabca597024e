"""The CUDA 1x1 convolution without a GPU: nvcc's machine code, and its PTX in the simulator."""

from __future__ import annotations

import itertools
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ptxsim
import torch
from torch import Tensor

from convmixer_fast.backends.triton.configs import family
from convmixer_fast.backends.triton.kernels.operands import pixel_rows

from .build import REGISTERS_ALL, SHARED_ALL, WARPS_ALL

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
#: Flags of the extension; ptxas's warnings (spills, stack, serialised matrix
#: instructions) are errors.
FLAGS = ("-std=c++17", "-O3", "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror")
ARCHITECTURES = (80, 86, 89, 90, 120)
#: As in pointwise.h and common/activation.h: the order is the number.
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
ACTIVATIONS = ("gelu", "relu", "silu", "hardswish", "identity")
THREADS = 128
#: Bytes of each row, by tile: in a step, and in the one or two steps that fill a warp's two sets of
#: registers.
STEP_BYTES, SETS_BYTES = {128: 64, 64: 128}, {128: 64, 64: 256}
#: Shared memory of one block, bytes, by family.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
#: mma a fragment load, instructions of the loop an mma, and bytes of global memory over the
#: tiling's ideal. Kernels with more are listed in `EXCEPTIONS`.
LEAST_MMA_PER_LOAD, MOST_PER_MMA, MOST_TRAFFIC = 3.0, 3.0, 1.1


@dataclass(frozen=True)
class Excepted:
    """Kernels that miss a bar, the bar they are held to instead, and the reason."""

    half: bool
    way: str
    #: Instructions an mma, at most: on sm_80 to sm_90, and on sm_120.
    per_mma: tuple[float, float]
    reason: str
    #: Bytes of global memory over the ideal, at most.
    traffic: float = MOST_TRAFFIC


_NARROW_STORES = (
    "Bytes: results are stored an element at a time, so that a sector of 32 bytes is requested "
    "four times (float32: twice); the L2 cache writes it once."
)
EXCEPTIONS = (
    Excepted(
        False,
        "large",
        (MOST_PER_MMA, 3.6),
        "A TF32 mma takes as many registers as one of 16 bits and multiplies half as many numbers, "
        "each of them prepared by one instruction: 1 an mma. On sm_120 nvcc also puts an "
        "instruction that does nothing between two mma, 0.7 an mma.",
    ),
    Excepted(
        False,
        "small",
        (3.25, 3.8),
        "As in large tiles, and twice the copies, waits and barriers an mma: a quarter of the "
        "outputs takes half the rows.",
    ),
    Excepted(
        True,
        "by_4",
        (3.2, 3.7),
        "Four copies for one of 16 bytes: the widest that rows at multiples of 4 bytes allow. "
        + _NARROW_STORES,
        traffic=1.4,
    ),
    Excepted(
        False,
        "by_4",
        (4.25, 4.7),
        "As half precision by 4 bytes, and as TF32 in large tiles. " + _NARROW_STORES,
        traffic=1.15,
    ),
    Excepted(
        True,
        "by_2",
        (8.1, 10.8),
        "No asynchronous copy is as narrow as an element: each is loaded to a register that was "
        "zeroed before, two are packed into a word, and words stored to shared memory. "
        "The two elements of a word are two requests. " + _NARROW_STORES,
        traffic=2.3,
    ),
)


@dataclass(frozen=True)
class Kernel:
    """One instantiation: a type, an activation, and a way (see pointwise_mma.cu)."""

    type: str
    act: str
    copy_bytes: int
    tile: int

    def __str__(self) -> str:
        return f"{self.type}-{self.act}-{self.way}"

    @property
    def way(self) -> str:
        return {2: "by_2", 4: "by_4"}.get(self.copy_bytes, "large" if self.tile == 128 else "small")

    @property
    def dtype(self) -> torch.dtype:
        return TYPES[self.type]

    @property
    def size(self) -> int:
        return self.dtype.itemsize

    @property
    def arguments(self) -> str:
        """The arguments of the template."""
        place = f"Type::{self.type}, Activation::{self.act}"
        return f"{place}, {self.copy_bytes}, {self.tile}, {self.tile}"

    @property
    def symbol(self) -> str:
        """A part of the mangled name that no other kernel has."""
        type_, act = list(TYPES).index(self.type), ACTIVATIONS.index(self.act)
        rest = "".join(f"ELi{value}" for value in (self.copy_bytes, self.tile, self.tile))
        return f"pointwise_mmaINS0_6ConfigILNS0_4TypeE{type_}ELNS_10ActivationE{act}{rest}E"


KERNELS = tuple(
    Kernel(type_, act, *way)
    for type_, act, way in itertools.product(
        TYPES, ACTIVATIONS, ((16, 128), (16, 64), (4, 64), (2, 64))
    )
    if not (type_ == "tf32" and way[0] == 2)
)


def named(name: str) -> Kernel:
    return next(kernel for kernel in KERNELS if str(kernel) == name)


def exception(kernel: Kernel) -> Excepted | None:
    half = kernel.type != "tf32"
    return next((e for e in EXCEPTIONS if (e.half, e.way) == (half, kernel.way)), None)


def most_per_mma(kernel: Kernel, architecture: int) -> float:
    """Most instructions of the loop an mma of a kernel."""
    found = exception(kernel)
    return found.per_mma[architecture >= 120] if found else MOST_PER_MMA


def most_traffic(kernel: Kernel) -> float:
    """Most bytes that a kernel may request of global memory, over the tiling's ideal."""
    found = exception(kernel)
    return found.traffic if found else MOST_TRAFFIC


def ideal_per_mma(kernel: Kernel) -> float:
    """Instructions an mma of an ideal loop: mma, fragment loads, copies, and TF32's conversions.

    64 mma of a warp take 16 loads; meanwhile a thread copies 8 pieces of 16 bytes for a large tile,
    16 for a small one. An element that is copied alone is loaded, and stored with a neighbour.
    """
    pieces = 8 if kernel.tile == 128 else 16
    a_piece = {16: 1, 4: 4, 2: 8 + 4}[kernel.copy_bytes]
    prepared = 64 if kernel.type == "tf32" else 0
    return (64 + 16 + pieces * a_piece + prepared) / 64


def stages(architecture: int) -> int:
    """The result of stages_for in pointwise_mma.cuh."""
    return 3 if architecture in (86, 88, 89) or architecture >= 120 else 4


def shared_bytes(kernel: Kernel, architecture: int) -> int:
    return stages(architecture) * 2 * kernel.tile * STEP_BYTES[kernel.tile]


def source(kernels: Iterable[Kernel]) -> str:
    """A file that instantiates some of the kernels."""
    signature = "const uint8_t*, const uint8_t*, const float*, const float*, const float*, uint8_t*"
    signature += ", int64_t, int, int, uint32_t, uint32_t"
    lines = ['#include "pointwise_mma.cuh"', "namespace convmixer_fast::cuda {"]
    for i, kernel in enumerate(kernels):
        lines.append(f"using C{i} = Config<{kernel.arguments}>;")
        lines.append(f"template __global__ void pointwise_mma<C{i}>({signature});")
    return "\n".join([*lines, "}", ""])


class CompileError(RuntimeError):
    """nvcc failed, or warned where that is an error; the message is its output."""


def ptx(
    kernels: Sequence[Kernel],
    architecture: int = 80,
    sources: Path = SOURCES,
) -> Any:
    """The simulator's module of some kernels, compiled by nvcc from ``sources``."""
    return ptxsim.cuda.compile(
        source(kernels), arch=f"sm_{architecture}", includes=[sources], flags=["-O3"]
    )


def build(architecture: int, kernels: Sequence[Kernel] | None = None) -> dict[Kernel, Any]:
    """Reports of the machine code (`ptxsim.sass.KernelReport`), by default of all kernels."""
    tool = ptxsim.cuda.nvcc()
    if tool is None:
        raise CompileError("nvcc not found: put it on PATH or name it in PTXSIM_NVCC")
    with tempfile.TemporaryDirectory() as work:
        file, cubin = SOURCES / "pointwise_mma.cu", Path(work, "kernels.cubin")
        if kernels is not None:
            file = Path(work, "some.cu")
            file.write_text(source(kernels))
        command = [tool, *FLAGS, f"-I{SOURCES}", f"-arch=sm_{architecture}", "-cubin"]
        done = subprocess.run(
            [*command, str(file), "-o", str(cubin)], capture_output=True, text=True
        )
        if done.returncode:
            raise CompileError(done.stderr or done.stdout)
        reports = ptxsim.sass.analyse(cubin)
    of = {kernel: [r for r in reports if kernel.symbol in r.name] for kernel in kernels or KERNELS}
    if len(reports) != len(of) or any(len(found) != 1 for found in of.values()):
        raise CompileError(f"not the requested kernels: {[r.name for r in reports]}")
    return {kernel: found[0] for kernel, found in of.items()}


def facts(report: Any, kernel: Kernel) -> dict[str, Any]:
    """Numbers of the machine code."""
    group = family(report.arch)
    hot = report.hot_loop.histogram if report.hot_loop else {}
    registers = -(-report.registers // 8) * 8
    # From sm_90 on, the system reserves static shared memory in each block.
    shared = shared_bytes(kernel, report.arch)
    blocks = min(
        REGISTERS_ALL // (registers * THREADS),
        SHARED_ALL[group] // (shared + 1024),
        32 * WARPS_ALL[group] // THREADS,
    )
    last = max((i for i, s in enumerate(report.sass) if s.base == "HMMA"), default=0)
    # The loop's own branch comes first.
    after = [s for s in report.sass[last:] if s.base != "BRA" or s is not _loop_end(report)]
    mma = hot.get("HMMA", 0)
    return {
        "architecture": report.arch,
        "kernel": str(kernel),
        "registers": report.registers,
        "stack": report.stack,
        "spills": report.spills,
        "shared": shared,
        "stages": stages(report.arch),
        "blocks": blocks,
        "loop": report.hot_loop.size if report.hot_loop else 0,
        "mma": mma,
        "ldsm": hot.get("LDSM", 0),
        "copies": hot.get("LDGSTS", 0),
        "mma_per_ldsm": mma / max(1, hot.get("LDSM", 0)),
        "per_mma": report.hot_loop.size / max(1, mma) if report.hot_loop else float("inf"),
        "loop_mix": dict(hot.most_common()) if hot else {},
        "copy_bits": dict(report.widths("LDGSTS")),
        "store_bits": dict(report.widths("STG")),
        "special_per_output": sum(s.base == "MUFU" for s in after) * THREADS / kernel.tile**2,
        "branches_after": [s.opcode for s in after if s.base in ("BRA", "CALL", "BSSY", "BRX")],
        "instructions": len(report.sass),
    }


def _loop_end(report: Any) -> Any:
    loop = report.hot_loop
    return loop.instructions[-1] if loop else None


def broken_bars(report: Any, kernel: Kernel) -> list[str]:
    """The static bars that a kernel does not meet, in words."""
    f, group = facts(report, kernel), family(report.arch)
    tf32, broken = kernel.type == "tf32", []

    def bar(holds: bool, text: str) -> None:
        if not holds:
            broken.append(text)

    bar(f["spills"] == 0 and f["stack"] == 0, f"{f['spills']} spills, {f['stack']} bytes of stack")
    bar(f["shared"] <= SHARED_LIMIT[group], f"{f['shared']} bytes of shared memory")
    bar(f["blocks"] >= 2, f"{f['blocks']} block on a multiprocessor")
    wanted = "HMMA.1688.F32.TF32" if tf32 else "HMMA.16816.F32"
    bar(report.has(wanted), f"no {wanted}")
    bar(report.has("LDSM.16.M88.4"), "no LDSM.x4")
    least = LEAST_MMA_PER_LOAD
    bar(f["mma_per_ldsm"] >= least, f"{f['mma_per_ldsm']:.2f} HMMA a LDSM, {least} wanted")
    copy_bits = {} if kernel.copy_bytes == 2 else {8 * kernel.copy_bytes}
    bar(set(f["copy_bits"]) == set(copy_bits), f"copies of {f['copy_bits']} bits")
    store_bits = 128 if kernel.copy_bytes == 16 else 8 * kernel.size
    bar(set(f["store_bits"]) == {store_bits}, f"stores of {f['store_bits']} bits")
    bar(f["special_per_output"] <= 2, f"{f['special_per_output']:.2f} special functions an output")
    bar(f["branches_after"] == [], f"{f['branches_after']} after the loop")
    most = most_per_mma(kernel, report.arch)
    bar(f["per_mma"] <= most, f"{f['per_mma']:.2f} instructions a mma, {most} at most")
    return broken


def launch(
    module: Any,
    kernel: Kernel,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    *,
    out: Tensor,
    architecture: int = 80,
    **settings: Any,
) -> Any:
    """Run a kernel of a `ptx` module on x (N, C, H, W), as the host code would.

    ``out`` is poisoned first. ``settings`` are the simulator's, and so are the counters returned.
    """
    n, k = weight.shape[:2]
    m = x.shape[0] * x.shape[2] * x.shape[3]
    x, stride = pixel_rows(x, m)
    a = x.as_strided((m, k), (stride, 1))
    copy = kernel.copy_bytes // kernel.size
    stored = copy if kernel.copy_bytes == 16 else 1
    if act != kernel.act or k % copy or stride % copy or n % stored:
        raise ValueError(f"{kernel} is not for {act}, {k} -> {n} channels, rows {stride} apart")
    tiles = -(-m // kernel.tile) * -(-n // kernel.tile)
    return module.launch(
        kernel.symbol,
        tiles,
        THREADS,
        [
            *(a, weight.reshape(n, k), None if bias is None else bias.float(), scale, shift),
            *(out, m, n, k, stride // copy, k // copy),
        ],
        dynamic_smem=shared_bytes(kernel, architecture),
        poison=(5,),
        **settings,
    )


def traffic(module: Any, kernel: Kernel, k: int = 256) -> dict[str, float]:
    """Bytes that one tile with ``k`` input channels requests, against the tiling's ideal.

    The ideal: every element of the tile's rows of both operands, bias, scale, shift, and the
    outputs, once.
    """
    t, dtype = kernel.tile, kernel.dtype
    x = torch.randn(1, t, 1, k).permute(0, 3, 1, 2).to(dtype)
    weight = (torch.randn(t, k, 1, 1) / k**0.5).to(dtype)
    vectors = [torch.randn(t) for _ in range(3)]
    out = torch.empty(1, t, 1, t, dtype=dtype).permute(0, 3, 1, 2)
    stats = launch(module, kernel, x, weight, *vectors, kernel.act, out=out, race=False, init=False)
    requested = 32 * (stats.counters["global_ld_sectors"] + stats.counters["global_st_sectors"])
    ideal = 2 * t * k * kernel.size + 3 * t * 4 + t * t * kernel.size
    return {"bytes": requested, "ideal_bytes": ideal, "bytes_over_ideal": requested / ideal}
