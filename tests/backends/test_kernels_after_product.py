"""The epilogue after a GEMM of PyTorch's is right: interpreted, simulated, on hardware."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import POINTWISE_CASES, MatrixCase, check, draw
from torch import Tensor
from triton_modes import compiler, interpreter, run_in_interpreter, triton_simulator

pytest.importorskip("triton", reason="Triton is not installed")

from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.backends import self_check
from convmixer_fast.backends.triton.kernels import operands
from convmixer_fast.backends.triton.kernels.after_product import after_product_
from convmixer_fast.ops import pointwise_mix, use_backend
from convmixer_fast.ops.common import activation, affine
from convmixer_fast.ops.dispatch import call_of, choose
from convmixer_fast.ops.pointwise import POINTWISE
from convmixer_fast.testing import assert_numerics

SMALL = [c for c in POINTWISE_CASES if not c.large]
HALF = (torch.bfloat16, torch.float16)


def by_product(x, weight, bias, scale, shift, act, out=None) -> Tensor:
    """The whole half, as the operators put it together."""
    rows, _ = operands.pixel_rows(x, x.shape[0] * x.shape[2] * x.shape[3])
    h = F.conv2d(rows, weight)
    out = operands.result("by_product", out, tuple(h.shape), x)
    return after_product_(out.copy_(h), bias, scale, shift, act)


@compiler
def test_the_interpreter_finds_every_shape_right() -> None:
    assert " passed" in run_in_interpreter(__file__)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL[:9], ids=str)
def test_interpreter(case: MatrixCase, dtype: torch.dtype) -> None:
    check(by_product, case, dtype)


@interpreter
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_interpreter_activations(act: str) -> None:
    case = MatrixCase("several_tiles", 2, 8, 5, 5, 520, act=act)
    check(by_product, case, torch.float32)


def in_float64(case: MatrixCase, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """What the kernel makes of random float64 sums, NaN and infinity among them, and PyTorch."""
    g = torch.Generator().manual_seed(0)
    numbers = [torch.randn(s, generator=g, dtype=torch.float64) for s in (case.d,) * 3]
    bias, scale, shift = (t.to(device) for t in numbers)
    h = 3 * torch.randn(case.n, case.d, case.h, case.w, generator=g, dtype=torch.float64)
    h[0, 0, 0, :] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -40.0])
    h = h.to(device).contiguous(memory_format=torch.channels_last)
    wide = h if not case.bias else h + bias.view(1, -1, 1, 1)
    theirs = affine(activation(wide, case.act), scale, shift)
    got = after_product_(h, bias if case.bias else None, scale, shift, case.act)
    assert got is h
    return got, theirs


def assert_alike(got: Tensor, theirs: Tensor) -> None:
    """Equal where not finite, else within a few of float64's units at the results' scale."""
    assert got.dtype == theirs.dtype == torch.float64
    finite = theirs.isfinite()
    assert not finite.all()
    torch.testing.assert_close(got[~finite], theirs[~finite], equal_nan=True)
    assert_numerics(got[finite], theirs[finite], theirs[finite])


@interpreter
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("channels", [37, 136])
def test_interpreter_float64(act: str, channels: int) -> None:
    case = MatrixCase("float64", 2, 8, 5, 5, channels, act=act, bias=channels != 37)
    assert_alike(*in_float64(case))


@interpreter
@pytest.mark.parametrize("layout", ["nhwc", "nchw", "channel_slice"])
def test_interpreter_float64_operator(layout: str) -> None:
    """PyTorch's product with the kernel after it, checked before its first use."""
    case = MatrixCase("float64", 2, 24, 4, 5, 40, layout=layout)
    o = draw(case, torch.float64)
    given = (o.x, o.weight, o.bias, o.scale.double(), o.shift.double(), case.act)
    self_check.forget()
    with use_backend("triton"):
        got = pointwise_mix(*given)
        choice = choose(call_of(POINTWISE, *given[:3], case.act))
    assert list(self_check.results().values()) == [""]
    assert choice.reason == (
        "asked for by name: PyTorch's product and one Triton kernel for the rest, "
        "checked against PyTorch; not triton: the Triton kernels compute float32, bfloat16 and "
        "float16, not float64"
    )
    with use_backend("reference"):
        theirs = pointwise_mix(*given)
    assert got.stride() == theirs.stride()
    torch.testing.assert_close(got, theirs, rtol=1e-13, atol=1e-13)


@compiler
@pytest.mark.parametrize("name", ["several_tiles_and_steps", "odd_channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_simulated(name: str, dtype: torch.dtype) -> None:
    """Result, races and bounds: strict raises for each."""
    simulator: ModuleType = triton_simulator()
    case = next(c for c in POINTWISE_CASES if c.name == name)
    with simulator.triton_on_cpu(cc=80, strict=True) as log:
        check(by_product, case, dtype)
    assert len(log) == 1


@compiler
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_simulated_float64(act: str) -> None:
    simulator: ModuleType = triton_simulator()
    case = MatrixCase("float64", 1, 8, 9, 5, 136, act=act)
    with simulator.triton_on_cpu(cc=80, strict=True) as log:
        assert_alike(*in_float64(case))
    assert len(log) == 1


@compiler
def test_simulated_memory_traffic() -> None:
    """Each element once in and once out, every sector whole."""
    simulator: ModuleType = triton_simulator()
    o = draw(MatrixCase("block", 1, 64, 8, 8, 256), torch.float32)
    h = torch.randn(1, 256, 8, 8).contiguous(memory_format=torch.channels_last)
    with simulator.triton_on_cpu(cc=80, strict=True) as log:
        after_product_(h, o.bias, o.scale, o.shift, "gelu")
    c = log[0].counters
    assert c["global_st_sectors"] * 32 == c["global_st_bytes"] == h.numel() * 4
    assert c["global_ld_sectors"] * 32 <= 1.02 * c["global_ld_bytes"]
    assert c["footprint_ld_sectors"] * 32 == h.numel() * 4 + 3 * 256 * 4


@compiler
def test_refuses_with_the_name_of_what_does_not_fit() -> None:
    o = draw(MatrixCase("block", 1, 8, 4, 4, 8), torch.float16)
    h = torch.zeros(1, 8, 4, 4, dtype=torch.float16).to(memory_format=torch.channels_last)
    good = [h, o.bias, o.scale, o.shift, "relu"]
    bad = {
        "channels-last without gaps": (0, torch.zeros(1, 8, 4, 4, dtype=torch.float16)),
        "bias must be": (1, torch.zeros(3)),
        "scale must be float32": (2, o.scale.half()),
        "shift must be": (3, o.shift[:5]),
        "unknown activation": (4, "tanh"),
        "on meta": (2, o.scale.to("meta")),
    }
    for message, (place, value) in bad.items():
        with pytest.raises(ValueError, match=message):
            after_product_(*good[:place], value, *good[place + 1 :])
    with pytest.raises(ValueError, match=r"h must be float64, .* got torch.int32"):
        after_product_(h.int(), *good[1:])
    with pytest.raises(ValueError, match=r"scale must be float64, got torch.float32"):
        after_product_(h.double(), *good[1:])
    assert after_product_(h[:0], *good[1:]).shape == (0, 8, 4, 4)


@compiler
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", POINTWISE_CASES, ids=str)
def test_on_hardware(case: MatrixCase, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check(by_product, case, dtype, "cuda")


@compiler
@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_float64_on_hardware(act: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert_alike(*in_float64(MatrixCase("float64", 2, 8, 9, 5, 1537, act=act), "cuda"))
