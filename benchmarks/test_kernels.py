"""One block and its two halves alone, float32: ours beside eager PyTorch's, in both layouts.

    depthwise half: x + BN(act(depthwise_conv(x)))
    channel half:   BN(act(pointwise_conv(x)))
    block:          one after the other

Calls are repeated within a turn, so that each finds the caches as its own last call left them, and
the C library keeps freed memory: no side's fresh output is made of new pages (`faults` is the
number of page faults a call; see `measuring.keep_freed_memory`). PyTorch's operators get a tensor
of the layout they are measured in, ours NCHW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from measuring import keep_freed_memory, measure, peak_rows
from presets import BLOCK_SHAPES, BlockShape, Preset
from recording import Recorder
from systems import check_peer
from torch import Tensor, nn

from convmixer_fast import _native
from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.ops.packing import batch_norm_affine
from convmixer_fast.reference import reference_block
from convmixer_fast.testing import assert_numerics, trained_like_

HALVES = ("depthwise half", "channel half", "block")
Run = Callable[[], Tensor]


@pytest.fixture(autouse=True, scope="module")
def _warm_memory() -> Iterator[None]:
    keep_freed_memory(True)
    yield
    keep_freed_memory(False)


def _ours(block: nn.Sequential, x: Tensor, shape: BlockShape) -> dict[str, Run | str]:
    """Our run of each half, or why there is none."""
    residual, pointwise, _, second = block
    depthwise, _, first = residual.fn
    spatial = (depthwise.weight, depthwise.bias, *batch_norm_affine(first, x.dtype))
    channel = (pointwise.weight, pointwise.bias, *batch_norm_affine(second, x.dtype))
    weight, *rest = channel
    packed = _native.mixer_pack(*spatial, *rest)
    act = shape.act
    return {
        "depthwise half": lambda: _native.depthwise_mix(x, *spatial, act),
        "channel half": lambda: _native.channel_mix(x, *channel, act),
        "block": lambda: _native.mixer_stack(x, [weight], [packed], shape.kernel_size, act),
    }


@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_block_and_its_halves(
    shape: BlockShape,
    block_batch: int,
    threads: int,
    benchmark: Any,
    preset: Preset,
    record: Recorder,
) -> None:
    if _native.load() is None:
        pytest.skip(_native.why_unavailable())
    group = f"{shape}, batch {block_batch}, threads {threads}"
    record.wanted("kernels", group)
    torch.set_num_threads(threads)
    c, k, side = shape.channels, shape.kernel_size, shape.side
    block = reference_block(c, k, ACTIVATIONS[shape.act])
    trained_like_(block, (1, c, side, side))
    x = torch.randn(block_batch, c, side, side, generator=torch.Generator().manual_seed(1))
    last = x.contiguous(memory_format=torch.channels_last)
    twin = copy.deepcopy(block).to(memory_format=torch.channels_last)
    plain = {"depthwise half": block[:1], "channel half": block[1:], "block": block}
    plain_last = {"depthwise half": twin[:1], "channel half": twin[1:], "block": twin}

    runs: dict[str, Run] = {}
    notes = {}
    with torch.no_grad():
        ours = _ours(block, x, shape)
        for half in HALVES:
            same, exact = plain[half](x), copy.deepcopy(plain[half]).double()(x.double())
            run = ours[half]
            if isinstance(run, str):
                notes[half] = run
            else:
                assert_numerics(run(), same, exact)
                runs[f"{half}, ours"] = run
            check_peer(plain_last[half](last), same, exact)
            runs[f"{half}, eager NCHW"] = lambda half=half: plain[half](x)
            runs[f"{half}, eager channels-last"] = lambda half=half: plain_last[half](last)
        measured = measure(runs, [threads], preset, benchmark)
    pixels = block_batch * side * side
    macs = {"depthwise half": pixels * c * k * k, "channel half": pixels * c * c}
    macs["block"] = sum(macs.values())
    place = {"model": str(shape), "batch": block_batch}
    rows = []
    for name in runs:
        half, system = name.split(", ", 1)
        row = measured.row(name, threads, block_batch, macs[half])
        rows.append({**place, "part": half, **row, "system": system})
    rows += [
        {**place, "part": half, "threads": threads, "system": "ours", "note": note}
        for half, note in notes.items()
    ]
    rows += [{**place, **row} for row in peak_rows(measured)]
    record("kernels", group, rows)
