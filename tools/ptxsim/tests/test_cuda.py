"""nvcc kernels: results against numpy, in every scheduling order."""

import ctypes
from math import erf

import numpy as np
import ptxsim
import pytest
from ptxsim.types import bf16_to_f32, f32_to_bf16
from reference import mix_reference

rng = np.random.default_rng(0)


def bf16(shape, scale=1.0):
    return f32_to_bf16((rng.standard_normal(shape) * scale).astype("f4"))


def gelu(r):
    return 0.5 * r * (1 + np.vectorize(erf)(r * 0.70710678))


def gemm_problem(m, n, k):
    a, b, bias = bf16((m, k)), bf16((n, k)), rng.standard_normal(n).astype("f4")
    return a, b, bias, gelu(bf16_to_f32(a).astype("f8") @ bf16_to_f32(b).astype("f8").T + bias)


def run_gemm(module, problem, **settings):
    a, b, bias, _ = problem
    (m, k), n = a.shape, b.shape[0]
    c = np.zeros((m, n), np.uint16)
    stats = module.launch(
        "gemm",
        ((n + 63) // 64, (m + 63) // 64),
        128,
        [a, b, bias, c, m, n, k],
        poison=(3,),
        **settings,
    )
    return bf16_to_f32(c), stats


def test_vadd_is_exact(basic):
    a, b, c = rng.standard_normal((3, 1000)).astype("f4")
    stats = basic.launch("vadd", 8, 128, [a, b, c, 1000], poison=(2,), strict=True)
    assert np.array_equal(c, a + b)
    # 1000 floats are 125 sectors; two inputs, one output
    assert stats.counters["global_ld_sectors"] == 250
    assert stats.counters["global_st_sectors"] == 125


@pytest.mark.parametrize("order", ptxsim.ORDERS)
@pytest.mark.parametrize("block", [1, 33, 100, 1024])
def test_block_sizes_that_are_no_multiple_of_a_warp(basic, block, order):
    n = 300
    a, b, c = rng.standard_normal((3, n)).astype("f4")
    stats = basic.launch(
        "vadd", -(-n // block), block, [a, b, c, n], poison=(2,), strict=True, order=order
    )
    assert np.array_equal(c, a + b)
    assert stats.thread["add.rn.f32"] + stats.thread["add.f32"] == n


@pytest.mark.parametrize("order", ptxsim.ORDERS)
def test_tiled_matmul_counts_known_from_the_code(basic, order):
    x, y = rng.integers(-5, 6, (2, 64, 64)).astype("f4")
    z = np.zeros((64, 64), "f4")
    stats = basic.launch(
        "smem_mm", (4, 4), (16, 16), [x, y, z, 64], order=order, seed=3, poison=(2,), strict=True
    )
    assert np.array_equal(z, x @ y)
    assert stats.matching("fma") == 16 * 8 * 64  # CTAs x warps x K
    assert stats.counters["global_st_sectors"] == 512
    took, ideal = stats.bank_conflicts()["st"]
    assert took - ideal == 512  # sb[16][17]: a warp writes two rows 17 words apart


def test_warp_shuffle_sum(basic):
    a, out = np.arange(1000, dtype="f4"), np.zeros(32, "f4")
    basic.launch("warp_sum", 8, 128, [a, out, 1000], strict=True)
    assert np.array_equal(out, np.pad(a, (0, 24)).reshape(32, 32).sum(1))


def test_half_fma_rounds_once(basic):
    a, b, c = rng.standard_normal((3, 1000)).astype("f2")
    basic.launch("half_fma", 8, 128, [a, b, c, 1000], strict=True)
    assert np.array_equal(c, (a.astype("f8") * b.astype("f8") + 1.5).astype("f2"))


def test_single_mma(basic):
    a, b = (f32_to_bf16(rng.integers(-4, 5, s).astype("f4")) for s in ((16, 16), (8, 16)))
    c = np.zeros((16, 8), "f4")
    stats = basic.launch("one_mma", 1, 32, [a, b, c], strict=True)
    assert np.array_equal(c, bf16_to_f32(a) @ bf16_to_f32(b).T)
    assert stats.counters["mma_flops_bf16"] == 2 * 16 * 8 * 16


def test_depthwise3_with_dynamic_shared_memory(basic):
    H, W, C = 9, 7, 40
    x, w = rng.standard_normal((H, W, C)).astype("f2"), rng.standard_normal((3, 3, C)).astype("f2")
    y, total = np.zeros((H, W, C), "f4"), np.zeros(1, "f4")
    basic.launch(
        "dw3",
        (W, 3, 2),
        (32, 4),
        [x, w, y, total, H, W, C],
        dynamic_smem=64,
        strict=True,
        poison=(2,),
    )
    p = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    s = sum((p[i : i + H, j : j + W] * w[i, j]).astype("f4") for i in range(3) for j in range(3))
    assert np.allclose(y, np.maximum(s, 0) + np.exp(-np.abs(s)), 1e-4, 1e-4)
    assert abs(total[0] - s.sum()) < 1e-2


@pytest.mark.parametrize(("sel", "seed"), [(s, s) for s in range(4)])
def test_divergent_kernel_against_python(basic, sel, seed):
    n = 200
    x = np.random.default_rng(seed).integers(0, 1000, n).astype("i4")
    y, z, h = np.zeros(n, "i4"), np.zeros(n, "f8"), np.zeros((n, 2), "f2")
    order = ptxsim.ORDERS[seed % 4]
    basic.launch("mix", 2, 128, [x, y, z, h, n, sel], order=order, poison=(1, 2, 3), strict=True)
    assert np.array_equal(y, mix_reference(x, sel))
    assert np.allclose(z, np.sqrt((y & 1023).astype("f8")) / 3 + np.abs(y.astype("f8")), rtol=1e-15)
    assert np.array_equal(h[:, 0], ((y & 7) * 0.5 + 1 + (y & 1)).astype("f2"))


def test_struct_parameter_and_mangled_name(basic):
    class Affine(ctypes.Structure):
        _fields_ = [("scale", ctypes.c_float), ("shift", ctypes.c_float), ("n", ctypes.c_int)]

    x, y = np.arange(100, dtype="f4"), np.zeros(100, "f4")
    basic.launch("affine", 1, 128, [x, y, Affine(2.0, 1.0, 100)], strict=True)
    assert np.array_equal(y, 2 * x + 1)


@pytest.mark.parametrize("order", ["lockstep", "random"])
def test_barrier_with_reduction(basic, order):
    x, y = rng.integers(0, 9, 256).astype("i4"), np.zeros(256, "i4")
    basic.launch("count_and_table", 2, 128, [x, y], order=order, strict=True)
    assert np.array_equal(y, np.repeat((x & 1).reshape(2, 128).sum(1), 128))


def test_torch_tensors_are_updated_in_place(basic):
    torch = pytest.importorskip("torch")
    a, b, c = torch.randn(3, 500)
    basic.launch("vadd", 4, 128, [a, b, c, 500])
    assert torch.equal(c, a + b)


@pytest.mark.parametrize("shape", [(128, 128, 128), (200, 152, 96)])
@pytest.mark.parametrize("order", ptxsim.ORDERS)
def test_gemm_with_swizzle_and_async_copies(gemm, shape, order):
    problem = gemm_problem(*shape)
    c, stats = run_gemm(gemm, problem, order=order, strict=True)
    assert np.allclose(c, problem[3], rtol=8e-3, atol=2e-2)
    for kind in ("ldmatrix", "cpasync"):
        took, ideal = stats.bank_conflicts()[kind]
        assert took == ideal, kind
