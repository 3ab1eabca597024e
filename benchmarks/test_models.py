"""Whole models on the CPU, float32: ours beside what PyTorch offers.

    pytest benchmarks/                                    256/8 and 1024/20
    pytest benchmarks/ --variants 768/32,1536/20 --batches 1,4

Systems: eager in both layouts, and torch.compile. The compiled model takes minutes to build for the
deep variants; `--no-compile` leaves it out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convmixer_fast import create_model
from convmixer_fast.arch import find_variant
from convmixer_fast.reference import ReferenceConvMixer
from convmixer_fast.testing import assert_numerics, trained_like_
from convmixer_fast.timing import interleaved_times, spread


def systems(
    variant: str, plain: ReferenceConvMixer, x: Tensor, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """The same weights behind every system; each a call without arguments on the same images."""
    ours = create_model(variant).eval()
    ours.load_state_dict(plain.state_dict())
    last = x.contiguous(memory_format=torch.channels_last)
    plain_last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ours(x),
        "eager NCHW": lambda: plain(x),
        "eager channels-last": lambda: plain_last(last),
    }
    if compiled:
        graph = torch.compile(copy.deepcopy(plain))
        runs["torch.compile"] = lambda: graph(x)
    return runs


def test_whole_model(variant: str, batch: int, benchmark: Any, add_row: Any, request: Any) -> None:
    published = find_variant(variant)
    arch = published.arch
    size = published.input_size[1]
    shape = (batch, arch.in_chans, size, size)
    plain = trained_like_(ReferenceConvMixer(arch), (2, arch.in_chans, 4 * arch.patch_size, size))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        runs = systems(variant, plain, x, not request.config.getoption("--no-compile"))
        oracle = copy.deepcopy(plain).double()(x[:1].double())
        same = plain(x)[:1]
        for run in runs.values():
            assert_numerics(run()[:1], same, oracle)
        times = benchmark.pedantic(
            interleaved_times, args=(runs, request.config.getoption("--rounds")), rounds=1
        )
    medians = {name: spread(seconds)["median"] for name, seconds in times.items()}
    best = min((m for name, m in medians.items() if name != "ours"))
    for name, seconds in times.items():
        measured = spread(seconds)
        benchmark.extra_info[name] = measured | {"img/s": batch / measured["median"]}
        add_row(
            model=variant,
            batch=batch,
            system=name,
            **{
                "img/s": f"{batch / measured['median']:.2f}",
                "ms": f"{1e3 * measured['median']:.1f}",
                "p20-p80": f"{1e3 * measured['p20']:.1f}-{1e3 * measured['p80']:.1f}",
                "GMAC/s": f"{batch * arch.macs(size).total / measured['median'] / 1e9:.1f}",
                "speed against best peer": f"{best / measured['median']:.2f}",
            },
        )
    benchmark.extra_info.update(threads=torch.get_num_threads(), torch=torch.__version__)
