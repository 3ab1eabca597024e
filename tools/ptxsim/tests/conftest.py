"""Fixtures of the simulator's tests, and their reasons for skips."""

from pathlib import Path

import ptxsim
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def nvcc():
    if ptxsim.cuda.nvcc() is None:
        pytest.skip("nvcc not found")


@pytest.fixture(scope="session")
def basic(nvcc):
    return ptxsim.cuda.compile(ROOT / "tests/cuda/basic.cu")


@pytest.fixture(scope="session")
def gemm_source(nvcc):
    return (ROOT / "shim/example/gemm.cu").read_text()


@pytest.fixture(scope="session")
def gemm(gemm_source):
    return ptxsim.cuda.compile(gemm_source)


@pytest.fixture
def triton():
    return pytest.importorskip("triton", reason="triton is not installed")
