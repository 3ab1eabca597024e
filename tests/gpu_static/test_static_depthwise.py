"""Static bars of the shipped depthwise tiles, compiled without a GPU."""

from __future__ import annotations

import pytest
import torch
from triton_modes import assert_bars, compiler, rocm_compiler, skip_code_without_loops

pytest.importorskip("triton", reason="Triton is not installed")

from gpu_static import depthwise

from convmixer_fast.backends.triton.configs import DEPTHWISE, DepthwiseConfig, lookup_depthwise

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
SIZES = (3, 5, 7, 9)

pytestmark = compiler


def meets_the_bars(
    config: DepthwiseConfig, architecture: int, dtype: torch.dtype, k: int, **of: object
) -> None:
    built = depthwise.build(config, architecture, dtype, k, **of)
    skip_code_without_loops(built.report)
    assert_bars(depthwise.bars(built, config, dtype, k).broken)


@pytest.mark.parametrize(
    ("architecture", "dtype", "k"),
    [
        *((a, BF16, 9) for a in ARCHITECTURES),
        *((a, BF16, 7) for a in (80, 89, 90)),
        (80, FP16, 9),
        (89, FP16, 9),
        (80, FP32, 9),
        (86, FP32, 7),
        (120, FP16, 7),
    ],
)
def test_the_published_variants_meet_the_bars(
    architecture: int, dtype: torch.dtype, k: int
) -> None:
    meets_the_bars(lookup_depthwise(dtype, k, 1536), architecture, dtype, k)


@pytest.mark.parametrize("edges", ["one", "two", "any"])
def test_rows_of_few_tiles_do_not_spill(edges: str) -> None:
    config = lookup_depthwise(BF16, 9, 1536)
    built = depthwise.build(config, 90, BF16, 9, edges=edges)
    found = depthwise.rows_of_tiles_bars(built, config, BF16, 9, edges)
    assert_bars(found.broken)
    assert found.excused == []


def test_odd_channels_compile_without_spilling() -> None:
    config = lookup_depthwise(BF16, 5, 1537)
    built = depthwise.build(config, 80, BF16, 5, channels=1537, pair=False)
    f = depthwise.facts(built, config, 5)
    assert (f["spills"], f["stack"]) == (0, 0)


def test_kernels_of_31_taps_fit_the_registers() -> None:
    config = lookup_depthwise(BF16, 31, 256)
    built = depthwise.build(config, 80, BF16, 31, channels=256, edges="one")
    found = depthwise.rows_of_tiles_bars(built, config, BF16, 31)
    assert_bars(found.broken)
    assert found.excused == []


def test_the_tile_compiles_for_gfx942() -> None:
    config = lookup_depthwise(BF16, 9, 1536)
    with rocm_compiler():
        built = depthwise.build_hip(config, "gfx942", BF16, 9)
    assert "v_fma" in built.asm["amdgcn"] or "v_pk_fma_f32" in built.asm["amdgcn"]
    assert built.metadata.shared == 0


# The first parameter varies fastest: an interrupted run has covered every architecture and dtype.
@pytest.mark.gpu_static_full
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", SIZES[::-1])
@pytest.mark.parametrize("channels", [1536, 32])
def test_every_shipped_tile(architecture: int, dtype: torch.dtype, k: int, channels: int) -> None:
    config = lookup_depthwise(dtype, k, channels)
    meets_the_bars(config, architecture, dtype, k, channels=channels)


@pytest.mark.gpu_static_full
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("edges", ["one", "two", "any"])
@pytest.mark.parametrize("k", SIZES[::-1])
def test_every_row_of_tiles(architecture: int, dtype: torch.dtype, k: int, edges: str) -> None:
    config = lookup_depthwise(dtype, k, 1536)
    built = depthwise.build(config, architecture, dtype, k, edges=edges)
    skip_code_without_loops(built.report)
    assert_bars(depthwise.rows_of_tiles_bars(built, config, dtype, k, edges).broken)


@pytest.mark.gpu_static_full
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_compiles_for_gfx942(dtype: torch.dtype, k: int) -> None:
    for row in DEPTHWISE:
        if k in row.kernel_sizes:
            channels = 1536 if 1536 in row.channels else 32
            with rocm_compiler():
                depthwise.build_hip(row.config, "gfx942", dtype, k, channels=channels)


def test_every_row_has_a_reason_and_can_be_reached() -> None:
    assert all(len(row.reason) > 20 for row in DEPTHWISE)
    reached = {lookup_depthwise(BF16, k, c) for k in range(1, 32) for c in (1, 32, 63, 64, 1536)}
    assert {row.config for row in DEPTHWISE} == reached


def test_no_tile_is_wider_than_the_padding_of_the_taps() -> None:
    from convmixer_fast.backends.triton.kernels.depthwise import MAX_COLUMNS

    assert all(row.config.columns <= MAX_COLUMNS for row in DEPTHWISE)
