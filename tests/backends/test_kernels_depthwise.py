"""The GPU's depthwise kernel is right on every shape: interpreted, simulated, on hardware."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
import torch
from gpu_cases import (
    DEPTHWISE_CASES,
    DepthwiseCase,
    check_depthwise,
    draw_depthwise,
    enough_draws,
    plain_depthwise,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_modes import compiler, interpreter, run_in_interpreter, triton_simulator

pytest.importorskip("triton", reason="Triton is not installed")

from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.backends.triton.configs import DepthwiseConfig
from convmixer_fast.backends.triton.kernels.depthwise import (
    MAX_COLUMNS,
    depthwise_mix,
    edges,
    pack_taps,
)

SMALL = [c for c in DEPTHWISE_CASES if not c.large]
HALF = (torch.bfloat16, torch.float16)
#: A tile that the interpreter, which runs one tile after another, has few values in.
LITTLE = DepthwiseConfig(columns=4, rows=2, channels=8, taps=3, warps=4)


def named(name: str) -> DepthwiseCase:
    return next(c for c in DEPTHWISE_CASES if c.name == name)


def run(case: DepthwiseCase, dtype: torch.dtype, device: str = "cpu", **kw: object) -> None:
    check_depthwise(depthwise_mix, pack_taps, case, dtype, device, **kw)


@pytest.fixture(name="simulator")
def _simulator() -> ModuleType:
    return triton_simulator()


@compiler
def test_the_interpreter_finds_every_shape_right() -> None:
    assert " passed" in run_in_interpreter(__file__)


@interpreter
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_interpreter(case: DepthwiseCase) -> None:
    # bfloat16 is the simulator's: the interpreter computes on its bits.
    run(case, torch.float16 if case.c % 4 else torch.float32)


@interpreter
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_interpreter_activations(act: str) -> None:
    case = DepthwiseCase("acts", 1, 8, 4, 8, 3, act=act)
    run(case, torch.float16, config=LITTLE)


@interpreter
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 2),
    c=st.integers(1, 19),
    h=st.integers(1, 7),
    w=st.integers(1, 14),
    k=st.integers(1, 7),
    layout=st.sampled_from(["nhwc", "nchw", "image_slice", "row_slice", "column_slice"]),
    half=st.booleans(),
)
def test_interpreter_drawn_shapes(
    n: int, c: int, h: int, w: int, k: int, layout: str, half: bool
) -> None:
    case = DepthwiseCase("drawn", n, c, h, w, k, layout=layout)
    dtype, draws = torch.float16 if half else torch.float32, enough_draws(n, c, h, w)
    run(case, dtype, config=LITTLE, draws=draws)


@interpreter
@pytest.mark.parametrize(("n", "h"), [(4, 2), (1, 4)], ids=["images", "rows"])
def test_interpreter_past_two_to_the_31_elements(n: int, h: int) -> None:
    # Four images or rows, 2^30 elements apart: the last begins at element 3.2e9. Most of the
    # memory is never touched, and so never there.
    o = draw_depthwise(DepthwiseCase("far", n, 8, h, 4, 3), torch.float16)
    apart = 2**30
    room = torch.empty(3 * apart + 64, dtype=torch.float16)
    far = room.as_strided((n, 8, h, 4), (apart, 1, 32 if n > 1 else apart, 8))
    far.copy_(o.x)
    rest = (pack_taps(o.weight), o.bias, o.scale, o.shift, "gelu", 3)
    ours = depthwise_mix(far, *rest, config=LITTLE)
    assert torch.equal(ours, depthwise_mix(o.x, *rest, config=LITTLE))


@interpreter
def test_interpreter_values_that_are_not_finite_stay_in_their_window() -> None:
    case = DepthwiseCase("nan", 1, 8, 9, 16, 3, act="relu")
    o = draw_depthwise(case, torch.float32)
    o.x[0, 0, 0, 0], o.x[0, 3, 4, 8], o.x[0, 5, 8, 15] = float("nan"), float("inf"), float("nan")
    rest = (pack_taps(o.weight), o.bias, o.scale, o.shift, "relu", 3)
    ours = depthwise_mix(o.x, *rest, config=LITTLE)
    right = plain_depthwise(o, "relu", torch.float32)
    assert 8 <= int(right.isnan().sum()) < 40
    torch.testing.assert_close(ours, right, equal_nan=True)


@compiler
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((c.name, torch.bfloat16) for c in SMALL),
        ("three_tiles", torch.float16),
        ("odd_channels", torch.float16),
        ("three_tiles", torch.float32),
    ],
    ids=str,
)
def test_simulated(simulator: ModuleType, name: str, dtype: torch.dtype) -> None:
    """Result, races, bounds, bytes never written: strict raises for each."""
    with simulator.triton_on_cpu(cc=80, strict=True, poison=("Y",)) as log:
        run(named(name), dtype)
    assert len(log) == 1
    # No shared memory: no bank to conflict in.
    assert log[0].bank_conflicts() == {}


@compiler
@settings(max_examples=4, deadline=None)
@given(
    c=st.integers(1, 80),
    h=st.integers(1, 12),
    w=st.integers(1, 30),
    k=st.integers(1, 6),
)
def test_simulated_drawn_shapes(c: int, h: int, w: int, k: int) -> None:
    with triton_simulator().triton_on_cpu(cc=80, strict=True, poison=("Y",)):
        case = DepthwiseCase("drawn", 1, c, h, w, k)
        run(case, torch.bfloat16, draws=enough_draws(c, h, w))


@compiler
@pytest.mark.parametrize(("channels", "k"), [(128, 9), (128, 7)])
def test_simulated_memory_traffic(simulator: ModuleType, channels: int, k: int) -> None:
    """What the roofline takes for granted: whole sectors, each from DRAM once, few requests."""
    case = DepthwiseCase("traffic", 1, channels, 32, 32, k)
    o = draw_depthwise(case, torch.bfloat16)
    rest = (pack_taps(o.weight), o.bias, o.scale, o.shift, "gelu", k)
    with simulator.triton_on_cpu(cc=80, strict=True) as log:
        depthwise_mix(o.x, *rest)
    stats = log[0]
    c = stats.counters
    # Of 64 bits a thread, a request is eight sectors; taps are 128 bits, shared by the two rows.
    assert c["global_ld_sectors"] * 32 <= 1.15 * c["global_ld_bytes"]
    assert c["global_st_sectors"] * 32 == c["global_st_bytes"]
    assert stats.sectors_per_request("st") == 8
    once = 2 * channels * 32 * 32 + 4 * channels * k * k
    assert c["footprint_ld_sectors"] * 32 <= 1.05 * once
    for gpu, binding in (("A100", {"fp32", "issue"}), ("RTX 4090", {"dram"})):
        bound = simulator.model.bound(stats, gpu)
        assert bound.limit in binding, str(bound)
        assert bound.times["l2"] <= 1.2 * bound.seconds, str(bound)


@compiler
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 9, 31])
def test_tiles_cover_every_row_and_see_the_edges_they_are_compiled_for(k: int) -> None:
    # The kernel's own arithmetic, over all widths.
    columns, before, after = 8, (k - 1) // 2, k // 2
    for w in range(1, 100):
        mode = edges(w, k, columns)
        if mode == "any":
            continue
        tiles = -(-w // columns)
        assert tiles == {"one": 1, "two": 2}.get(mode, max(3, tiles))
        covered = set()
        for i in range(tiles):
            ow = min(i * columns, w - columns)
            if mode == "many" and i < tiles - 1:
                ow = min(ow, w - columns - after)
            assert ow == 0 if i == 0 else ow >= before
            assert ow + columns == w if i == tiles - 1 else ow + columns + after <= w
            covered |= set(range(ow, ow + columns))
        assert covered == set(range(w))
    assert edges(32, 9, columns) == "many"
    assert edges(16, 9, columns) == "two"


@compiler
def test_packed_taps_are_the_weights_and_zeros() -> None:
    weight = torch.randn(5, 1, 3, 3).to(torch.bfloat16)
    taps = pack_taps(weight)
    assert taps.shape == (9 + 2 + MAX_COLUMNS, 5)
    assert torch.equal(taps[:9].t().reshape(5, 1, 3, 3), weight.float())
    assert taps[9:].eq(0).all()
    with pytest.raises(ValueError, match=r"must be \(C, 1, k, k\)"):
        pack_taps(weight[..., :2])


@compiler
def test_empty() -> None:
    o = draw_depthwise(named("one_tile"), torch.float32)
    rest = (pack_taps(o.weight), o.bias, o.scale, o.shift, "relu", 3)
    assert depthwise_mix(o.x[:0], *rest).shape == (0, 64, 8, 8)
    assert depthwise_mix(o.x[..., :0], *rest).shape == (2, 64, 8, 0)


@compiler
def test_refuses_with_the_name_of_what_does_not_fit() -> None:
    o = draw_depthwise(named("one_tile"), torch.float16)
    good = [o.x, pack_taps(o.weight), o.bias, o.scale, o.shift, "relu", 3]
    bad = {
        r"x must be \(N, C, H, W\)": (0, o.x[0]),
        "x must be float32, float16 or bfloat16": (0, o.x.double()),
        "taps must be pack_taps": (1, o.weight),
        "bias must be": (2, torch.zeros(3)),
        "scale must be float32": (3, o.scale.half()),
        "shift must be": (4, o.shift[:5]),
        "unknown activation": (5, "tanh"),
        r"a \(64, 1, 5, 5\) weight": (6, 5),
        "on meta": (3, o.scale.to("meta")),
    }
    for message, (place, value) in bad.items():
        with pytest.raises(ValueError, match=message):
            depthwise_mix(*good[:place], value, *good[place + 1 :])
    with pytest.raises(ValueError, match="dense channels-last"):
        depthwise_mix(*good, out=torch.empty(o.x.shape, dtype=torch.float16))


@compiler
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", DEPTHWISE_CASES, ids=str)
def test_on_hardware(case: DepthwiseCase, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    run(case, dtype, "cuda")


@compiler
@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_on_hardware_activations(act: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    run(dataclasses.replace(named("three_tiles"), act=act), torch.bfloat16, "cuda")


@compiler
@pytest.mark.gpu
def test_on_hardware_the_same_bits_every_time() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    o = draw_depthwise(named("width_1024"), torch.bfloat16, "cuda")
    rest = (pack_taps(o.weight), o.bias, o.scale, o.shift, "gelu", 9)
    first = depthwise_mix(o.x, *rest)
    for _ in range(1000):
        assert torch.equal(depthwise_mix(o.x, *rest), first)
