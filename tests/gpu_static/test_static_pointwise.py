"""Static bars of the shipped 1x1 convolution tiles, compiled without a GPU."""

from __future__ import annotations

import pytest
import torch
from triton_modes import assert_bars, compiler, rocm_compiler

pytest.importorskip("triton", reason="Triton is not installed")

from gpu_static import pointwise

from convmixer_fast.backends.triton.configs import (
    POINTWISE,
    PointwiseConfig,
    family,
    lookup_pointwise,
    pointwise_candidates,
)

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: dtype, TF32
ARITHMETICS = ((BF16, False), (FP16, False), (FP32, True), (FP32, False))
LARGE = {"rows": 2**16, "columns": 1536}
NARROW = next(r.config for r in POINTWISE if r.narrower_than)

pytestmark = compiler


def words(config: PointwiseConfig) -> str:
    return (
        f"{config.block_m}x{config.block_n}x{config.block_k}-w{config.num_warps}"
        f"-s{config.num_stages}{'-descriptors' if config.descriptors else ''}"
    )


def meets_the_bars(
    config: PointwiseConfig, architecture: int, dtype: torch.dtype, tf32: bool, act: str = "gelu"
) -> None:
    if config == NARROW:
        # It is never used with aligned channels; test_odd_channels holds its bars.
        pytest.skip("the tile for odd channel counts")
    built = pointwise.build(config, architecture, dtype, act=act, tf32=tf32)
    assert_bars(pointwise.bars(built, config, dtype, tf32).broken)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_large_bf16_tile_meets_the_bars(architecture: int) -> None:
    meets_the_bars(lookup_pointwise(architecture, BF16, **LARGE), architecture, BF16, False)


@pytest.mark.parametrize("architecture", [90, 100])
def test_the_large_tile_without_descriptors_meets_the_bars(architecture: int) -> None:
    config = lookup_pointwise(architecture, BF16, **LARGE, descriptors=False)
    assert not config.descriptors
    meets_the_bars(config, architecture, BF16, False)


@pytest.mark.parametrize("tf32", [False, True])
def test_the_large_float32_tiles_meet_the_bars_on_89(tf32: bool) -> None:
    meets_the_bars(lookup_pointwise(89, FP32, **LARGE, tf32=tf32), 89, FP32, tf32)


@pytest.mark.parametrize("channels", [1537, 1538])
def test_odd_channels_compile_without_spilling(channels: int) -> None:
    built = pointwise.build(NARROW, 80, BF16, channels=channels)
    assert_bars(pointwise.odd_channels_bars(built).broken)
    assert built.report.has("HMMA.16816.F32")


def test_channels_by_8_are_copied_16_bytes_at_a_time() -> None:
    # 1544 = 8 * 193: Triton itself only sees multiples of 16.
    config = lookup_pointwise(80, BF16, rows=2**16, columns=1544)
    built = pointwise.build(config, 80, BF16, channels=1544)
    facts = pointwise.facts(built, config)
    assert set(facts["copy_bits"]) == set(facts["store_bits"]) == {128}
    assert facts["spills"] == 0


def test_more_rows_than_int32_counts_compile_to_the_same_loop() -> None:
    config = lookup_pointwise(80, BF16, **LARGE)
    built = pointwise.build(config, 80, BF16, long_rows=True)
    assert_bars(pointwise.bars(built, config, BF16).broken)


def test_the_rocm_tile_compiles_for_gfx942() -> None:
    config = lookup_pointwise(0, BF16, **LARGE)
    with rocm_compiler():
        built = pointwise.build_hip(config, "gfx942", BF16)
    assert "mfma" in built.asm["amdgcn"]
    assert built.metadata.shared <= 64 * 1024


@pytest.mark.gpu_static_full
@pytest.mark.parametrize("act", ["gelu", "relu", "silu", "hardswish", "identity"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_activation_of_the_large_tile(architecture: int, act: str) -> None:
    meets_the_bars(lookup_pointwise(architecture, BF16, **LARGE), architecture, BF16, False, act)


@pytest.mark.gpu_static_full
@pytest.mark.parametrize(
    ("architecture", "dtype", "tf32", "config"),
    [
        pytest.param(a, dtype, tf32, c, id=f"{a}-{str(dtype)[6:]}-{tf32}-{words(c)}")
        for a in ARCHITECTURES
        for dtype, tf32 in ARITHMETICS
        for c in pointwise_candidates(a, dtype, tf32)
    ],
)
def test_every_shipped_tile(
    architecture: int, dtype: torch.dtype, tf32: bool, config: PointwiseConfig
) -> None:
    meets_the_bars(config, architecture, dtype, tf32)


@pytest.mark.gpu_static_full
@pytest.mark.parametrize("channels", [1537, 1538])
@pytest.mark.parametrize(("dtype", "tf32"), ARITHMETICS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_odd_channels_everywhere(
    architecture: int, dtype: torch.dtype, tf32: bool, channels: int
) -> None:
    built = pointwise.build(NARROW, architecture, dtype, channels=channels, tf32=tf32)
    assert_bars(pointwise.odd_channels_bars(built).broken)


@pytest.mark.gpu_static_full
@pytest.mark.parametrize(("dtype", "tf32"), ARITHMETICS)
def test_every_rocm_tile(dtype: torch.dtype, tf32: bool) -> None:
    for config in pointwise_candidates(0, dtype, tf32):
        with rocm_compiler():
            built = pointwise.build_hip(config, "gfx942", dtype, tf32=tf32)
        assert built.metadata.shared <= 64 * 1024


def test_every_row_has_a_reason_and_can_be_reached() -> None:
    assert all(len(row.reason) > 20 for row in POINTWISE)
    reached = {
        lookup_pointwise(a, dtype, rows=rows, columns=n, vector_bytes=v, tf32=tf32)
        for a in (0, *ARCHITECTURES)
        for dtype, tf32 in ARITHMETICS
        for rows, n in ((1, 32), (2**18, 48), (2**18, 1536))
        for v in (2, 16)
    }
    assert {row.config for row in POINTWISE} == reached


@pytest.mark.parametrize(
    ("architecture", "group"), [(0, 0), (80, 80), (87, 86), (89, 86), (103, 100), (121, 120)]
)
def test_architectures_without_rows_of_their_own(architecture: int, group: int) -> None:
    assert family(architecture) == group
