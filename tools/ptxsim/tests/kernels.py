"""Triton kernels used by the tests."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def vadd(a, b, c, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(c + i, tl.load(a + i, mask=m) + tl.load(b + i, mask=m), mask=m)


@triton.jit
def scale_shift(x, y, n, scale: tl.float32, shift: tl.bfloat16, flag, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < n) * scale + shift
    tl.store(y + i, tl.where(flag, v, -v), mask=i < n)


@triton.jit
def out_of_bounds(x, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(x + i, tl.load(x + i) + 1)


@triton.jit
def layernorm(x, g, b, y, C, eps, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    m = i < C
    v = tl.load(x + r * C + i, mask=m, other=0.0).to(tl.float32)
    d = tl.where(m, v - tl.sum(v, 0) / C, 0.0)
    o = d * tl.rsqrt(tl.sum(d * d, 0) / C + eps) * tl.load(g + i, mask=m, other=0.0)
    tl.store(y + r * C + i, (o + tl.load(b + i, mask=m, other=0.0)).to(y.dtype.element_ty), mask=m)


@triton.jit
def softmax(x, y, C, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    m = i < C
    v = tl.load(x + r * C + i, mask=m, other=-float("inf"))
    v = tl.exp(v - tl.max(v, 0))
    tl.store(y + r * C + i, v / tl.sum(v, 0), mask=m)


@triton.jit
def matmul(a, b, c, M, N, K, sam, sbk, scm, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    pa = a + rm[:, None] * sam + rk[None, :]
    pb = b + rk[:, None] * sbk + rn[None, :]
    for k in range(0, K, BK):
        x = tl.load(pa, mask=(rm[:, None] < M) & (rk[None, :] + k < K), other=0.0)
        y = tl.load(pb, mask=(rk[:, None] + k < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(x, y, acc)
        pa += BK
        pb += BK * sbk
    tl.store(
        c + rm[:, None] * scm + rn[None, :],
        acc.to(c.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


@triton.jit
def gemm_silu(
    a,
    b,
    bias,
    res,
    c,
    M,
    N,
    K,
    sam,
    sbn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    G: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """c = silu(a @ b^T + bias) + res with grouped program order."""
    pid = tl.program_id(0)
    nm = tl.cdiv(M, BM)
    nn = tl.cdiv(N, BN)
    width = G * nn
    first = (pid // width) * G
    size = min(nm - first, G)
    pm = first + (pid % width) % size
    pn = (pid % width) // size
    rm = (pm * BM + tl.arange(0, BM)) % M
    rn = (pn * BN + tl.arange(0, BN)) % N
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        kk = k * BK + rk
        x = tl.load(a + rm[:, None] * sam + kk[None, :], mask=kk[None, :] < K, other=0.0)
        y = tl.load(b + rn[None, :] * sbn + kk[:, None], mask=kk[:, None] < K, other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    om = pm * BM + tl.arange(0, BM)
    on = pn * BN + tl.arange(0, BN)
    m = (om[:, None] < M) & (on[None, :] < N)
    acc += tl.load(bias + on, mask=on < N, other=0.0)[None, :]
    acc = acc * tl.sigmoid(acc) + tl.load(
        res + om[:, None] * N + on[None, :], mask=m, other=0.0
    ).to(tl.float32)
    tl.store(c + om[:, None] * N + on[None, :], acc.to(c.dtype.element_ty), mask=m)


@triton.jit
def attention(q, k, v, o, S, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    h = tl.program_id(1) * S * D
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    Q = tl.load(q + h + rm[:, None] * D + d[None, :], mask=rm[:, None] < S, other=0.0)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for s in range(0, S, BN):
        rn = s + tl.arange(0, BN)
        K = tl.load(k + h + rn[None, :] * D + d[:, None], mask=rn[None, :] < S, other=0.0)
        V = tl.load(v + h + rn[:, None] * D + d[None, :], mask=rn[:, None] < S, other=0.0)
        p = tl.where(rn[None, :] < S, tl.dot(Q, K) * scale, -float("inf"))
        new = tl.maximum(top, tl.max(p, 1))
        shrink = tl.exp2(top - new)
        p = tl.exp2(p - new[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(Q.dtype), V)
        top = new
    tl.store(
        o + h + rm[:, None] * D + d[None, :],
        (acc / total[:, None]).to(o.dtype.element_ty),
        mask=rm[:, None] < S,
    )


@triton.jit
def scan_sort_atomics(x, y, z, counts, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    v = tl.load(x + i, mask=m, other=0)
    tl.store(y + i, tl.cumsum(v, 0), mask=m)
    tl.store(z + i, tl.sort(v), mask=m)
    tl.atomic_add(counts + (v & 15), 1, mask=m)
    tl.atomic_max(counts + 16, tl.max(v, 0))
    tl.store(counts + 17 + tl.program_id(0), tl.argmax(v, 0))


@triton.jit
def float_atomics(x, s32, s16, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    v = tl.load(x + i, mask=m, other=0.0)
    tl.atomic_add(s32 + i % 8, v, mask=m)
    tl.atomic_add(s16 + i % 8, v.to(s16.dtype.element_ty), mask=m)


@triton.jit
def math_functions(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    v = tl.load(x + i, mask=m, other=1.0)
    r = (
        tl.exp(v)
        + tl.log(tl.abs(v) + 1)
        + tl.sin(v) * tl.cos(v)
        + tl.sqrt(tl.abs(v))
        + tl.erf(v)
        + tl.floor(v)
    )
    r += v / 3.7 + tl.rsqrt(v * v + 1)
    r = tl.where(v > 0, r, -r) + (v * 7).to(tl.int32).to(tl.float32) + (i % 7).to(tl.float32)
    tl.store(y + i, r + (i // 5).to(tl.float32), mask=m)


@triton.jit
def libdevice_functions(x, e, f, h, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    v = tl.load(x + i, mask=m, other=0.0)
    tl.store(e + i, libdevice.erf(v), mask=m)
    tl.store(f + i, libdevice.exp(v), mask=m)
    tl.store(h + i, libdevice.tanh(v), mask=m)


@triton.jit
def int8_dot(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.int32)
    for s in range(0, K, BK):
        acc = tl.dot(
            tl.load(a + m[:, None] * K + s + k[None, :]),
            tl.load(b + n[None, :] * K + s + k[:, None]),
            acc,
        )
    tl.store(c + m[:, None] * BN + n[None, :], acc)


@triton.jit
def depthwise(
    x, w, bias, y, N, H, W, C, K: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr
):
    """One load per tap; channels last, same padding, bias, GELU."""
    oh = tl.program_id(1) * BH + tl.arange(0, BH)
    ow = tl.program_id(0) * BW + tl.arange(0, BW)
    blocks = tl.cdiv(C, BC)
    n = tl.program_id(2) // blocks
    c = (tl.program_id(2) % blocks) * BC + tl.arange(0, BC)
    cm = c < C
    acc = tl.zeros((BH, BW, BC), tl.float32)
    for kh in range(K):
        ih = oh + kh - K // 2
        for kw in tl.static_range(K):
            iw = ow + kw - K // 2
            m = (
                ((ih >= 0) & (ih < H))[:, None, None]
                & ((iw >= 0) & (iw < W))[None, :, None]
                & cm[None, None, :]
            )
            v = tl.load(
                x + ((n * H + ih[:, None, None]) * W + iw[None, :, None]) * C + c[None, None, :],
                mask=m,
                other=0.0,
            )
            wt = tl.load(w + (kh * K + kw) * C + c, mask=cm, other=0.0)
            acc += v.to(tl.float32) * wt.to(tl.float32)[None, None, :]
    acc += tl.load(bias + c, mask=cm, other=0.0).to(tl.float32)[None, None, :]
    acc = 0.5 * acc * (1 + tl.math.erf(acc * 0.70710678118))
    om = (oh < H)[:, None, None] & (ow < W)[None, :, None] & cm[None, None, :]
    tl.store(
        y + ((n * H + oh[:, None, None]) * W + ow[None, :, None]) * C + c[None, None, :],
        acc.to(y.dtype.element_ty),
        mask=om,
    )


@triton.jit
def depthwise_row(x, w, y, H, W, C, K: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Depthwise rows: eight output columns and accumulators [BR, BC] a program.

    Each input column is loaded once; int64 image offset, uniform border/interior branch per row,
    taps unrolled, kernel rows looped.
    """
    T: tl.constexpr = 8
    R: tl.constexpr = K // 2
    ow = tl.program_id(0) * T
    oh = tl.program_id(1) * BR + tl.arange(0, BR)
    blocks = tl.cdiv(C, BC)
    image = (tl.program_id(2) // blocks).to(tl.int64) * H * W * C
    c = (tl.program_id(2) % blocks) * BC + tl.arange(0, BC)
    cm = c < C
    zero = tl.zeros((BR, BC), tl.float32)
    a0, a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero, zero
    for kh in range(K):
        ih = oh + kh - R
        rows = (ih >= 0) & (ih < H)
        base = x + image + (ih * W)[:, None] * C + c[None, :]
        for col in tl.static_range(T + K - 1):
            iw = ow + col - R
            m = rows[:, None] & cm[None, :] & (iw >= 0) & (iw < W)
            v = tl.load(base + iw * C, mask=m, other=0.0).to(tl.float32)
            for t in tl.static_range(T):
                if col - t >= 0 and col - t < K:
                    p = (
                        v
                        * tl.load(w + (kh * K + col - t) * C + c, mask=cm, other=0.0).to(
                            tl.float32
                        )[None, :]
                    )
                    if t == 0:
                        a0 += p
                    elif t == 1:
                        a1 += p
                    elif t == 2:
                        a2 += p
                    elif t == 3:
                        a3 += p
                    elif t == 4:
                        a4 += p
                    elif t == 5:
                        a5 += p
                    elif t == 6:
                        a6 += p
                    else:
                        a7 += p
    out = y + image + (oh * W)[:, None] * C + c[None, :]
    om = (oh < H)[:, None] & cm[None, :]
    dt = y.dtype.element_ty
    tl.store(out + (ow + 0) * C, a0.to(dt), mask=om & (ow + 0 < W))
    tl.store(out + (ow + 1) * C, a1.to(dt), mask=om & (ow + 1 < W))
    tl.store(out + (ow + 2) * C, a2.to(dt), mask=om & (ow + 2 < W))
    tl.store(out + (ow + 3) * C, a3.to(dt), mask=om & (ow + 3 < W))
    tl.store(out + (ow + 4) * C, a4.to(dt), mask=om & (ow + 4 < W))
    tl.store(out + (ow + 5) * C, a5.to(dt), mask=om & (ow + 5 < W))
    tl.store(out + (ow + 6) * C, a6.to(dt), mask=om & (ow + 6 < W))
    tl.store(out + (ow + 7) * C, a7.to(dt), mask=om & (ow + 7 < W))


@triton.jit
def depthwise_weight_grad(
    x, dy, dw, N, H, W, C, K: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr
):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    tap = tl.program_id(1)
    kh = tap // K - K // 2
    kw = tap % K - K // 2
    acc = tl.zeros((BC,), tl.float32)
    for s in range(0, N * H * W, BP):
        p = s + tl.arange(0, BP)
        n = p // (H * W)
        h = (p // W) % H
        iw = p % W + kw
        ih = h + kh
        m = (p < N * H * W) & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        mm = m[:, None] & (c < C)[None, :]
        v = tl.load(x + ((n * H + ih) * W + iw)[:, None] * C + c[None, :], mask=mm, other=0.0).to(
            tl.float32
        )
        g = tl.load(dy + p[:, None] * C + c[None, :], mask=mm, other=0.0).to(tl.float32)
        acc += tl.sum(v * g, 0)
    tl.store(dw + tap * C + c, acc, mask=c < C)
