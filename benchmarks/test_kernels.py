"""One block and its two halves alone: ours and PyTorch's, in both layouts.

    depthwise half: x + BN(act(depthwise_conv(x)))
    channel half:   BN(act(pointwise_conv(x)))
    block:          one after the other

Calls are repeated within a turn, so that each finds the caches as its own last call left them. The
C library keeps freed memory, so that no output consists of new pages (`faults` is the number of
page faults a call; see `measuring.keep_freed_memory`). PyTorch's operators get a tensor of the
layout they are measured in, ours NCHW.

On a GPU each call gets another copy of the input, so that none is found in the L2 cache. Ours and
eager channels-last get it channels-last. torch.compile runs too, with and without its preferred
layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import devices
import pytest
import torch
from competitors import EAGER, build, check_peer, eager
from devices import Device
from measuring import keep_freed_memory, measure
from presets import BLOCK_SHAPES, BlockShape, Preset
from recording import BenchmarkRecorder
from torch import Tensor, nn
from work import depthwise_half, of_blocks, pointwise_half

from convmixer_fast import optimize
from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.backends.cpu import native
from convmixer_fast.modules.packing import batch_norm_affine
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
    """Our run of each half, or the reason why it has none."""
    residual, pointwise, _, second = block
    depthwise, _, first = residual.fn
    spatial = (depthwise.weight, depthwise.bias, *batch_norm_affine(first, x.dtype))
    channel = (pointwise.weight, pointwise.bias, *batch_norm_affine(second, x.dtype))
    weight, *rest = channel
    packed = native.mixer_pack(*spatial, *rest)
    act = shape.act
    return {
        "depthwise half": lambda: native.depthwise_mix(x, *spatial, act),
        "channel half": lambda: native.pointwise_mix(x, *channel, act),
        "block": lambda: native.mixer_stack(x, [weight], [packed], shape.kernel_size, act),
    }


#: Peers on each device, as far as the preset's systems have them.
PEERS = {
    "cpu": (EAGER, "eager channels-last"),
    "cuda": (
        EAGER,
        "eager NCHW + cudnn.benchmark",
        "eager channels-last",
        "eager channels-last + cudnn.benchmark",
        "torch.compile",
        "torch.compile + layout_optimization=False",
    ),
}


@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_block_and_its_halves(
    shape: BlockShape,
    block_batch: int,
    threads: int,
    device: Device,
    benchmark: Any,
    preset: Preset,
    record: BenchmarkRecorder,
) -> None:
    on_cpu = device.kind == "cpu"
    if on_cpu and native.load() is None:
        pytest.skip(native.why_unavailable())
    group = f"{shape}, batch {block_batch}, {device.label}"
    record.wanted("kernels", group)
    device.enter()
    torch._dynamo.reset()
    c, k, side = shape.channels, shape.kernel_size, shape.side
    block = reference_block(c, k, ACTIVATIONS[shape.act])
    trained_like_(block, (1, c, side, side))
    block = device.model(block)
    x = torch.randn(block_batch, c, side, side, generator=torch.Generator().manual_seed(1))
    inputs, checked = device.inputs(x), device.checked(block_batch)
    some = inputs.first[:checked]
    plain = {"depthwise half": block[:1], "channel half": block[1:], "block": block}
    # Name of a run -> its half and its system.
    systems: dict[str, tuple[str, str]] = {}
    runs: dict[str, Run] = {}
    notes: dict[tuple[str, str], str] = {}
    with torch.no_grad():
        if on_cpu:
            ours = _ours(block, inputs.first, shape)
        else:
            last = inputs.channels_last()
            ours = {half: eager(optimize(plain[half], inplace=False), last) for half in HALVES}
        for half in HALVES:
            same = plain[half](inputs.first)[:checked]
            exact = devices.oracle(plain[half], some)
            run = ours[half]
            if isinstance(run, str):
                notes[half, "ours"] = run
                others = {}
            else:
                assert_numerics(run()[:checked], same, exact)
                others = {"ours": run}
            found, _, missing = build(
                [name for name in PEERS[device.kind] if name in preset.systems],
                device.kind,
                plain[half],
                inputs,
                lambda y, same=same, exact=exact: check_peer(y[:checked], same, exact),
            )
            notes |= {(half, name): why for name, why in missing.items()}
            for name, one in {**others, **found}.items():
                systems[f"{half}, {name}"] = (half, name)
                runs[f"{half}, {name}"] = one
        measured = measure(runs, device, preset, benchmark)
    pixels, size = side * side, device.dtype.itemsize
    halves = {
        "depthwise half": (depthwise_half(block_batch, c, k, pixels, size),),
        "channel half": (pointwise_half(block_batch, c, pixels, size),),
    }
    halves["block"] = halves["depthwise half"] + halves["channel half"]
    at = {"model": str(shape), "batch": block_batch}
    rows = []
    for name, (half, system) in systems.items():
        row = measured.row(name, of_blocks(block_batch, halves[half]))
        rows.append({**at, "part": half, **row, "system": system})
    rows += [
        {**at, "part": half, **device.columns, "system": name, "note": note}
        for (half, name), note in notes.items()
    ]
    rows += [{**at, **row} for row in measured.limit_rows()]
    record("kernels", group, rows)
