"""The C++ core under sanitizers, and on instruction sets of other machines.

Each test is a preset of csrc/CMakePresets.json, with fewer problems than `.ci/run` has. Minutes of
compiling, so not part of a plain `pytest`: run it with `pytest -m sanitize`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = ("c++", "g++", "clang++")
IS_X86 = platform.machine() in ("x86_64", "AMD64")

pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("cmake", "ctest", "ninja"))), reason="no cmake or no ninja"
    ),
]


def called(*command: str) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT / "csrc",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=2400,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_preset(name: str, problems: int) -> str:
    """Build a preset and run its tests; what they printed."""
    if name != "aarch64" and not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler")
    numbers = (f"-DKERNEL_PROBLEMS={problems}", f"-DTHREAD_PROBLEMS={max(1, problems // 4)}")
    configured = called("cmake", "--preset", name, *numbers)
    called("cmake", "--build", "--preset", name)
    output = called("ctest", "--preset", name)
    assert "2 tests passed" in output or "0 tests failed out of 2" in output, output
    return configured + output


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_core_is_clean_under_sanitizer(sanitizer: str) -> None:
    output = run_preset(sanitizer, 100 if sanitizer == "asan" else 25)
    assert "kernels: " in output
    assert "threads: " in output


def test_kernels_are_compiled_for_each_instruction_set() -> None:
    output = run_preset("plain", 20)
    isas = ["baseline", *(["avx2", "avx512"] if IS_X86 else [])]
    isas = [isa for isa in isas if f"without {isa}: the compiler refuses" not in output]
    sources = (ROOT / "csrc" / "cpu").rglob("*.cpp")
    kernels = {p.name for p in sources if "::CONVMIXER_FAST_ISA {" in p.read_text()}
    assert kernels
    for isa in isas:
        folder = ROOT / "build" / "native" / "plain" / "CMakeFiles" / f"kernels_{isa}.dir"
        assert kernels <= {path.name.removesuffix(".o") for path in folder.rglob("*.o")}


def test_neon_kernels_compile_and_are_right() -> None:
    if not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"):
        pytest.skip("no cross compiler: apt-get install g++-aarch64-linux-gnu qemu-user")
    assert "right on baseline," in run_preset("aarch64", 25)


@pytest.mark.skipif(not IS_X86, reason="AVX2 is x86-64's")
def test_shapes_of_avx512_are_right_in_vectors_of_avx2() -> None:
    output = run_preset("wide", 100)
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine has no AVX2")
    assert "right on baseline avx2," in output
