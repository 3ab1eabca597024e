"""Comparisons and conversions."""

import numpy as np

from .operands import lanes, reader, writer
from .ops import PACKED, ROUNDINGS, directed, finish_float, instr, pack, source
from .types import DTYPE, FLOATS, PTXError, f32_to_bf16

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def comparison(name, kind):
    """Function of two arrays for a PTX comparison operator."""
    floating = kind in FLOATS
    if name in ("nan", "num"):
        either = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
        return either if name == "nan" else lambda a, b: ~either(a, b)
    f = _COMPARE[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name[:2])]
    if floating and name == "ne":
        return lambda a, b: f(a, b) & ~(np.isnan(a) | np.isnan(b))
    if floating and len(name) == 3 and name != "neu":
        return lambda a, b: f(a, b) | np.isnan(a) | np.isnan(b)
    return f


@instr("setp", "set")
def _setp(program, ins):
    kind = ins.mods[-1]
    if kind in PACKED:
        raise PTXError("packed comparisons are not supported")
    mods = [m for m in ins.mods if m != "ftz"]
    compare = comparison(mods[0], kind)
    a, b = (source(program, ins, x, kind) for x in ins.operands[1:3])
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(mods[1])
    extra = reader(program, ins.operands[3], "pred") if combine else None
    if ins.op == "set":
        write = writer(program, ins.operands[0])
        true = np.uint32(0x3F800000) if mods[-2] == "f32" else np.uint32(0xFFFFFFFF)

        def run_set(t, mask):
            r = compare(a(t), b(t))
            write(t, np.where(combine(r, extra(t)) if combine else r, true, np.uint32(0)), mask)

        return run_set
    names = ins.operands[0].split("|")
    write = writer(program, names[0])
    other = writer(program, names[1]) if len(names) > 1 else None
    if combine is None and other is None:
        return lambda t, mask: write(t, compare(a(t), b(t)), mask)

    def run(t, mask):
        r = compare(a(t), b(t))
        q = ~r
        if combine is not None:
            p = extra(t)
            r, q = combine(r, p), combine(q, p)
        write(t, r, mask)
        if other is not None:
            other(t, q, mask)

    return run


_CVT_MODIFIERS = {
    "rn",
    "rna",
    "rz",
    "rm",
    "rp",
    "rni",
    "rzi",
    "rmi",
    "rpi",
    "ftz",
    "sat",
    "relu",
    "tf32",
}
_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def float_to_int(value, kind):
    """Saturating conversion; NaN gives 0."""
    info = np.iinfo(DTYPE[kind])
    value = np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=2.0**70, neginf=-(2.0**70))
    inner = np.clip(value, float(info.min), np.nextafter(float(info.max), 0))
    inner = inner.astype(np.int64 if info.max < 2**63 else np.uint64)
    exact = np.where(value == np.float64(info.max), info.max, inner) if info.bits < 64 else inner
    return np.where(
        value > float(info.max), info.max, np.where(value < float(info.min), info.min, exact)
    ).astype(DTYPE[kind])


@instr("cvt")
def _cvt(program, ins):
    mods = ins.mods
    dst, src = mods[-2], mods[-1]
    write = writer(program, ins.operands[0])
    if set(mods) - _CVT_MODIFIERS - set(DTYPE):
        raise PTXError("conversion not supported")
    if dst in PACKED:
        high, low = (reader(program, x, "f32") for x in ins.operands[1:3])
        if "rz" in mods:
            raise PTXError("form not supported")

        def packed(t, mask):
            value = np.stack([lanes(t, low(t)), lanes(t, high(t))], 1)
            write(t, pack(np.maximum(value, 0) if "relu" in mods else value, dst), mask)

        return packed
    if (dst not in DTYPE and dst != "tf32") or src not in DTYPE:
        raise PTXError("conversion not supported")
    read = source(program, ins, ins.operands[1], src)
    from_float, to_float = src in FLOATS, dst in FLOATS or dst == "tf32"
    integral = (
        _INTEGRAL[next(m for m in mods if m in _INTEGRAL)] if set(mods) & set(_INTEGRAL) else None
    )
    mode = next((m for m in mods if m in ROUNDINGS), None)

    def run(t, mask):
        value = np.asarray(read(t))
        if from_float and integral is not None:
            value = integral(value if value.dtype == np.float64 else value.astype(np.float64))
        if not to_float:
            if from_float:
                value = float_to_int(value, dst)
            else:
                if "sat" in mods:
                    info = np.iinfo(DTYPE[dst])
                    low = max(info.min, np.iinfo(value.dtype).min)
                    value = np.clip(
                        value,
                        value.dtype.type(low),
                        value.dtype.type(min(info.max, np.iinfo(value.dtype).max)),
                    )
                value = value.astype(DTYPE[dst])
        elif dst == "tf32":
            bits = np.atleast_1d(value.astype(np.float32)).view(np.uint32)
            value = (
                bits & np.uint32(0xFFFFE000)
                if mode == "rz"
                else (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
            )
        elif dst == "bf16" and mode == "rz":
            value = f32_to_bf16(value.astype(np.float32), True)
        elif dst == "f32" and mode:
            value = finish_float(directed(value.astype(np.float64), mode), dst, mods)
        elif dst == "f32" and not from_float:
            value = value.astype(np.float32)
        else:
            value = finish_float(
                value if value.dtype.kind == "f" else value.astype(np.float64), dst, mods
            )
        write(t, value, mask)

    return run
