"""Whole models on the CPU, float32: ours beside everything else that runs them.

    pytest benchmarks/test_models.py
    pytest benchmarks/test_models.py --variants 1024/20,768/32,1536/20,256/8 --batches 1,4,16 \
        --threads 1,2 --peers all --rows cpu.json

The limit is the machine's own: multiply-adds of a register-only loop, measured in the same rounds.
"% of peak" counts all multiply-adds of the model, the depthwise ones included.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from peers import PEERS, Run, Unavailable

from convmixer_fast import _native, create_model
from convmixer_fast.arch import find_variant
from convmixer_fast.reference import ReferenceConvMixer
from convmixer_fast.testing import assert_numerics, error_report, trained_like_
from convmixer_fast.timing import interleaved_times, spread


def test_model(
    variant: str, batch: int, threads: int, benchmark: Any, add_row: Any, request: Any
) -> None:
    option = request.config.getoption
    published = find_variant(variant)
    arch, size = published.arch, published.input_size[1]
    small = 4 * arch.patch_size
    plain = trained_like_(ReferenceConvMixer(arch), (4, arch.in_chans, small, small))
    ours = create_model(variant).eval()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(batch, arch.in_chans, size, size, generator=torch.Generator().manual_seed(1))
    names = list(PEERS) if option("--peers") == "all" else option("--peers").split(",")

    def missing(system: str, why: str) -> None:
        add_row(model=variant, batch=batch, threads=threads, system=system, note=why)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            oracle, same = copy.deepcopy(plain).double()(x[:1].double()), plain(x)[:1]
            runs: dict[str, Run] = {"ours": lambda: ours(x)}
            for name in names:
                try:
                    runs[name] = PEERS[name](plain, x)
                except Unavailable as reason:
                    missing(name, str(reason))
            assert_numerics(runs["ours"]()[:1], same, oracle)
            for name in [n for n in runs if n != "ours"]:
                report = error_report(runs[name]()[:1], same, oracle)
                if not report.ok:
                    del runs[name]
                    missing(name, f"not timed, its output is outside the numerics rule: {report}")
            engine = _native.load()
            rates: list[float] = []
            if engine is not None:
                runs["peak"] = lambda: rates.append(engine.multiply_add_rate(threads, 0.1))
            times = benchmark.pedantic(interleaved_times, args=(runs, option("--rounds")), rounds=1)
    finally:
        torch.set_num_threads(before)
    times.pop("peak", None)
    peak = statistics.median(rates) if rates else float("nan")
    macs = batch * arch.macs(size).total
    medians = {name: spread(seconds)["median"] for name, seconds in times.items()}
    best = min((m for name, m in medians.items() if name != "ours"), default=float("nan"))
    for name, seconds in times.items():
        measured = spread(seconds)
        row = {
            "model": variant,
            "batch": batch,
            "threads": threads,
            "system": name,
            "img/s": batch / measured["median"],
            "ms": 1e3 * measured["median"],
            "p20 ms": 1e3 * measured["p20"],
            "p80 ms": 1e3 * measured["p80"],
            "GMAC/s": macs / measured["median"] / 1e9,
            "of peak": macs / measured["median"] / peak,
            "best peer / this": best / measured["median"],
        }
        add_row(**row)
        benchmark.extra_info[name] = row
    benchmark.extra_info["peak GMAC/s"] = peak / 1e9


@pytest.mark.parametrize(("channels", "k", "side"), [(1536, 9, 32), (1024, 9, 16), (768, 7, 32)])
def test_halves(
    channels: int, k: int, side: int, threads: int, benchmark: Any, add_row: Any, request: Any
) -> None:
    """The two halves of one block alone: batch 1, GELU, PyTorch's three operators beside ours."""
    from torch.nn import functional as F

    from convmixer_fast.ops import depthwise_mix

    engine = _native.load()
    if engine is None:
        pytest.skip(_native.why_unavailable())
    x = torch.randn(1, channels, side, side)
    taps, weight = torch.randn(channels, 1, k, k) / k, torch.randn(channels, channels, 1, 1)
    weight /= channels**0.5
    scale, shift, bias = torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels)
    mean, var = torch.zeros(channels), torch.ones(channels)

    def norm(a: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(a, mean, var, scale, shift, False, 0.0, 0.0)

    def spatial() -> torch.Tensor:
        return norm(F.gelu(F.conv2d(x, taps, bias, padding="same", groups=channels))) + x

    packed = _native.mixer_pack(taps, bias, scale, shift, weight, bias, scale, shift)
    rates: list[float] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = {
            "depthwise half, ours": lambda: depthwise_mix(x, taps, bias, scale, shift, "gelu"),
            "depthwise half, eager": spatial,
            "channel half, eager": lambda: norm(F.gelu(F.conv2d(x, weight, bias))),
            "block, ours": lambda: _native.mixer_stack(x, [packed], k, "gelu"),
            "block, eager": lambda: norm(F.gelu(F.conv2d(spatial(), weight, bias))),
            "peak": lambda: rates.append(engine.multiply_add_rate(threads, 0.05)),
        }
        for half in ("depthwise half", "block"):
            torch.testing.assert_close(
                runs[f"{half}, ours"](), runs[f"{half}, eager"](), rtol=1e-4, atol=1e-4
            )
        times = benchmark.pedantic(
            interleaved_times, args=(runs, 2 * request.config.getoption("--rounds"), 2), rounds=1
        )
    finally:
        torch.set_num_threads(before)
    times.pop("peak")
    peak = statistics.median(rates)
    pixels = side * side
    macs = {"depthwise half": pixels * channels * k * k, "channel half": pixels * channels**2}
    macs["block"] = sum(macs.values())
    for name, seconds in times.items():
        median = spread(seconds)["median"]
        work = macs[name.split(",")[0]]
        add_row(
            model=f"{channels} x {side} x {side}, k={k}",
            batch=1,
            threads=threads,
            system=name,
            ms=1e3 * median,
            **{"GMAC/s": work / median / 1e9, "of peak": work / median / peak},
        )
