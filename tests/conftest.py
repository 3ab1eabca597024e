"""What every test starts from: no backend asked for, seeded generators, quiet known warnings."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from convmixer_fast.backends.cuda import native as native_cuda
from convmixer_fast.backends.triton import functions, support
from convmixer_fast.ops import dispatch

# On CI the same examples every time: a change fails by its own fault. Elsewhere, new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# pytest-xdist's workers share the processor.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))

#: A worker of pytest-xdist holds 1.5 GB.
_MOST_WORKERS = 8


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """``pytest`` alone shares its files among the processors; anything more exact runs here."""
    if hasattr(config, "workerinput"):  # one of those processes
        return
    whole = config.args_source is config.ArgsSource.TESTPATHS
    chosen = {"-m", "-k", "--pdb", "--co", "--collect-only"} & set(config.invocation_params.args)
    undecided = getattr(config.option, "numprocesses", 0) is None  # 0: no pytest-xdist
    if whole and undecided and not chosen:
        processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        config.option.numprocesses = min(processors or 1, _MOST_WORKERS)
        config.option.dist = "loadfile"


#: What tests replace by fakes; a fake that is not removed changes every later test.
_REPLACEABLE = (
    (native_cuda, "_find"),
    (native_cuda, "why_not"),
    (support, "is_emulated"),
    (native_cuda, "pointwise_mix"),
    (dispatch, "automatic_backends"),
    (dispatch, "requested_backend"),
    (functions, "kernels"),
    (support, "architecture"),
)


@pytest.fixture
def _nothing_left_behind() -> Iterator[None]:
    before = [getattr(module, name) for module, name in _REPLACEABLE]
    yield
    after = [getattr(module, name) for module, name in _REPLACEABLE]
    left = [name for (_, name), b, a in zip(_REPLACEABLE, before, after, strict=True) if a is not b]
    assert not left, f"fakes are left behind: {', '.join(left)}"


@pytest.fixture(autouse=True)
def _clean_start(_nothing_left_behind: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVMIXER_FAST_BACKEND", raising=False)
    torch.manual_seed(0)
