"""Is what follows a product that PyTorch computed right? Interpreted, simulated, on hardware."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from eyes import compiler, interpreter, run_in_interpreter, triton_simulator
from gpu_cases import POINTWISE_CASES, MatrixCase, check, draw
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.kernels import operands
from convmixer_fast.kernels.after_product import after_product_

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
    assert after_product_(h[:0], *good[1:]).shape == (0, 8, 4, 4)


@compiler
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", POINTWISE_CASES, ids=str)
def test_on_hardware(case: MatrixCase, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check(by_product, case, dtype, "cuda")
