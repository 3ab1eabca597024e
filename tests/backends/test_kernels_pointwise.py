"""The GPU's 1x1 convolution is right on every shape: interpreted, simulated, on hardware."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from gpu_cases import POINTWISE_CASES, MatrixCase, check, draw, enough_draws
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_modes import compiler, interpreter, run_in_interpreter, triton_simulator

pytest.importorskip("triton", reason="Triton is not installed")

from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.backends.triton import support
from convmixer_fast.backends.triton.configs import PointwiseConfig
from convmixer_fast.backends.triton.kernels import operands
from convmixer_fast.backends.triton.kernels.pointwise import pointwise_mix

SMALL = [c for c in POINTWISE_CASES if not c.large]
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def _precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def named(name: str) -> MatrixCase:
    return next(c for c in POINTWISE_CASES if c.name == name)


@pytest.fixture(name="simulator")
def _simulator() -> ModuleType:
    return triton_simulator()


@compiler
def test_the_interpreter_finds_every_shape_right() -> None:
    assert " passed" in run_in_interpreter(__file__)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_interpreter(case: MatrixCase, dtype: torch.dtype) -> None:
    check(pointwise_mix, case, dtype)


@interpreter
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_interpreter_activations(act: str) -> None:
    case = dataclasses.replace(named("several_tiles_and_steps"), act=act)
    check(pointwise_mix, case, torch.float32)


@interpreter
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 130),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    d=st.integers(1, 150),
    layout=st.sampled_from(
        ["nhwc", "nchw", "channel_slice", "odd_channel_slice", "image_slice", "column_slice"]
    ),
    half=st.booleans(),
)
def test_interpreter_drawn_shapes(
    n: int, c: int, h: int, w: int, d: int, layout: str, half: bool
) -> None:
    case = MatrixCase("drawn", n, c, h, w, d, layout=layout)
    dtype, draws = torch.float16 if half else torch.float32, enough_draws(n, d, h, w)
    check(pointwise_mix, case, dtype, draws=draws)


@interpreter
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_interpreter_descriptors(case: MatrixCase, halves: bool) -> None:
    # Shapes that the copy engine cannot address must take the other kernel, the rest this one.
    config = PointwiseConfig(64, 32, 32, descriptors=True, halves=halves)
    by_8_alone = 8 in (math.gcd(16, case.c), math.gcd(16, case.d))
    if by_8_alone and support.triton_version().startswith("3.4."):
        pytest.skip("the interpreter of Triton 3.4 takes strides of elements for bytes")
    check(pointwise_mix, case, torch.float16, config=config)


@interpreter
def test_interpreter_rows_past_two_to_the_31_elements() -> None:
    # 700 pixels, 4 Mi elements apart: the last begins at element 2.9e9. Most of the memory is
    # never touched, and so never there.
    apart, pixels, c, d = 2**22, 700, 16, 24
    small = draw(MatrixCase("far", 1, c, 1, pixels, d), torch.float16)
    room = torch.empty(apart * pixels, dtype=torch.float16)
    far = room.as_strided((1, c, 1, pixels), (apart * pixels, 1, apart * pixels, apart))
    far.copy_(small.x)
    assert operands.pixel_rows(far, pixels) == (far, apart)
    rest = (small.weight, small.bias, small.scale, small.shift, "gelu")
    assert torch.equal(pointwise_mix(far, *rest), pointwise_mix(small.x, *rest))


@compiler
@pytest.mark.parametrize(
    "name",
    ["several_tiles_and_steps", "odd_channels", "channels_by_4", "one_channel", "channel_slice"],
)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_simulated(simulator: ModuleType, name: str, dtype: torch.dtype) -> None:
    """Result, races, bounds, bytes never written: strict raises for each."""
    with simulator.triton_on_cpu(cc=80, strict=True, poison=("out",)) as log:
        check(pointwise_mix, named(name), dtype)
    assert len(log) == 1
    for kind, (took, ideal) in log[0].bank_conflicts().items():
        assert took <= 1.05 * ideal, (kind, took, ideal)


@compiler
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_simulated_with_warps_out_of_step(simulator: ModuleType, order: str) -> None:
    # A barrier that is missing gives a wrong result in these orders.
    case = dataclasses.replace(named("several_tiles_and_steps"), c=160)
    config = PointwiseConfig(128, 128, 32, num_stages=4)
    with simulator.triton_on_cpu(cc=80, strict=True, order=order, seed=1, poison=("out",)):
        check(pointwise_mix, case, torch.bfloat16, config=config)


@compiler
@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("tf32", [False, True])
def test_simulated_float32(simulator: ModuleType, tf32: bool) -> None:
    """TF32 only where PyTorch's matrix products may use it."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    case = named("several_tiles_and_steps")
    with simulator.triton_on_cpu(cc=80, strict=True, poison=("out",)) as log:
        if tf32:
            o = draw(case, torch.float32)
            pointwise_mix(o.x, o.weight, o.bias, o.scale, o.shift, case.act)
        else:
            check(pointwise_mix, case, torch.float32)
    used = {k for k, v in log[0].counters.items() if k.startswith("mma_flops_") and v}
    assert used == ({"mma_flops_tf32"} if tf32 else set())


@compiler
def test_simulated_memory_traffic(simulator: ModuleType) -> None:
    """Every sector asked for is used whole, 16 bytes a lane, with no bank conflict."""
    config = PointwiseConfig(128, 128, 32, num_stages=4)
    case = MatrixCase("block", 1, 256, 16, 16, 256)
    o = draw(case, torch.bfloat16)
    with simulator.triton_on_cpu(cc=80, strict=True) as log:
        pointwise_mix(o.x, o.weight, o.bias, o.scale, o.shift, "gelu", config=config)
    stats = log[0]
    c = stats.counters
    assert c["global_ld_sectors"] * 32 <= 1.02 * c["global_ld_bytes"]
    assert c["global_st_sectors"] * 32 == c["global_st_bytes"]
    assert stats.sectors_per_request("st") == 16
    operands_bytes = 2 * 256 * (256 + 256) + 256 * (2 + 4 + 4)
    assert c["footprint_ld_sectors"] * 32 <= 1.01 * operands_bytes
    # Two tiles each way: either operand is read twice.
    assert stats.reread() <= 2.05
    for kind, (took, ideal) in stats.bank_conflicts().items():
        assert took <= 1.05 * ideal, (kind, took, ideal)


@compiler
def test_empty() -> None:
    o = draw(MatrixCase("empty", 1, 8, 4, 4, 16), torch.float32)
    rest = (o.bias, o.scale, o.shift, "relu")
    assert pointwise_mix(o.x[:0], o.weight, *rest).shape == (0, 16, 4, 4)
    assert pointwise_mix(o.x[..., :0], o.weight, *rest).shape == (1, 16, 4, 0)


@interpreter
def test_interpreter_no_channels_in() -> None:
    # An empty sum is 0. PyTorch's convolution loses the output channels here.
    o = draw(MatrixCase("nothing", 1, 0, 2, 3, 8), torch.float32)
    y = pointwise_mix(o.x, o.weight, o.bias, o.scale, o.shift, "relu")
    right = torch.relu(o.bias) * o.scale + o.shift
    torch.testing.assert_close(y, right.view(1, -1, 1, 1).expand(1, 8, 2, 3))


@compiler
def test_refuses_with_the_name_of_what_does_not_fit() -> None:
    o = draw(named("block"), torch.float16)
    good = [o.x, o.weight, o.bias, o.scale, o.shift, "relu"]
    bad = {
        "weight is for 32 channels": (1, o.weight[:, :32]),
        "bias must be": (2, torch.zeros(3)),
        "scale must be float32": (3, o.scale.half()),
        "shift must be": (4, o.shift[:5]),
        "unknown activation": (5, "tanh"),
        "x is torch.float32": (0, o.x.float()),
        "float32, float16 or bfloat16": (1, o.weight.double()),
        "on meta": (3, o.scale.to("meta")),
        r"must be \(D, C, 1, 1\)": (1, torch.zeros(64, 64, 2, 2, dtype=torch.float16)),
    }
    for message, (place, value) in bad.items():
        with pytest.raises(ValueError, match=message):
            pointwise_mix(*good[:place], value, *good[place + 1 :])
    with pytest.raises(ValueError, match="channels-last without gaps"):
        pointwise_mix(*good, out=torch.empty(o.x.shape, dtype=torch.float16))


@compiler
def test_slices_are_read_in_place_and_other_layouts_copied() -> None:
    o = draw(named("channel_slice"), torch.float16)
    x, stride = operands.pixel_rows(o.x, 40)
    assert x is o.x
    assert stride == 64
    o = draw(named("column_slice"), torch.float16)
    x, stride = operands.pixel_rows(o.x, 40)
    assert stride == 32
    assert torch.equal(x, o.x)
    assert x.data_ptr() != o.x.data_ptr()


@compiler
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", POINTWISE_CASES, ids=str)
def test_on_hardware(case: MatrixCase, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check(pointwise_mix, case, dtype, "cuda")


@compiler
@pytest.mark.gpu
def test_on_hardware_the_same_bits_every_time() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    o = draw(named("width_1024_batch_1"), torch.bfloat16, "cuda")
    rest = (o.weight, o.bias, o.scale, o.shift, "gelu")
    first = pointwise_mix(o.x, *rest)
    for _ in range(1000):
        assert torch.equal(pointwise_mix(o.x, *rest), first)
