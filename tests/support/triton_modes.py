"""How a test runs a Triton kernel without a GPU: interpreted, compiled only, or simulated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import fresh_python
import numpy
import ptxsim
import pytest

from convmixer_fast.backends.triton import support

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

#: The version of Triton for which the bars are set; earlier ones allocate registers differently.
BARS_ARE_OF = (3, 8)

#: For tests that run in the interpreter's own process, started by `run_in_interpreter`.
interpreter = pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter's own process")
#: For tests that compile kernels: the process of the interpreter has no compiler.
compiler = pytest.mark.skipif(INTERPRETING, reason="kernels are interpreted here, not compiled")


def _is_earlier() -> bool:
    numbers = tuple(int(part) for part in support.triton_version().split(".")[:2])
    return numbers < BARS_ARE_OF


def assert_bars(broken: list[str]) -> None:
    """Fail if a static bar is missed; skip under a Triton earlier than the bars."""
    if broken and _is_earlier():
        pytest.skip(
            f"it compiles; Triton {support.triton_version()} is earlier than the bars and misses "
            f"{'; '.join(broken)}"
        )
    assert broken == []


def skip_code_without_loops(report: Any) -> None:
    """Skip where Triton 3.4 is: its disassembler hides the targets of sm_120's branches."""
    if report.hot_loop is None and _is_earlier():
        pytest.skip(
            f"it compiles; the disassembler in Triton {support.triton_version()} shows no loop of "
            f"sm_{report.arch}"
        )


def triton_simulator() -> ModuleType:
    """`ptxsim`; skips where it cannot replace Triton's driver."""
    pytest.importorskip("triton", reason="Triton is not installed")
    try:
        with ptxsim.triton_on_cpu(cc=80):
            return ptxsim
    except AttributeError as error:
        if _is_earlier():
            pytest.skip(f"ptxsim does not know the driver of Triton {support.triton_version()}")
        raise error


@contextmanager
def rocm_compiler() -> Iterator[None]:
    """Skip where Triton has no linker for ROCm: 3.4 uses that of an installed ROCm."""
    try:
        yield
    except Exception as error:
        if "ROCm linker" in str(error) and _is_earlier():
            pytest.skip(f"Triton {support.triton_version()}: {error}")
        raise


def skip_incompatible_interpreter() -> None:
    """Skip where Triton is 3.4 and numpy 2.4 or later: numpy refuses its loop bounds."""
    numbers = tuple(int(part) for part in numpy.__version__.split(".")[:2])
    if numbers >= (2, 4) and support.triton_version().startswith("3.4."):
        pytest.skip("the interpreter of Triton 3.4 needs numpy below 2.4")


def run_in_interpreter(test_file: str) -> str:
    """Run the tests of a file with ``interpreter`` in their names in an interpreting process.

    Triton chooses between its modes when it decorates a kernel, so one process has one mode.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    skip_incompatible_interpreter()
    done = fresh_python.run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreter", test_file),
        env={"TRITON_INTERPRET": "1"},
        timeout=1200,
    )
    if done.returncode:
        raise AssertionError(f"in the interpreter:\n{done.stdout}\n{done.stderr}")
    return done.stdout
