"""Mutation tests of the CUDA 1x1 convolution: every barrier, wait and bound is needed.

Each is removed in turn; the simulator must report it, or its result must break the numerics rule.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import ptxsim
import pytest
from test_pointwise_simulated import cuda_pointwise, named, simulate
from triton_modes import compiler

SOURCES = cuda_pointwise.SOURCES
FILES = ("ptx.cuh", "epilogue.cuh", "pointwise_mma.cuh")
#: Matches a line with a barrier, a wait, the end of a group of copies, or a bound.
GUARDS = re.compile(
    r"__syncthreads\(|copy_wait<|copy_commit\(\);|\bmin\(|< left\b|< p\.[mnk]\b|nullptr"
    r"|inside \?|@q (ld|st)|< kGroupM|== kStages"
)

pytestmark = compiler


@dataclass(frozen=True)
class Mutant:
    """A guard's line with ``old`` replaced by ``new``, and the kernel and case that detect it."""

    name: str
    old: str
    new: str
    kernel: str = "fp16-relu-small"
    case: str = "channels_by_8"
    order: str = "lockstep"

    def __str__(self) -> str:
        return self.name


BY_2, BY_4, TF32 = "bf16-gelu-by_2", "bf16-silu-by_4", "tf32-relu-small"
#: One for each line with a guard, in the order of `FILES` and of their lines.
MUTANTS = (
    Mutant("copies read past k", "inside ? kBytes : 0", "kBytes"),
    Mutant("a null bias is read", "@q ld", "ld", case="no_bias"),
    Mutant("elements past k are read", "@q ld", "ld", BY_2, "odd_channels"),
    Mutant("pieces past the end are stored", "@q st", "st"),
    Mutant("floats past the end are stored", "@q st", "st", "tf32-hardswish-by_4", "odd_channels"),
    Mutant("halves past the end are stored", "@q st", "st", BY_2, "odd_channels"),
    Mutant("no word says that there is no bias", "p.bias != nullptr", "true", case="no_bias"),
    Mutant("columns past n are read", "min(mine + 8 * j + e, p.n - 1)", "mine + 8 * j + e"),
    Mutant("rows past m are stored", "m < p.m", "true"),
    Mutant("columns past n: elements", "inside && n < p.n", "inside", BY_2, "odd_channels"),
    Mutant("columns past n: floats", "inside && n < p.n", "inside", TF32),
    Mutant("columns past n: pieces", "inside && n < p.n", "inside"),
    Mutant(
        "groups of full height", "left < kGroupM ? left : kGroupM", "kGroupM", case="many_steps"
    ),
    Mutant("even elements past k", "16 * i < left", "true", BY_2, "odd_channels"),
    Mutant("odd elements past k", "16 * i + 1 < left", "true", BY_2, "odd_channels"),
    Mutant("words past k", "32 * i / C::kSize < left", "true", BY_4, "even_channels"),
    Mutant("no barrier before halves are read", "__syncthreads();", "", order="random"),
    Mutant("rows of a past m", "min(here, p.m - 1)", "here"),
    Mutant("rows of w past n", "min(here, p.n - 1)", "here"),
    Mutant("groups of copies never end", "copy_commit();", ""),
    Mutant("no wait for the first step", "copy_wait<kStages - 2>();", "", case="many_steps"),
    Mutant("no barrier before the first step", "__syncthreads();", "", order="random"),
    Mutant("no wait for the next step", "copy_wait<kStages - 2>();", "", case="many_steps"),
    Mutant("no barrier between steps", "__syncthreads();", "", case="many_steps", order="random"),
    Mutant("buffers never come round", "kStages * C::kStageBytes", "0u", case="many_steps"),
    Mutant("no wait before the end", "copy_wait<0>();", ""),
    Mutant("no barrier before halves are stored", "__syncthreads();", "", order="random"),
)


def guarded_lines() -> list[tuple[str, int, str]]:
    found = []
    for file in FILES:
        for number, line in enumerate((SOURCES / file).read_text().splitlines()):
            if GUARDS.search(line.split("//")[0]):
                found.append((file, number, line))
    return found


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = ptxsim.cuda.nvcc()
    if found is None:
        pytest.skip("nvcc is not on PATH")
    return found


def copy_of_the_sources(folder: Path) -> Path:
    """A copy of the sources and of the header that they include from the parent folder."""
    shutil.copytree(SOURCES, folder / "cuda")
    shutil.copytree(SOURCES.parent / "common", folder / "common")
    return folder / "cuda"


def test_every_guard_of_the_source_has_a_mutant() -> None:
    lines = guarded_lines()
    assert len(lines) == len(MUTANTS), "\n".join(line for _, _, line in lines)
    for (file, number, line), mutant in zip(lines, MUTANTS, strict=True):
        assert line.count(mutant.old) == 1, (mutant.name, file, number + 1, line)


def test_the_sources_as_they_are_pass(nvcc: str, tmp_path: Path) -> None:
    runs = list(dict.fromkeys((m.kernel, m.case, m.order) for m in MUTANTS))
    kernels = [cuda_pointwise.named(name) for name in dict.fromkeys(run[0] for run in runs)]
    module = cuda_pointwise.ptx(kernels, sources=copy_of_the_sources(tmp_path))
    for kernel, case, order in runs:
        simulate(module, kernel, named(case), order=order)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_caught(nvcc: str, tmp_path: Path, mutant: Mutant) -> None:
    file, number, line = guarded_lines()[MUTANTS.index(mutant)]
    sources = copy_of_the_sources(tmp_path)
    lines = (sources / file).read_text().splitlines()
    lines[number] = line.replace(mutant.old, mutant.new)
    (sources / file).write_text("\n".join([*lines, ""]))
    module = cuda_pointwise.ptx([cuda_pointwise.named(mutant.kernel)], sources=sources)
    errors = (AssertionError, ptxsim.RaceError, ptxsim.PTXError)
    with pytest.raises(errors):
        simulate(module, mutant.kernel, named(mutant.case), order=mutant.order, max_steps=10**6)
