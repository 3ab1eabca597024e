"""Through whose eyes is a kernel seen? Triton's interpreter, the simulator, or a GPU."""

from __future__ import annotations

import os

import fresh_python
import numpy
import pytest

from convmixer_fast.kernels import support

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

#: Earlier versions of Triton allocate registers otherwise.
BARS_ARE_OF = (3, 8)

#: For tests that run in the interpreter's own process, started by `run_in_interpreter`.
interpreter = pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter's own process")
#: For tests that compile kernels: the interpreter takes the compiler's place in its process.
compiler = pytest.mark.skipif(INTERPRETING, reason="kernels are interpreted here, not compiled")


def assert_bars(broken: list[str]) -> None:
    """What compiled must meet its static bars, of the Triton for which they were set."""
    numbers = tuple(int(part) for part in support.triton_version().split(".")[:2])
    if broken and numbers < BARS_ARE_OF:
        pytest.skip(f"it compiles; with a later Triton it would have to mend {'; '.join(broken)}")
    assert broken == []


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
