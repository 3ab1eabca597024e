"""Moves, arithmetic, logic and control instructions; the registry and the kernel compiler.

A builder registered with ``@instr('name')`` receives (program, instruction) once and returns
``run(strand, mask)``; a mask of None means that all lanes take part.
"""

import numpy as np

from .operands import lanes, reader, writer
from .parse import BARRIER, BRANCH, EXIT, TABLE_BRANCH, vector
from .types import (
    DTYPE,
    FLOATS,
    SIZE,
    UINT,
    PTXError,
    bf16_to_f32,
    f32_to_bf16,
    f64_to_f32_odd,
    flush,
)

BUILDERS = {}
ROUNDINGS = ("rz", "rm", "rp")
PACKED = ("f16x2", "bf16x2", "f32x2")


def instr(*names):
    def register(builder):
        for name in names:
            BUILDERS[name] = builder
        return builder

    return register


def compile_kernel(program):
    """Compile every instruction of ``program.kernel`` to a closure."""
    from . import ops_bits, ops_convert, ops_memory, ops_warp  # noqa: F401  (register their builders)

    kernel = program.kernel
    for ins in kernel.code:
        if isinstance(ins.pred, str):
            ins.pred = kernel.slot(ins.pred)
        if ins.kind == BRANCH:
            ins.run = _target(kernel, ins.operands[0])
        elif ins.kind == TABLE_BRANCH:
            ins.run = (
                reader(program, ins.operands[0], "u32"),
                [_target(kernel, x) for x in kernel.tables[ins.operands[1]]],
            )
        elif ins.kind == BARRIER:
            ins.run = _barrier(program, ins)
        elif ins.kind != EXIT:
            ins.run = _build(program, ins)


def _target(kernel, label):
    if label not in kernel.labels:
        raise PTXError(f"label {label} not found in {kernel.name}")
    return kernel.labels[label]


def _build(program, ins):
    builder = BUILDERS.get(ins.op)
    try:
        if builder is None:
            raise PTXError("opcode not supported")
        return builder(program, ins)
    except (PTXError, KeyError, IndexError, ValueError, StopIteration) as error:
        # Reported only when the instruction is reached: dead code may use anything.
        message = f"{ins.text}: {error if isinstance(error, PTXError) else 'form not supported'}"

        def fail(t, mask):
            raise PTXError(f"in {t.kernel.name}: {message}")

        return fail


def _constant(program, operand):
    if program.kernel.is_register(operand):
        raise PTXError(f"barrier number in a register ({operand}) is not supported")
    return int(operand, 0)


def _barrier(program, ins):
    """The barrier id, the thread count or None, and a predicate reader or None."""
    operands = list(ins.operands)
    predicate = None
    if "red" in ins.mods:
        predicate = reader(program, operands.pop(), "pred")
        operands.pop(0)
    if ins.op == "barrier" and "cluster" in ins.mods:
        raise PTXError("cluster barriers are not supported")
    barrier = _constant(program, operands[0]) if operands else 0
    threads = _constant(program, operands[1]) if len(operands) > 1 else None
    return barrier, threads, predicate


def barrier_result(strand, ins, value, mask):
    """Write the destination of bar.red (called when the barrier opens)."""
    program = strand.batch.program
    result = value.astype(np.uint32) if "popc" in ins.mods else value.astype(bool)
    writer(program, ins.operands[0])(strand, result, mask)


def unpack(bits, kind):
    """(lanes,) packed bits -> (lanes, 2) float32, low half first."""
    bits = np.ascontiguousarray(bits)
    if kind == "f32x2":
        return bits.view(np.float32).reshape(-1, 2)
    if kind == "bf16x2":
        return bf16_to_f32(bits.view(np.uint16)).reshape(-1, 2)
    return bits.view(np.float16).astype(np.float32).reshape(-1, 2)


def pack(value, kind):
    if kind == "f32x2":
        return np.ascontiguousarray(value.astype(np.float32)).view(np.uint64).reshape(-1)
    half = f32_to_bf16(value) if kind == "bf16x2" else value.astype(np.float16)
    return np.ascontiguousarray(half).view(np.uint32).reshape(-1)


def pair_reader(program, operand, kind, mods=()):
    read = reader(program, operand, f"b{SIZE[kind] * 8}")
    if "ftz" in mods:
        return lambda t: flush(unpack(lanes(t, read(t)), kind), kind)
    return lambda t: unpack(lanes(t, read(t)), kind)


def finish_packed(result, kind, mods):
    """Apply .sat/.relu/.ftz to an array of pairs."""
    if "sat" in mods:
        result = np.clip(np.nan_to_num(result, nan=0.0), 0, 1)
    if "relu" in mods:
        result = np.maximum(result, 0)
    return flush(result, kind) if "ftz" in mods else result


def directed(value, mode):
    """float64 -> float32 with rounding mode rn, rz, rm (down) or rp (up)."""
    near = np.asarray(value).astype(np.float32)
    if mode == "rn":
        return near
    back = near.astype(np.float64)
    wrong = {"rm": back > value, "rp": back < value, "rz": np.abs(back) > np.abs(value)}[mode]
    toward = {"rm": np.float32(-np.inf), "rp": np.float32(np.inf), "rz": np.float32(0)}[mode]
    return np.where(wrong, np.nextafter(near, toward), near)


def finish_float(result, kind, mods):
    """Apply .sat/.relu and .ftz, and narrow to the PTX type."""
    if "sat" in mods:
        result = np.clip(np.nan_to_num(result, nan=0.0), 0, 1)
    if "relu" in mods:
        result = np.maximum(result, 0)
    if kind == "bf16":
        result = f64_to_f32_odd(result) if result.dtype == np.float64 else result
        return f32_to_bf16(result)
    if result.dtype != DTYPE[kind]:
        result = result.astype(DTYPE[kind])
    return flush(result, kind) if "ftz" in mods and kind != "f64" else result


_KNOWN = {
    "rn",
    "rz",
    "rm",
    "rp",
    "ftz",
    "sat",
    "approx",
    "full",
    "lo",
    "hi",
    "wide",
    "relu",
    "NaN",
    "cc",
    "xorsign",
    "abs",
    "oob",
}


def arithmetic_types(ins):
    """(result type, source type) of an arithmetic instruction; unknown modifiers are an error.

    They differ in the mixed forms add/sub/fma.f32.{f16,bf16}, whose last operand has the result's
    type.
    """
    unknown = [m for m in ins.mods if m not in DTYPE and m not in _KNOWN]
    kinds = [m for m in ins.mods if m in DTYPE]
    if (
        unknown
        or not 1 <= len(kinds) <= 2
        or (
            len(kinds) == 2
            and (
                ins.op not in ("add", "sub", "fma")
                or kinds[0] != "f32"
                or kinds[1] not in ("f16", "bf16")
            )
        )
    ):
        raise PTXError("modifiers not supported")
    return kinds[0], kinds[-1]


def source(program, ins, operand, kind):
    """Reader that honours .ftz on its input."""
    read = reader(program, operand, kind)
    if "ftz" in ins.mods and kind in ("f32", "f16"):
        return lambda t: flush(read(t), kind)
    return read


def elementwise(program, ins, function):
    """Instruction computing ``function`` of its sources."""
    (kind, last), mods = arithmetic_types(ins), ins.mods
    operands = ins.operands[1:]
    write = writer(program, ins.operands[0])
    if last != kind:
        narrow, wide = reader(program, operands[0], last), source(program, ins, operands[1], kind)

        def mixed(t, mask):
            r = directed(
                function(narrow(t).astype(np.float64), wide(t).astype(np.float64)),
                next((m for m in mods if m in ROUNDINGS), "rn"),
            )
            write(t, finish_float(r, kind, mods), mask)

        return mixed
    if kind in PACKED:
        pairs = [pair_reader(program, x, kind, mods) for x in operands]

        if set(mods) & set(ROUNDINGS):
            raise PTXError("form not supported")

        def packed(t, mask):
            write(t, pack(finish_packed(function(*[p(t) for p in pairs]), kind, mods), kind), mask)

        return packed
    reads = [source(program, ins, x, kind) for x in operands]
    if kind not in FLOATS:
        if "sat" in mods or "cc" in mods:
            raise PTXError("integer saturation and carry are not supported")
        if len(reads) == 2:
            a, b = reads
            return lambda t, mask: write(t, function(a(t), b(t)), mask)
        return lambda t, mask: write(t, function(*[r(t) for r in reads]), mask)
    mode = next((m for m in mods if m in ROUNDINGS), None)
    if mode and kind == "f32":

        def rounded(t, mask):
            r = directed(function(*[r(t).astype(np.float64) for r in reads]), mode)
            write(t, finish_float(r, kind, mods), mask)

        return rounded
    if kind == "f16":

        def half(t, mask):
            write(
                t,
                finish_float(function(*[r(t).astype(np.float32) for r in reads]), kind, mods),
                mask,
            )

        return half
    if kind in ("f32", "f64") and len(reads) == 2 and not {"sat", "ftz", "relu"} & set(mods):
        a, b = reads
        return lambda t, mask: write(t, function(a(t), b(t)), mask)
    return lambda t, mask: write(
        t, finish_float(function(*[r(t) for r in reads]), kind, mods), mask
    )


@instr("mov")
def _mov(program, ins):
    kind = ins.mods[-1]
    dst, src = ins.operands[0], ins.operands[1]
    if src[0] == "{":
        parts = vector(src)
        width = SIZE[kind] * 8 // len(parts)
        whole = UINT[width * len(parts)]
        reads = [reader(program, x, f"b{width}") for x in parts]
        write = writer(program, dst)

        def join(t, mask):
            value = lanes(t, reads[0](t)).astype(whole)
            for i, read in enumerate(reads[1:], 1):
                value = value | (lanes(t, read(t)).astype(whole) << whole(width * i))
            write(t, value, mask)

        return join
    if dst[0] == "{":
        parts = vector(dst)
        width = SIZE[kind] * 8 // len(parts)
        whole = UINT[width * len(parts)]
        read = reader(program, src, f"b{width * len(parts)}")
        writes = [writer(program, x) for x in parts]

        def split(t, mask):
            value = read(t)
            for i, write in enumerate(writes):
                write(t, (value >> whole(width * i)).astype(UINT[width]), mask)

        return split
    read = reader(program, src, kind if kind in ("pred", "f32", "f64") else f"b{SIZE[kind] * 8}")
    write = writer(program, dst)
    return lambda t, mask: write(t, read(t), mask)


@instr("selp")
def _selp(program, ins):
    kind = f"b{SIZE[ins.mods[-1]] * 8}"
    write = writer(program, ins.operands[0])
    a, b = (reader(program, x, kind) for x in ins.operands[1:3])
    p = reader(program, ins.operands[3], "pred")
    return lambda t, mask: write(t, np.where(p(t), a(t), b(t)), mask)


@instr("slct")
def _slct(program, ins):
    kind, by = f"b{SIZE[ins.mods[-2]] * 8}", ins.mods[-1]
    write = writer(program, ins.operands[0])
    a, b = (reader(program, x, kind) for x in ins.operands[1:3])
    c = reader(program, ins.operands[3], by)
    return lambda t, mask: write(t, np.where(c(t) >= 0, a(t), b(t)), mask)


@instr("cvta")
def _cvta(program, ins):
    from .operands import window

    shift = np.uint64(
        window("shared" if "shared" in ins.mods else "local" if "local" in ins.mods else "global")
    )
    write = writer(program, ins.operands[0])
    read = reader(program, ins.operands[1], ins.mods[-1])
    if "to" in ins.mods:
        return lambda t, mask: write(t, read(t) - shift, mask)
    return lambda t, mask: write(t, read(t) + shift, mask)


@instr("isspacep")
def _isspacep(program, ins):
    from .types import GLOBAL_BASE, LOCAL_BASE, SHARED_BASE

    low, high = {
        "shared": (SHARED_BASE, LOCAL_BASE),
        "local": (LOCAL_BASE, GLOBAL_BASE),
        "global": (GLOBAL_BASE, 1 << 63),
    }[ins.mods[0]]
    write, read = writer(program, ins.operands[0]), reader(program, ins.operands[1], "u64")
    return lambda t, mask: write(t, (read(t) >= np.uint64(low)) & (read(t) < np.uint64(high)), mask)


@instr("add")
def _add(program, ins):
    return elementwise(program, ins, np.add)


@instr("sub")
def _sub(program, ins):
    return elementwise(program, ins, np.subtract)


@instr("and")
def _and(program, ins):
    return elementwise(program, ins, np.bitwise_and)


@instr("or")
def _or(program, ins):
    return elementwise(program, ins, np.bitwise_or)


@instr("xor")
def _xor(program, ins):
    return elementwise(program, ins, np.bitwise_xor)


@instr("not")
def _not(program, ins):
    return elementwise(program, ins, np.invert)


@instr("min", "max")
def _minmax(program, ins):
    kind = ins.mods[-1]
    if "xorsign" in ins.mods:
        raise PTXError(".xorsign is not supported")
    if (kind in FLOATS or kind in PACKED) and "NaN" not in ins.mods:
        f = np.fmin if ins.op == "min" else np.fmax
    else:
        f = np.minimum if ins.op == "min" else np.maximum
    if len(ins.operands) > 3:
        return elementwise(program, ins, lambda a, b, c: f(f(a, b), c))
    return elementwise(program, ins, f)


def mul_hi(a, b):
    """High half of the product of two arrays of 32 or 64-bit integers."""
    if a.dtype.itemsize < 8:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(a.dtype.itemsize * 8)).astype(a.dtype)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    xl, xh, yl, yh = x & low, x >> half, y & low, y >> half
    mid = xh * yl + ((xl * yl) >> half)
    mid2 = xl * yh + (mid & low)
    high = xh * yh + (mid >> half) + (mid2 >> half)
    if a.dtype.kind == "i":
        zero = np.uint64(0)
        high = high - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)
    return high.view(a.dtype) if np.ndim(high) else high.astype(a.dtype)


@instr("mul", "mad", "mul24", "mad24")
def _mul(program, ins):
    (kind, _), mods = arithmetic_types(ins), ins.mods
    if kind in FLOATS or kind in PACKED:
        return elementwise(program, ins, np.multiply) if ins.op == "mul" else _fma(program, ins)
    if "cc" in mods or "sat" in mods or "24" in ins.op:
        raise PTXError("form not supported")
    write = writer(program, ins.operands[0])
    a, b = (reader(program, x, kind) for x in ins.operands[1:3])
    if "wide" in mods:
        wide = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}[kind]
        dtype = DTYPE[wide]

        def product(t):
            return a(t).astype(dtype) * b(t).astype(dtype)
    else:
        wide = kind
        if "hi" in mods:

            def product(t):
                return mul_hi(np.asarray(a(t)), np.asarray(b(t)))
        else:

            def product(t):
                return a(t) * b(t)

    if ins.op == "mul":
        return lambda t, mask: write(t, product(t), mask)
    c = reader(program, ins.operands[3], wide)
    return lambda t, mask: write(t, product(t) + c(t), mask)


def fma_f32(a, b, c, exact):
    """float32 a*b+c. The product is exact in float64; ``exact`` also rounds the sum only once."""
    p = np.multiply(a, b, dtype=np.float64)
    s = p + c
    if not exact:
        return s.astype(np.float32)
    c = np.asarray(c, np.float64)  # error of the sum (TwoSum), then round to odd
    bb = s - p
    err = (p - (s - bb)) + (c - bb)
    s = np.atleast_1d(s)
    bits = s.view(np.int64)
    odd = (err != 0) & ((bits & 1) == 0) & np.isfinite(s)
    return (
        np.where(odd, bits + np.where((err > 0) == (s > 0), 1, -1), bits)
        .view(np.float64)
        .astype(np.float32)
    )


@instr("fma")
def _fma(program, ins):
    (kind, factor), mods = arithmetic_types(ins), ins.mods
    write = writer(program, ins.operands[0])
    if kind in PACKED:
        reads = [pair_reader(program, x, kind, mods) for x in ins.operands[1:4]]

        def packed(t, mask):
            a, b, c = (r(t).astype(np.float64) for r in reads)
            r = a * b + c
            r = f64_to_f32_odd(r) if kind == "bf16x2" else r
            write(t, pack(finish_packed(r, kind, mods), kind), mask)

        return packed
    a, b = (source(program, ins, x, factor) for x in ins.operands[1:3])
    c = source(program, ins, ins.operands[3], kind)
    mode = next((m for m in mods if m in ROUNDINGS), None)
    plain = not {"sat", "ftz", "relu"} & set(mods)
    if kind == "f32" and mode is None:
        if plain:
            return lambda t, mask: write(t, fma_f32(a(t), b(t), c(t), t.options.exact_fma), mask)
        return lambda t, mask: write(
            t, finish_float(fma_f32(a(t), b(t), c(t), t.options.exact_fma), kind, mods), mask
        )

    def wide(t, mask):
        r = a(t).astype(np.float64) * b(t).astype(np.float64) + c(t).astype(np.float64)
        if mode and kind == "f32":
            r = directed(r, mode)
        write(t, finish_float(r, kind, mods), mask)

    return wide


@instr("div", "rem")
def _div(program, ins):
    kind = ins.mods[-1]
    if kind in FLOATS:
        return elementwise(program, ins, np.divide)
    signed, remainder = kind[0] == "s", ins.op == "rem"

    def divide(a, b):
        a, b = np.asarray(a), np.asarray(b)
        safe = np.where(b == 0, b.dtype.type(1), b)
        if signed:
            unsigned = UINT[8 * a.dtype.itemsize]  # |INT_MIN| fits there
            q = (np.abs(a).view(unsigned) // np.abs(safe).view(unsigned)).astype(a.dtype)
            q = np.where((a < 0) != (safe < 0), -q, q).astype(a.dtype)
        else:
            q = a // safe
        if remainder:
            return np.where(b == 0, a, a - q * safe)
        return np.where(b == 0, ~a.dtype.type(0), q)

    return elementwise(program, ins, divide)


@instr("neg", "abs")
def _sign(program, ins):
    kind = ins.mods[-1]
    if kind not in FLOATS and kind not in PACKED:
        return elementwise(program, ins, np.negative if ins.op == "neg" else np.abs)
    bits = SIZE[kind] * 8
    sign = UINT[bits](0x80008000 if kind in PACKED else 1 << (bits - 1))
    write, read = writer(program, ins.operands[0]), reader(program, ins.operands[1], f"b{bits}")
    if ins.op == "neg":
        return lambda t, mask: write(t, read(t) ^ sign, mask)
    return lambda t, mask: write(t, read(t) & ~sign, mask)


@instr("copysign")
def _copysign(program, ins):
    return elementwise(program, ins, lambda a, b: np.copysign(b, a))


@instr("testp")
def _testp(program, ins):
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny),
    }[ins.mods[0]]
    write, read = writer(program, ins.operands[0]), reader(program, ins.operands[1], ins.mods[-1])
    return lambda t, mask: write(t, np.asarray(test(read(t))), mask)


@instr("ex2", "lg2", "rsqrt", "sqrt", "rcp", "sin", "cos", "tanh")
def _special_function(program, ins):
    f = {
        "ex2": np.exp2,
        "lg2": np.log2,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "sqrt": np.sqrt,
        "rcp": lambda x: 1 / x,
        "sin": np.sin,
        "cos": np.cos,
        "tanh": np.tanh,
    }[ins.op]
    kind = ins.mods[-1]
    if kind in PACKED:
        return elementwise(program, ins, f)
    write, read = writer(program, ins.operands[0]), source(program, ins, ins.operands[1], kind)

    def run(t, mask):
        r = f(np.asarray(read(t)).astype(np.float64))
        write(t, finish_float(r if kind != "f32" else r.astype(np.float32), kind, ins.mods), mask)

    return run


@instr(
    "membar",
    "fence",
    "prefetch",
    "nanosleep",
    "prefetchu",
    "griddepcontrol",
    "discard",
    "createpolicy",
    "applypriority",
    "bar",
    "barrier",
    "setmaxnreg",
    "pmevent",
)
def _nothing(program, ins):
    return lambda t, mask: None


@instr("trap", "brkpt")
def _trap(program, ins):
    def run(t, mask):
        raise PTXError(f"{t.kernel.name}: trap executed")

    return run


@instr("call")
def _call(program, ins):
    def run(t, mask):
        if "assertfail" in ins.text:
            lane = int(np.flatnonzero(t.active(mask))[0])
            raise PTXError(
                f"{t.kernel.name}: device assertion failed in cta "
                f"{t.batch.ids[t.cta[lane]].tolist()} "
                f"thread {int(t.thread[lane])}"
            )
        raise PTXError(f"{t.kernel.name}: device function calls are not supported: {ins.text}")

    return run
