"""Shifts, bit fields, permutations and bit counts."""

import numpy as np

from .operands import lanes, reader, writer
from .ops import instr
from .types import DTYPE, SIZE, UINT, PTXError


@instr("shl", "shr")
def _shift(program, ins):
    width = SIZE[ins.mods[-1]] * 8
    signed = ins.op == "shr" and ins.mods[-1][0] == "s"
    kind = ("s" if signed else "u") + str(width)
    write = writer(program, ins.operands[0])
    a, n = reader(program, ins.operands[1], kind), reader(program, ins.operands[2], "u32")
    if not program.kernel.is_register(ins.operands[2]):
        count = int(n(None))
        amount = DTYPE[kind](min(count, width - 1))
        if count >= width and not signed:
            return lambda t, mask: write(t, a(t) & DTYPE[kind](0), mask)
        if ins.op == "shl":
            return lambda t, mask: write(t, a(t) << amount, mask)
        return lambda t, mask: write(t, a(t) >> amount, mask)

    def run(t, mask):
        x, count = a(t), n(t)
        small = np.minimum(count, width - 1).astype(DTYPE[kind])
        r = x << small if ins.op == "shl" else x >> small
        if not signed:
            r = np.where(count >= width, DTYPE[kind](0), r)
        write(t, r, mask)

    return run


@instr("shf")
def _funnel(program, ins):
    write = writer(program, ins.operands[0])
    low, high, n = (reader(program, x, "u32") for x in ins.operands[1:4])
    left, wrap = "l" in ins.mods, "wrap" in ins.mods

    def run(t, mask):
        value = low(t).astype(np.uint64) | (high(t).astype(np.uint64) << np.uint64(32))
        count = (n(t) & 31 if wrap else np.minimum(n(t), 32)).astype(np.uint64)
        r = (value << count) >> np.uint64(32) if left else value >> count
        write(t, r.astype(np.uint32), mask)

    return run


@instr("bfe")
def _bfe(program, ins):
    kind = ins.mods[-1]
    width, signed = SIZE[kind] * 8, kind[0] == "s"
    write = writer(program, ins.operands[0])
    a = reader(program, ins.operands[1], kind)
    p, n = (reader(program, x, "u32") for x in ins.operands[2:4])

    def run(t, mask):
        x = a(t)
        raw_pos, length = (
            (p(t) & 255).astype(np.int64),
            np.minimum(n(t) & 255, width).astype(np.int64),
        )
        pos = np.minimum(raw_pos, width - 1)
        take = np.minimum(length, width - pos)
        left = (width - pos - take).astype(x.dtype)
        right = np.minimum(width - take, width - 1).astype(x.dtype)
        field = (x << left) >> right
        if signed:
            sign = np.where(x < 0, x.dtype.type(-1), x.dtype.type(0))
            field = np.where((raw_pos >= width) & (length > 0), sign, field)
        else:
            field = np.where(raw_pos >= width, x.dtype.type(0), field)
        write(t, np.where(length == 0, x.dtype.type(0), field), mask)

    return run


@instr("bfi")
def _bfi(program, ins):
    kind = ins.mods[-1]
    width = SIZE[kind] * 8
    write = writer(program, ins.operands[0])
    a, b = (reader(program, x, f"u{width}") for x in ins.operands[1:3])
    p, n = (reader(program, x, "u32") for x in ins.operands[3:5])

    def run(t, mask):
        one, every = np.uint64(1), np.uint64(2**width - 1)
        pos, length = (p(t) & 255).astype(np.uint64), (n(t) & 255).astype(np.uint64)
        ones = np.where(
            length >= 64, ~np.uint64(0), (one << np.minimum(length, 63).astype(np.uint64)) - one
        )
        field = np.where(
            pos >= width, np.uint64(0), (ones << np.minimum(pos, 63).astype(np.uint64)) & every
        )
        value = np.asarray(a(t)).astype(np.uint64) << np.minimum(pos, 63).astype(np.uint64)
        r = (np.asarray(b(t)).astype(np.uint64) & ~field) | (value & field)
        write(t, r.astype(UINT[width]), mask)

    return run


@instr("prmt")
def _prmt(program, ins):
    if ins.mods != ["b32"]:
        raise PTXError("prmt modes are not supported")
    write = writer(program, ins.operands[0])
    a, b, c = (reader(program, x, "u32") for x in ins.operands[1:4])

    def run(t, mask):
        q = np.uint64
        value = a(t).astype(q) | (b(t).astype(q) << q(32))
        selector = c(t).astype(q)
        result = np.zeros(t.lanes, q)
        for i in range(4):
            nibble = (selector >> q(4 * i)) & q(15)
            byte = (value >> ((nibble & q(7)) * q(8))) & q(255)
            byte = np.where(nibble & q(8), np.where(byte & q(128), q(255), q(0)), byte)
            result |= byte << q(8 * i)
        write(t, result.astype(np.uint32), mask)

    return run


@instr("lop3")
def _lop3(program, ins):
    if ins.mods != ["b32"]:
        raise PTXError("lop3 with a predicate is not supported")
    table = int(ins.operands[4], 0)
    write = writer(program, ins.operands[0])
    a, b, c = (reader(program, x, "u32") for x in ins.operands[1:4])

    def run(t, mask):
        x, y, z = a(t), b(t), c(t)
        result = np.zeros(t.lanes, np.uint32)
        for i in range(8):
            if table >> i & 1:
                result = result | (
                    (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
                )
        write(t, result, mask)

    return run


@instr("popc", "clz", "brev", "bfind")
def _bits(program, ins):
    width = SIZE[ins.mods[-1]] * 8
    signed = ins.op == "bfind" and ins.mods[-1][0] == "s"
    shift_amount = "shiftamt" in ins.mods  # bfind: left shift that brings the bit to the top
    write, read = writer(program, ins.operands[0]), reader(program, ins.operands[1], f"u{width}")

    def run(t, mask):
        value = lanes(t, read(t))
        if signed:
            value = np.where(value >> UINT[width](width - 1), ~value, value)
        bit = (
            (value[:, None] >> np.arange(width, dtype=value.dtype)) & value.dtype.type(1)
        ).astype(np.int64)
        if ins.op == "popc":
            result = bit.sum(1).astype(np.uint32)
        elif ins.op == "brev":
            result = (bit[:, ::-1].astype(np.uint64) << np.arange(width, dtype=np.uint64)).sum(1)
            result = result.astype(value.dtype)
        else:
            top = np.where(bit.any(1), width - 1 - bit[:, ::-1].argmax(1), -1)
            if shift_amount:
                top = np.where(top < 0, -1, width - 1 - top)
            result = (width - 1 - top if ins.op == "clz" else top).astype(np.int32)
        write(t, result, mask)

    return run


@instr("dp4a")
def _dp4a(program, ins):
    write = writer(program, ins.operands[0])
    a, b = (reader(program, x, "b32") for x in ins.operands[1:3])
    c = reader(program, ins.operands[3], "s32" if "s32" in ins.mods else "u32")
    ta, tb = ins.mods[-2].replace("32", "8"), ins.mods[-1].replace("32", "8")

    def run(t, mask):
        x = np.ascontiguousarray(lanes(t, a(t))).view(DTYPE[ta]).reshape(-1, 4).astype(np.int64)
        y = np.ascontiguousarray(lanes(t, b(t))).view(DTYPE[tb]).reshape(-1, 4).astype(np.int64)
        write(t, ((x * y).sum(1) + c(t)).astype(np.uint32), mask)

    return run
