"""Static bars of the shipped patch embedding tile, compiled without a GPU."""

from __future__ import annotations

import pytest
import torch
from triton_modes import assert_bars, compiler, skip_code_without_loops

pytest.importorskip("triton", reason="Triton is not installed")

from gpu_static import stem

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = compiler


def meets_the_bars(
    architecture: int,
    dtype: torch.dtype,
    tf32: bool = False,
    uint8: bool = False,
    **of: object,
) -> None:
    built = stem.build(architecture, dtype, tf32=tf32, uint8=uint8, **of)
    skip_code_without_loops(built.report)
    assert_bars(stem.bars(built, dtype, tf32, uint8).broken)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_patches_of_7_in_bf16_meet_the_bars(architecture: int) -> None:
    meets_the_bars(architecture, BF16)


@pytest.mark.parametrize("architecture", [80, 89, 90])
def test_patches_of_14_from_uint8_meet_the_bars(architecture: int) -> None:
    meets_the_bars(architecture, BF16, dim=1024, patch=14, uint8=True)


def test_float32_meets_the_bars_on_80() -> None:
    meets_the_bars(80, FP32)


@pytest.mark.gpu_static_full
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize(("dim", "patch"), [(1536, 7), (1024, 14)])
@pytest.mark.parametrize(
    ("dtype", "tf32"), [(BF16, False), (FP16, False), (FP32, True), (FP32, False)]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_published_stem(
    architecture: int, dtype: torch.dtype, tf32: bool, dim: int, patch: int, uint8: bool
) -> None:
    meets_the_bars(architecture, dtype, tf32, dim=dim, patch=patch, uint8=uint8)
