"""Triton kernels on CPU tensors against torch."""

import ptxsim
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
F = torch.nn.functional
kernels = pytest.importorskip("kernels")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def launches():
    with ptxsim.triton_on_cpu(cc=80, strict=True) as log:
        yield log


def close(out, ref, tolerance):
    error = (out.double() - ref.double()).abs().max().item()
    assert error <= tolerance * max(1.0, ref.double().abs().max().item()), error


def test_vadd(launches):
    a, b = torch.randn(2, 1024)
    for n in (1024, 1000):
        c = torch.full_like(a, float("nan"))
        kernels.vadd[(1,)](a, b, c, n, B=1024)
        assert torch.equal(c[:n], (a + b)[:n])
        assert c[n:].isnan().all()
        assert ptxsim.last() is launches[-1]
    vector, scalar = launches
    assert vector.counters["global_ld_sectors"] == 256
    assert vector.counters["global_ld_requests"] == 16
    # 1000 is no multiple of 16: the mask is per element, every lane loads its 4 floats one by one
    assert scalar.counters["global_ld_sectors"] == 1000
    assert scalar.counters["footprint_ld_sectors"] == 250


@pytest.mark.parametrize(("scale", "flag"), [(3, True), (0.5, False)])
def test_scalar_arguments(launches, scale, flag):
    x, y = torch.randn(200), torch.full((200,), float("nan"))
    kernels.scale_shift[(2,)](x, y, 200, scale, 2.5, flag, B=128)
    assert torch.allclose(y, (x * scale + 2.5) * (1 if flag else -1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
def test_layernorm_and_softmax(launches, warps):
    x, g, b = torch.randn(9, 400).bfloat16(), torch.randn(400), torch.randn(400)
    y = torch.empty_like(x)
    kernels.layernorm[(9,)](x, g, b, y, 400, 1e-5, B=512, num_warps=warps)
    close(y, F.layer_norm(x.double(), (400,), g.double(), b.double()), 1e-2)
    x = torch.randn(9, 400)
    y = torch.empty_like(x)
    kernels.softmax[(9,)](x, y, 400, B=512, num_warps=warps)
    close(y, x.double().softmax(1), 1e-6)


@pytest.mark.parametrize("tile", [(32, 64, 32, 4, 2), (128, 64, 64, 8, 3), (16, 16, 16, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gemm(launches, dtype, tile):
    bm, bn, bk, warps, stages = tile
    m, n, k = 136, 80, 72
    a, b, bias, res = (torch.randn(s).to(dtype) for s in ((m, k), (n, k), (n,), (m, n)))
    c = torch.empty(m, n, dtype=dtype)
    grid = (triton.cdiv(m, bm) * triton.cdiv(n, bn),)
    kernels.gemm_silu[grid](
        a,
        b,
        bias.float(),
        res,
        c,
        m,
        n,
        k,
        k,
        k,
        BM=bm,
        BN=bn,
        BK=bk,
        G=4,
        PRECISION="tf32",
        num_warps=warps,
        num_stages=stages,
    )
    r = a.double() @ b.double().T + bias.double()
    close(c, r * torch.sigmoid(r) + res, 1e-2)
    kind = {torch.float32: "tf32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    tiles = grid[0] * -(-k // bk)
    assert launches[-1].counters["mma_flops_" + kind] == tiles * 2 * bm * bn * bk


def test_gemm_fp32_ieee_uses_fma(launches):
    a, b = torch.randn(48, 32), torch.randn(32, 32)
    c, zero = torch.empty(48, 32), torch.zeros(48, 32)
    kernels.gemm_silu[(2,)](
        a,
        b,
        torch.zeros(32),
        zero,
        c,
        48,
        32,
        32,
        32,
        32,
        BM=32,
        BN=32,
        BK=32,
        G=1,
        PRECISION="ieee",
    )
    r = a.double() @ b.double().T
    close(c, r * torch.sigmoid(r), 1e-6)
    assert launches[-1].thread["fma.rn.f32"] >= 64 * 32 * 32


@pytest.mark.parametrize("cc", [86, 89, 120])
def test_gemm_on_other_targets(cc):
    with ptxsim.triton_on_cpu(cc=cc, strict=True):
        a, b, c = (
            torch.randn(100, 64).half(),
            torch.randn(64, 64).half(),
            torch.empty(100, 64).half(),
        )
        kernels.matmul[(2, 1)](a, b, c, 100, 64, 64, 64, 64, 64, BM=64, BN=64, BK=32)
    close(c, a.double() @ b.double(), 1e-2)


@pytest.mark.parametrize("order", ["warp", "reverse", "random"])
def test_gemm_in_other_orders(order):
    with ptxsim.triton_on_cpu(cc=80, strict=True, order=order, seed=5, poison=("c",)) as log:
        a, b, c = (
            torch.randn(130, 64).half(),
            torch.randn(64, 96).half(),
            torch.empty(130, 96).half(),
        )
        kernels.matmul[(3, 2)](a, b, c, 130, 96, 64, 64, 96, 96, BM=64, BN=64, BK=32)
        close(c, a.double() @ b.double(), 1e-2)
        x, y = torch.randn(9, 400), torch.empty(9, 400)
        kernels.softmax[(9,)](x, y, 400, B=512)
        close(y, x.double().softmax(1), 1e-6)
    assert log[0].unwritten == {"c": 0}


def test_attention(launches):
    h, s, d = 2, 100, 64
    q, k, v = (torch.randn(h, s, d).bfloat16() for _ in range(3))
    o = torch.empty_like(q)
    kernels.attention[(2, h)](q, k, v, o, s, d**-0.5 * 1.4426950408889634, D=d, BM=64, BN=32)
    close(o, F.scaled_dot_product_attention(q.double(), k.double(), v.double()), 1e-2)


def test_scan_sort_atomics_argmax(launches):
    n, b = 512, 256
    x = torch.randint(1, 1000, (n,), dtype=torch.int32)
    y, z, counts = torch.empty_like(x), torch.empty_like(x), torch.zeros(32, dtype=torch.int32)
    kernels.scan_sort_atomics[(2,)](x, y, z, counts, n, B=b)
    assert torch.equal(y, x.view(2, b).cumsum(1).view(-1).int())
    assert torch.equal(z, x.view(2, b).sort(1).values.view(-1))
    assert torch.equal(counts[:16], torch.bincount((x & 15).long(), minlength=16).int())
    assert counts[16] == x.max()
    assert torch.equal(counts[17:19], x.view(2, b).argmax(1).int())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float_atomics(launches, dtype):
    n = 1000
    x = torch.randint(-3, 4, (n,)).float()
    s32, s16 = torch.zeros(8), torch.zeros(8, dtype=dtype)
    kernels.float_atomics[(4,)](x, s32, s16, n, B=256)
    expected = torch.zeros(8).index_add_(0, torch.arange(n) % 8, x)
    assert torch.equal(s32, expected)
    assert torch.equal(s16.float(), expected)


def test_math(launches):
    n = 3000
    x, y = torch.randn(n) * 3, torch.empty(n)
    kernels.math_functions[(3,)](x, y, n, B=1024)
    d, i = x.double(), torch.arange(n)
    r = (
        d.exp()
        + (d.abs() + 1).log()
        + d.sin() * d.cos()
        + d.abs().sqrt()
        + d.erf()
        + d.floor()
        + d / 3.7
    )
    r = r + (d * d + 1).rsqrt()
    close(y, torch.where(d > 0, r, -r) + (x * 7).int() + i % 7 + i // 5, 1e-5)


def test_libdevice_erf_exp_tanh(launches):
    x = torch.cat(
        [torch.linspace(-20, 20, 2000), torch.tensor([0.0, -0.0, 1e-30, 88.7, -103.0, -87.5])]
    )
    n = x.numel()
    e, f, h = torch.empty(3, n)
    kernels.libdevice_functions[(2,)](x, e, f, h, n, B=1024)
    close(e, x.double().erf(), 3e-7)
    close(h, x.double().tanh(), 3e-7)
    exact = x.double().exp()
    assert ((f.double() - exact).abs() <= 4e-7 * exact + 2e-45).all()


def test_int8_dot(launches):
    a, b = (torch.randint(-99, 99, (32, 64), dtype=torch.int8) for _ in range(2))
    c = torch.empty(32, 32, dtype=torch.int32)
    kernels.int8_dot[(1,)](a, b, c, 64, BM=32, BN=32, BK=32)
    assert torch.equal(c, a.int() @ b.int().T)


def test_out_of_bounds_is_an_error(launches):
    with pytest.raises(ptxsim.PTXError, match="out of bounds"):
        kernels.out_of_bounds[(1,)](torch.zeros(100), B=256)


def depthwise_reference(x, w, bias=None):
    c, k = x.shape[-1], w.shape[0]
    y = F.conv2d(
        x.double().permute(0, 3, 1, 2),
        w.double().permute(2, 0, 1)[:, None],
        bias,
        padding=k // 2,
        groups=c,
    )
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_depthwise_7x7_gelu(launches, dtype):
    n, h, w_, c = 2, 9, 11, 72
    x, w, b = (
        torch.randn(n, h, w_, c).to(dtype),
        (torch.randn(7, 7, c) * 0.2).to(dtype),
        torch.randn(c).to(dtype),
    )
    y = torch.full_like(x, float("nan"))
    kernels.depthwise[(2, 5, n * 2)](x, w, b, y, n, h, w_, c, K=7, BH=2, BW=8, BC=64)
    close(
        y, F.gelu(depthwise_reference(x, w, b.double())), 1e-5 if dtype == torch.float32 else 8e-3
    )


@pytest.mark.parametrize(
    ("k", "warps", "cc"),
    [(3, 1, 80), (5, 2, 80), (9, 4, 80), (9, 8, 80), (5, 2, 90), (5, 2, 100), (5, 2, 120)],
)
def test_depthwise_row_accumulators(k, warps, cc):
    n, h, w_, c = 2, 7, 13, 48
    x, w = torch.randn(n, h, w_, c).bfloat16(), (torch.randn(k, k, c) * 0.2).bfloat16()
    y = torch.empty_like(x)
    with ptxsim.triton_on_cpu(cc=cc, strict=True, poison=("y",)) as log:
        kernels.depthwise_row[(2, 2, n * 2)](x, w, y, h, w_, c, K=k, BR=4, BC=32, num_warps=warps)
    close(y, depthwise_reference(x, w), 8e-3)
    assert log[0].unwritten == {"y": 0}


def test_depthwise_weight_gradient(launches):
    n, h, w, c, k = 2, 10, 9, 48, 5
    x, dy, dw = (
        torch.randn(n, h, w, c).half(),
        torch.randn(n, h, w, c).half(),
        torch.empty(k * k, c),
    )
    kernels.depthwise_weight_grad[(2, k * k)](x, dy, dw, n, h, w, c, K=k, BC=32, BP=64)
    wt = torch.zeros(c, 1, k, k, dtype=torch.double, requires_grad=True)
    y = F.conv2d(x.double().permute(0, 3, 1, 2), wt, padding=k // 2, groups=c)
    y.backward(dy.double().permute(0, 3, 1, 2))
    close(dw, wt.grad[:, 0].permute(1, 2, 0).reshape(k * k, c), 1e-3)


def test_views_and_nested_contexts():
    from triton.runtime.driver import driver

    before = driver._active
    base = torch.randn(3, 1000)
    with ptxsim.triton_on_cpu(80) as outer:
        kernels.vadd[(1,)](base[0], base[1], base[2], 1000, B=1024)
        with ptxsim.triton_on_cpu(90) as inner:
            kernels.vadd[(1,)](base[0], base[1], base[2], 1000, B=1024)
        kernels.vadd[(1,)](base[0], base[1], base[2], 1000, B=1024)
    assert torch.equal(base[2], base[0] + base[1])
    assert len(outer) == 2
    assert len(inner) == 1
    assert driver._active is before


def test_install_and_uninstall():
    from triton.runtime.driver import driver

    before = driver._active
    a, b, c = torch.randn(3, 100)
    ptxsim.install_triton(cc=80)
    try:
        ptxsim.install_triton(cc=86, strict=True)
        kernels.vadd[(1,)](a, b, c, 100, B=128)
        assert torch.equal(c, a + b)
        assert ptxsim.log[-1] is ptxsim.last()
    finally:
        ptxsim.uninstall_triton()
    assert driver._active is before


def test_sampled_launch_and_checks_off():
    a, b, c = torch.randn(3, 10000)
    with ptxsim.triton_on_cpu(80, max_ctas=4, race=False, init=False, counters=False) as log:
        kernels.vadd[(40,)](a, b, c, 10000, B=256)
    assert log[0].ctas == 4
    assert log[0].ctas_total == 40
    assert log[0].counters["global_ld_sectors"] == 0


def test_autotune_takes_the_first_configuration(launches):
    tuned = triton.autotune([triton.Config({"B": b}) for b in (256, 512)], key=["n"])(kernels.vadd)
    a, b, c = torch.randn(3, 1000)
    tuned[lambda meta: (triton.cdiv(1000, meta["B"]),)](a, b, c, 1000)
    assert torch.equal(c, a + b)
    assert launches[-1].ctas_total == 4
