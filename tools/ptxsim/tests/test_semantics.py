"""Single instructions in hand-written PTX against plain Python."""

import numpy as np
import ptxsim
import pytest
from ptxsim.types import PTXError

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 out)
{
  .reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .f32 %f<16>;
  .reg .b64 %rd<16>; .reg .f64 %d<8>;
  mov.u32 %r0, %tid.x;
  ld.param.u64 %rd0, [a]; ld.param.u64 %rd1, [b]; ld.param.u64 %rd2, [c]; ld.param.u64 %rd3, [out];
  mad.wide.u32 %rd4, %r0, SIZE, %rd0; mad.wide.u32 %rd5, %r0, SIZE, %rd1;
  mad.wide.u32 %rd6, %r0, SIZE, %rd2;
  mad.wide.u32 %rd7, %r0, OUT, %rd3;
"""


def execute(body, a, b=None, c=None, out="u4", **settings):
    """Run ``body`` with A, B, C loaded by type; it leaves its result in R."""
    b, c = (a if b is None else b), (a if c is None else c)
    a, b, c = (np.ascontiguousarray(x, a.dtype) for x in (a, b, c))
    size, osize = a.dtype.itemsize, np.dtype(out).itemsize
    regs = {2: ("%h1", "%h2", "%h3"), 4: ("%r1", "%r2", "%r3"), 8: ("%rd8", "%rd9", "%rd10")}[size]
    result = {2: "%h4", 4: "%r4", 8: "%rd11"}[osize]
    text = HEAD.replace("SIZE", str(size)).replace("OUT", str(osize))
    for reg, address in zip(regs, ("%rd4", "%rd5", "%rd6"), strict=False):
        text += f"  ld.global.b{8 * size} {reg}, [{address}];\n"
    for name, reg in zip("ABCR", (*regs, result), strict=False):
        body = body.replace("$" + name, reg)
    text += f"  {body}\n  st.global.b{8 * osize} [%rd7], {result};\n  ret;\n}}\n"
    y = np.zeros(a.size, out)
    ptxsim.cuda.CudaModule(text).launch("k", 1, a.size, [a, b, c, y], strict=True, **settings)
    return y


rng = np.random.default_rng(1)
F = rng.integers(0, 2**32, 96, dtype=np.uint32).view("f4")
INT = np.concatenate(
    [rng.integers(-(2**31), 2**31, 90), [0, 1, -1, 2**31 - 1, -(2**31), 7]]
).astype("i4")
LONG = np.concatenate(
    [rng.integers(-(2**63), 2**63 - 1, 90), [0, 1, -1, 2**63 - 1, -(2**63), 7]]
).astype("i8")


def test_flush_to_zero():
    x = np.array([1e-40, -1e-40, 1e-38, 2e-38, 0.0, 1.5], "f4")
    one, zero = np.ones_like(x), np.zeros_like(x)
    kept = execute("fma.rn.f32 $R, $A, $B, $C;", x, one, zero, "f4")
    gone = execute("fma.rn.ftz.f32 $R, $A, $B, $C;", x, one, zero, "f4")
    assert np.array_equal(kept, x)
    assert np.array_equal(gone, np.where(np.abs(x) < 1.1754944e-38, 0, x))
    assert np.signbit(execute("add.ftz.f32 $R, $A, $B;", x, np.full_like(x, -0.0), out="f4")[1])
    h = np.array([1e-5, -1e-5, 6.2e-5, 1.0], "f2")
    for op, keeps in (("mul", True), ("mul.ftz", False)):
        r = execute(f"{op}.f16 $R, $A, $B;", h, np.ones_like(h), out="f2")
        assert np.array_equal(r, h if keeps else np.where(np.abs(h) < 6.1e-5, 0, h))
        r = execute(
            f"{op}.f16x2 $R, $A, $B;", h.view("u4"), np.ones_like(h).view("u4"), out="u4"
        ).view("f2")
        assert np.array_equal(r, h if keeps else np.where(np.abs(h) < 6.1e-5, 0, h))
    half = np.full_like(x, 0.5)
    assert execute("mul.ftz.f32 $R, $A, $B;", x, half, out="f4")[3] == 0  # flushed result
    assert execute("ex2.approx.ftz.f32 $R, $A;", np.array([-130, -3], "f4"), out="f4").tolist() == [
        0,
        0.125,
    ]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_directed_rounding(mode):
    x, y = (rng.standard_normal(200).astype("f4") for _ in "xy")
    r = execute(f"mul.{mode}.f32 $R, $A, $B;", x, y, out="f4").astype("f8")
    exact = x.astype("f8") * y.astype("f8")
    assert {
        "rn": np.all(r == (x * y)),
        "rz": np.all(np.abs(r) <= np.abs(exact)),
        "rm": np.all(r <= exact),
        "rp": np.all(r >= exact),
    }[mode]
    assert np.all(np.abs(r - exact) <= np.spacing(np.abs(x * y)) * 1.01)


def test_fma_exact_against_fractions():
    from fractions import Fraction

    a, b = (rng.integers(1 << 23, 1 << 24, 64).astype("f4") for _ in "ab")
    c = -(a.astype("f8") * b.astype("f8")).astype("f4") * (
        1 + rng.integers(-3, 3, 64) * 2.0**-20
    ).astype("f4")
    r = execute("fma.rn.f32 $R, $A, $B, $C;", a, b, c, "f4", exact_fma=True)
    for x, y, z, got in zip(a, b, c, r, strict=False):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = np.float32(float(exact))
        best = min(
            (np.nextafter(near, np.float32(d)) for d in (-np.inf, np.inf)),
            key=lambda v: abs(Fraction(float(v)) - exact),
        )
        assert abs(Fraction(float(got)) - exact) <= min(
            abs(Fraction(float(v)) - exact) for v in (near, best)
        )


def test_integer_products():
    a, b = INT, INT[::-1]
    wide = a.astype("i8") * b.astype("i8")
    assert np.array_equal(
        execute("mul.hi.s32 $R, $A, $B;", a, b, out="i4"), (wide >> 32).astype("i4")
    )
    u = a.astype("u4").astype("u8") * b.astype("u4").astype("u8")
    assert np.array_equal(
        execute("mul.hi.u32 $R, $A, $B;", a, b, out="u4"), (u >> np.uint64(32)).astype("u4")
    )
    for sign in "su":
        mask = (1 << 64) - 1
        got = execute(f"mul.hi.{sign}64 $R, $A, $B;", LONG, LONG[::-1], out="u8")
        for x, y, r in zip(LONG.tolist(), LONG[::-1].tolist(), got.tolist(), strict=False):
            x, y = (x, y) if sign == "s" else (x & mask, y & mask)
            assert r == (x * y >> 64) & mask


def test_division_truncates():
    a, b = INT[:-1], INT[1:].copy()
    b[b == 0] = 3
    q = execute("div.s32 $R, $A, $B;", a, b, out="i4")
    r = execute("rem.s32 $R, $A, $B;", a, b, out="i4")
    for x, y, qq, rr in zip(a.tolist(), b.tolist(), q.tolist(), r.tolist(), strict=False):
        want = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        assert (qq - want) % 2**32 == 0
        assert (rr - (x - want * y)) % 2**32 == 0


@pytest.mark.parametrize("sign", ["s32", "u32"])
def test_bit_fields(sign):
    a = INT
    pos, length = rng.integers(0, 40, a.size).astype("i4"), rng.integers(0, 40, a.size).astype("i4")
    got = execute(f"bfe.{sign} $R, $A, $B, $C;", a, pos, length, "u4")
    ins = execute("bfi.b32 $R, $A, 0x12345678, $B, $C;", a, pos, length, "u4")
    for x, p, n, r, f in zip(
        a.astype("u4").tolist(),
        pos.tolist(),
        length.tolist(),
        got.tolist(),
        ins.tolist(),
        strict=False,
    ):
        msb, want = 31, 0
        fill = 0 if sign == "u32" or n == 0 else (x >> min(p + n - 1, msb)) & 1
        for i in range(32):
            bit = (x >> (p + i)) & 1 if i < n and p + i <= msb else fill
            want |= bit << i
        assert r == want
        keep = 0x12345678
        for i in range(n):
            if p + i <= msb:
                keep = keep & ~(1 << (p + i)) | ((x >> i) & 1) << (p + i)
        assert f == keep


def test_bit_counts():
    a = INT
    u = a.astype("u4").tolist()
    assert execute("popc.b32 $R, $A;", a).tolist() == [x.bit_count() for x in u]
    assert execute("clz.b32 $R, $A;", a).tolist() == [32 - x.bit_length() for x in u]
    assert execute("brev.b32 $R, $A;", a).tolist() == [int(f"{x:032b}"[::-1], 2) for x in u]
    assert execute("bfind.u32 $R, $A;", a, out="i4").tolist() == [x.bit_length() - 1 for x in u]
    shift = execute("bfind.shiftamt.u32 $R, $A;", a, out="i4").tolist()
    assert shift == [32 - x.bit_length() if x else -1 for x in u]
    assert execute("prmt.b32 $R, $A, $B, 0x3715;", a, a[::-1]).tolist() == [
        int.from_bytes(
            bytes((x.to_bytes(4, "little") + y.to_bytes(4, "little"))[i] for i in (5, 1, 7, 3)),
            "little",
        )
        for x, y in zip(u, u[::-1], strict=False)
    ]
    assert (
        execute("lop3.b32 $R, $A, $B, $C, 0x1E;", a, a[::-1], a // 3).tolist()
        == ((a ^ (a[::-1] | (a // 3))).astype("u4")).tolist()
    )


def test_shifts_beyond_the_width():
    n = (np.arange(INT.size) % 40).astype("i4")
    u = INT.astype("u4").tolist()
    assert execute("shl.b32 $R, $A, $B;", INT, n).tolist() == [
        (x << k) & 0xFFFFFFFF for x, k in zip(u, n.tolist(), strict=False)
    ]
    assert execute("shr.u32 $R, $A, $B;", INT, n).tolist() == [
        x >> k for x, k in zip(u, n.tolist(), strict=False)
    ]
    assert execute("shr.s32 $R, $A, $B;", INT, n, out="i4").tolist() == [
        x >> k for x, k in zip(INT.tolist(), n.tolist(), strict=False)
    ]
    assert execute("shr.s32 $R, $A, 35;", INT, out="i4").tolist() == [x >> 31 for x in INT.tolist()]
    assert not execute("shl.b32 $R, $A, 32;", INT).any()
    wrap = execute("shf.l.wrap.b32 $R, $A, $B, $C;", INT, INT[::-1], n).tolist()
    assert wrap == [
        ((y << 32 | x) << (k & 31) >> 32) & 0xFFFFFFFF
        for x, y, k in zip(u, u[::-1], n.tolist(), strict=False)
    ]


def test_conversions():
    x = np.array([1.5, 2.5, -1.5, 3e9, -3e9, np.nan, np.inf, 0.49], "f4")
    assert execute("cvt.rni.s32.f32 $R, $A;", x, out="i4").tolist() == [
        2,
        2,
        -2,
        2**31 - 1,
        -(2**31),
        0,
        2**31 - 1,
        0,
    ]
    assert execute("cvt.rzi.u32.f32 $R, $A;", x).tolist() == [
        1,
        2,
        0,
        3000000000,
        0,
        0,
        2**32 - 1,
        0,
    ]
    assert execute("cvt.rmi.f32.f32 $R, $A;", x, out="f4")[:3].tolist() == [1, 2, -2]
    assert execute("cvt.sat.s8.s32 $R, $A;", np.array([300, -300, 5], "i4"), out="i4").tolist() == [
        127,
        -128,
        5,
    ]
    assert execute("cvt.s32.s8 $R, $A;", np.array([200, 5], "i4"), out="i4").tolist() == [-56, 5]
    assert execute("cvt.rn.f16.f32 $R, $A;", x, out="f2").tolist()[:3] == [1.5, 2.5, -1.5]
    u = rng.integers(2**24, 2**32, 50).astype("u4")
    down = execute("cvt.rz.f32.u32 $R, $A;", u, out="f4").astype("f8")
    assert np.all(down <= u)
    assert np.all(u - down < 512)


@pytest.mark.parametrize("op", ["lt", "ltu", "ne", "neu", "num", "nan", "geu", "equ"])
def test_float_comparisons_with_nan(op):
    a = np.array([1, 2, np.nan, 2, np.nan], "f4")
    b = np.array([2, 2, 1, np.nan, np.nan], "f4")
    unordered = np.isnan(a) | np.isnan(b)
    base = {"lt": a < b, "ne": a != b, "ge": a >= b, "eq": a == b}
    want = (
        unordered
        if op == "nan"
        else ~unordered
        if op == "num"
        else (base[op[:2]] | unordered if op.endswith("u") else base[op] & ~unordered)
    )
    got = execute(f"setp.{op}.f32 %p1, $A, $B; selp.u32 $R, 1, 0, %p1;", a, b)
    assert got.astype(bool).tolist() == want.tolist()


def test_packed_and_mixed_forms():
    x, y = rng.standard_normal((2, 64)).astype("f4")
    pairs = x.view("u8"), y.view("u8")
    r = execute("fma.rn.f32x2 $R, $A, $B, $C;", *pairs, pairs[0], out="u8").view("f4")
    assert np.array_equal(r, (x.astype("f8") * y + x).astype("f4"))
    h = x.astype("f2")
    r = execute(
        "cvt.f32.f16 %f1, $A; fma.rn.f32.f16 %f2, $A, $B, %f1; mov.b32 $R, %f2;",
        h,
        h[::-1].copy(),
        out="f4",
    )
    assert np.array_equal(r, (h.astype("f8") * h[::-1] + h).astype("f4"))


def test_unknown_forms_are_errors_not_wrong_answers():
    for body in (
        "add.sat.s32 $R, $A, $B;",
        "mul.strange.f32 $R, $A, $B;",
        "vset4.u32.u32.eq $R, $A, $B, $C;",
        "prmt.b32.f4e $R, $A, $B, $C;",
        "add.cc.u32 $R, $A, $B;",
    ):
        with pytest.raises(PTXError, match="supported"):
            execute(body, INT)


def test_unreached_unknown_instruction_is_harmless():
    assert (
        execute("mov.u32 $R, 5; bra L1; vset4.u32.u32.eq $R, $A, $B, $C; L1:", INT[:4]).tolist()
        == [5] * 4
    )


def test_jump_table():
    body = (
        "and.b32 %r5, %r0, 3; mov.u32 $R, 9; T: .branchtargets L0, L1, L2, L3; brx.idx %r5, T;"
        "L0: mov.u32 $R, 10; bra L3; L1: mov.u32 $R, 11; bra L3; L2: mov.u32 $R, 12; L3:"
    )
    assert execute(body, INT[:32]).tolist() == [10, 11, 12, 9] * 8
