"""Overheads of the package: its import, its checks of packed copies, its launches."""

from __future__ import annotations

import copy
from typing import Any

import fresh_python
import pytest
import torch
from fakes.triton import installed
from recording import BenchmarkRecorder

from convmixer_fast import MixerBlock, MixerStack, create_model, optimize_for_inference
from convmixer_fast.backends.triton import functions
from convmixer_fast.diagnostics.timing import interleaved_times, spread
from convmixer_fast.modules.route import Route


def _process(code: str) -> None:
    fresh_python.run("-c", code, check=True)


def test_import(benchmark: Any, record: BenchmarkRecorder) -> None:
    record.wanted("overheads", "import")
    runs = {
        "import torch": lambda: _process("import torch"),
        "import torch, convmixer_fast": lambda: _process("import torch, convmixer_fast"),
    }
    times = benchmark.pedantic(interleaved_times, args=(runs, 7), rounds=1)
    rows = []
    for name, seconds in times.items():
        measured = spread(seconds)
        rows.append(
            {"what": name}
            | {column: 1e3 * measured[key] for column, key in _COLUMNS.items()}
            | {"rounds": len(seconds)}
        )
    record("overheads", "import", rows)


_COLUMNS = {"ms": "median", "p20 ms": "p20", "p80 ms": "p80"}


@pytest.mark.parametrize(("name", "size"), [("1024/20", 224), ("256/8", 32)])
def test_cache_check(name: str, size: int, benchmark: Any, record: BenchmarkRecorder) -> None:
    group = f"look at packed copies, {name}"
    record.wanted("overheads", group)
    model = create_model(name).eval()
    x = torch.randn(1, 3, size, size)
    features = torch.randn(1, model.num_features, 4, 4)

    def check() -> None:
        for block in model.blocks:
            assert block._whole(features) is not None

    with torch.no_grad():
        runs = {"forward": lambda: model(x), "check": check}
        times = benchmark.pedantic(
            interleaved_times, args=(runs, 15), kwargs={"repeats": {"check": 20}}, rounds=1
        )
    forward, checking = (spread(times[name])["median"] for name in runs)
    row = {
        "what": "asking whether blocks may run whole and packed copies are stale",
        "model": name,
        "batch": 1,
        "ms": 1e3 * checking,
        "of forward": checking / forward,
    }
    record("overheads", group, [row])


def _does_nothing(*args: Any, out: Any = None, **kwargs: Any) -> Any:
    return out


def test_host_time_of_fused_halves(
    benchmark: Any, record: BenchmarkRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host time without the kernels, which do nothing: a GPU waits for it at small batches."""
    group = "host time per fused half"
    record.wanted("overheads", group)
    blocks = 20
    stack = MixerStack(*[MixerBlock(16, 3) for _ in range(blocks)]).eval().bfloat16()
    x = torch.randn(1, 16, 2, 2).bfloat16().contiguous(memory_format=torch.channels_last)
    with installed(), torch.inference_mode():
        stack(x), stack(x)
        table = functions.kernels()._replace(
            depthwise_mix=_does_nothing, pointwise_mix=_does_nothing
        )
        monkeypatch.setattr(functions, "kernels", lambda: table)
        stack(x), stack(x)
        assert isinstance(stack._packed.route, Route)
        assert stack._packed.route.holds(x)

        def asked_one_by_one() -> None:
            for block in stack:
                y = block(x)
            assert y.shape == x.shape

        prepared = optimize_for_inference(copy.deepcopy(stack))
        prepared(x), prepared(x)
        runs = {"a stack whose call is like the last": lambda: stack(x)}
        runs["the same after optimize_for_inference"] = lambda: prepared(x)
        runs["blocks one by one"] = asked_one_by_one
        times = benchmark.pedantic(
            interleaved_times, args=(runs, 31), kwargs={"warmup": 3}, rounds=1
        )
    rows = []
    for name, seconds in times.items():
        measured = spread(seconds)
        rows.append(
            {"what": f"host time per fused half, kernels that do nothing: {name}", "batch": 1}
            | {c: 1e3 * measured[key] / (2 * blocks) for c, key in _COLUMNS.items()}
            | {"rounds": len(seconds)}
        )
    record("overheads", group, rows)
