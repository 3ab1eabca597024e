"""The GPU's patch embedding is right for every image: interpreted, simulated, on hardware."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from gpu_cases import STEM_CASES, MatrixCase, check, draw, enough_draws
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_modes import compiler, interpreter, run_in_interpreter, triton_simulator

pytest.importorskip("triton", reason="Triton is not installed")

from convmixer_fast.backends.triton.kernels.stem import patch_embed

SMALL = [c for c in STEM_CASES if not c.large]


def named(name: str) -> MatrixCase:
    return next(c for c in STEM_CASES if c.name == name)


@pytest.fixture(name="simulator")
def _simulator() -> ModuleType:
    return triton_simulator()


@compiler
def test_the_interpreter_finds_every_image_right() -> None:
    assert " passed" in run_in_interpreter(__file__)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_interpreter(case: MatrixCase, dtype: torch.dtype) -> None:
    check(patch_embed, case, dtype)


@interpreter
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 4),
    p=st.integers(1, 9),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    rest=st.integers(0, 8),
    d=st.integers(1, 140),
    layout=st.sampled_from(["nhwc", "nchw", "image_slice", "column_slice", "channel_slice"]),
    pixels=st.sampled_from(["float", "uint8"]),
    half=st.booleans(),
)
def test_interpreter_drawn_images(
    n: int,
    c: int,
    p: int,
    rows: int,
    columns: int,
    rest: int,
    d: int,
    layout: str,
    pixels: str,
    half: bool,
) -> None:
    # Up to p - 1 rows and columns fill no patch.
    h, w = rows * p + rest % p, columns * p + (rest // 2) % p
    case = MatrixCase("drawn", n, c, h, w, d, p, layout=layout, pixels=pixels)
    dtype, draws = torch.float16 if half else torch.float32, enough_draws(n, d, rows, columns)
    check(patch_embed, case, dtype, draws=draws)


@interpreter
def test_interpreter_images_past_two_to_the_31_elements() -> None:
    small = draw(MatrixCase("far", 3, 3, 8, 8, 24, 4, layout="nchw"), torch.float16)
    rest = (small.weight, small.bias, small.scale, small.shift, "gelu")
    right = patch_embed(small.x, *rest)
    # Images, channels, rows or columns so far apart that one step of each kind passes 2^31; hardly
    # any of that memory is touched.
    for strides in (
        (12 * 10**8, 64, 8, 1),
        (3 * 10**8, 12 * 10**8, 8, 1),
        (24, 8, 8 * 10**8, 1),
        (24, 8, 1, 8 * 10**8),
    ):
        last = sum(s * (k - 1) for s, k in zip(strides, small.x.shape, strict=True))
        far = torch.empty(last + 1, dtype=torch.float16).as_strided(small.x.shape, strides)
        assert last > 2**31
        assert torch.equal(patch_embed(far.copy_(small.x), *rest), right)


@interpreter
def test_interpreter_images_of_another_dtype_are_rounded_to_the_weight() -> None:
    o = draw(named("patch_7"), torch.float16)
    rest = (o.weight, o.bias, o.scale, o.shift, "gelu")
    finer = o.x.float() * 1.0001
    assert torch.equal(patch_embed(finer, *rest), patch_embed(finer.half(), *rest))


@compiler
@pytest.mark.parametrize("name", ["patch_7", "patch_14", "many_channels", "uint8", "patch_1"])
def test_simulated(simulator: ModuleType, name: str) -> None:
    """Result, races, bounds, bytes never written: strict raises for each."""
    with simulator.triton_on_cpu(cc=80, strict=True, poison=("out",)) as log:
        check(patch_embed, named(name), torch.bfloat16)
    assert len(log) == 1
    for kind, (took, ideal) in log[0].bank_conflicts().items():
        assert took <= 1.05 * ideal, (kind, took, ideal)


@compiler
@pytest.mark.parametrize("name", ["channels_last_image", "uint8_grey"])
def test_simulated_half_and_float32(simulator: ModuleType, name: str) -> None:
    for dtype in (torch.float16, torch.float32):
        with simulator.triton_on_cpu(cc=80, strict=True, poison=("out",)):
            check(patch_embed, named(name), dtype)


@compiler
def test_empty() -> None:
    o = draw(named("patch_7"), torch.float32)
    rest = (o.weight, o.bias, o.scale, o.shift, "relu")
    assert patch_embed(o.x[:0], *rest).shape == (0, 40, 4, 3)
    assert patch_embed(o.x[:, :, :6], *rest).shape == (2, 40, 0, 3)


@compiler
def test_refuses_with_the_name_of_what_does_not_fit() -> None:
    o = draw(named("uint8"), torch.float16)
    operands = (o.weight, o.bias, o.scale, o.shift, "relu")
    with pytest.raises(ValueError, match="need mean and std"):
        patch_embed(o.x, *operands, mean=o.mean)
    with pytest.raises(ValueError, match="mean and std are for uint8"):
        patch_embed(o.x.half(), *operands, mean=o.mean, std=o.std)
    with pytest.raises(ValueError, match="std must have a number for each of 3 channels, got 1"):
        patch_embed(o.x, *operands, mean=o.mean, std=(1.0,))
    with pytest.raises(ValueError, match="x must be uint8, float32"):
        patch_embed(o.x.int(), *operands)
    with pytest.raises(ValueError, match="weight is for 3 channels, x has 2"):
        patch_embed(o.x[:, :2].half(), *operands)


@compiler
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", STEM_CASES, ids=str)
def test_on_hardware(case: MatrixCase, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check(patch_embed, case, dtype, "cuda")
