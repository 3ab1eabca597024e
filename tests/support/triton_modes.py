"""Through whose eyes is a kernel seen? Triton's interpreter, the simulator, or a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import fresh_python
import numpy
import pytest
from simulator import ptxsim

from convmixer_fast.kernels import support

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

#: Earlier versions of Triton allocate registers otherwise.
BARS_ARE_OF = (3, 8)

#: For tests that run in the interpreter's own process, started by `run_in_interpreter`.
interpreter = pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter's own process")
#: For tests that compile kernels: the interpreter takes the compiler's place in its process.
compiler = pytest.mark.skipif(INTERPRETING, reason="kernels are interpreted here, not compiled")


def _is_earlier() -> bool:
    numbers = tuple(int(part) for part in support.triton_version().split(".")[:2])
    return numbers < BARS_ARE_OF


def assert_bars(broken: list[str]) -> None:
    """What compiled must meet its static bars, of the Triton for which they were set."""
    if broken and _is_earlier():
        pytest.skip(
            f"it compiles; Triton {support.triton_version()}, earlier than the bars, would have to "
            f"mend {'; '.join(broken)}"
        )
    assert broken == []


def skip_code_without_loops(report: Any) -> None:
    """The disassembler in Triton 3.4 ends sm_120's branches with a word that hides their target."""
    if report.hot_loop is None and _is_earlier():
        pytest.skip(
            f"it compiles; the disassembler in Triton {support.triton_version()} shows no loop of "
            f"sm_{report.arch}"
        )


def triton_simulator() -> ModuleType:
    """`ptxsim` in the place of Triton's launches; skips where it cannot take it."""
    found = ptxsim()
    try:
        with found.triton_on_cpu(cc=80):
            return found
    except AttributeError as error:
        if _is_earlier():
            pytest.skip(f"ptxsim does not know the driver of Triton {support.triton_version()}")
        raise error


@contextmanager
def rocm_compiler() -> Iterator[None]:
    """Skips where Triton brings no linker for ROCm: 3.4 takes that of an installed ROCm."""
    try:
        yield
    except Exception as error:
        if "ROCm linker" in str(error) and _is_earlier():
            pytest.skip(f"Triton {support.triton_version()}: {error}")
        raise


def skip_an_interpreter_that_numpy_left_behind() -> None:
    """Triton 3.4's makes loop bounds of arrays of one element, which numpy 2.4 refuses."""
    numbers = tuple(int(part) for part in numpy.__version__.split(".")[:2])
    if numbers >= (2, 4) and support.triton_version().startswith("3.4."):
        pytest.skip("the interpreter of Triton 3.4 needs numpy below 2.4")


def run_in_interpreter(test_file: str) -> str:
    """Run the tests of a file that have ``interpreter`` in their names where Triton interprets.

    Triton decides when it decorates a kernel, so that one process cannot have both.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    skip_an_interpreter_that_numpy_left_behind()
    done = fresh_python.run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreter", test_file),
        env={"TRITON_INTERPRET": "1"},
        timeout=1200,
    )
    if done.returncode:
        raise AssertionError(f"in the interpreter:\n{done.stdout}\n{done.stderr}")
    return done.stdout
