"""Warp-wide instructions: shuffles, votes, reductions, matrix loads, matrix multiply-accumulate."""

import re

import numpy as np

from .operands import address, lanes, reader, writer
from .ops import instr
from .ops_memory import count_shared, shared_offsets, shared_read
from .parse import vector
from .types import DTYPE, PTXError, bf16_to_f32

_LANE_BITS = np.arange(32, dtype=np.uint32)


def check_members(t, members, mask, ins):
    """All live lanes named by the member mask must execute the instruction together."""
    active = t.active(mask).reshape(-1, 32)
    members = np.broadcast_to(members, (t.lanes,)).reshape(-1, 32)
    first = members[np.arange(active.shape[0]), active.argmax(1)]
    wanted = ((first[:, None] >> _LANE_BITS) & 1).astype(bool) & ~t.exited.reshape(-1, 32)
    if (active.any(1)[:, None] & wanted & ~active).any():
        raise PTXError(
            f"{t.kernel.name}: lanes of the member mask have not converged at {ins.text}"
        )


def ballot(t, predicate, mask):
    bits = (predicate & t.active(mask)).reshape(-1, 32).astype(np.uint32) << _LANE_BITS
    return np.repeat(np.bitwise_or.reduce(bits, 1), 32)


@instr("shfl")
def _shfl(program, ins):
    targets = ins.operands[0].split("|")
    mode = ins.mods[1]
    a = reader(program, ins.operands[1], "b32")
    b, c, members = (reader(program, x, "u32") for x in ins.operands[2:5])
    write = writer(program, targets[0])
    flag = writer(program, targets[1]) if len(targets) > 1 else None

    def run(t, mask):
        check_members(t, members(t), mask, ins)
        lane = t.lane
        offset = np.asarray(b(t)).astype(np.int64) & 31
        control = np.asarray(c(t)).astype(np.int64)
        clamp, segment = control & 31, (control >> 8) & 31
        top, bottom = (lane & segment) | (clamp & ~segment), lane & segment
        if mode == "up":
            j = lane - offset
            inside = j >= top
        elif mode == "down":
            j = lane + offset
            inside = j <= top
        elif mode == "bfly":
            j = lane ^ offset
            inside = j <= top
        else:
            j = bottom | (offset & ~segment)
            inside = j <= top
        value = lanes(t, a(t))
        write(t, value[t.index - lane + np.where(inside, j, lane)], mask)
        if flag is not None:
            flag(t, inside, mask)

    return run


@instr("vote")
def _vote(program, ins):
    write = writer(program, ins.operands[0])
    predicate, members = (
        reader(program, ins.operands[1], "pred"),
        reader(program, ins.operands[-1], "u32"),
    )
    sync = "sync" in ins.mods

    def run(t, mask):
        if sync:
            check_members(t, members(t), mask, ins)
        votes = ballot(t, lanes(t, predicate(t)), mask)
        if "ballot" in ins.mods:
            write(t, votes, mask)
            return
        everyone = ballot(t, np.ones(t.lanes, bool), mask)
        any_, all_ = votes != 0, votes == everyone
        write(t, any_ if "any" in ins.mods else all_ if "all" in ins.mods else all_ | ~any_, mask)

    return run


@instr("activemask")
def _activemask(program, ins):
    write = writer(program, ins.operands[0])
    return lambda t, mask: write(t, ballot(t, np.ones(t.lanes, bool), mask), mask)


@instr("elect")
def _elect(program, ins):
    targets = ins.operands[0].split("|")
    leader, flag = writer(program, targets[0]), writer(program, targets[1])

    def run(t, mask):
        first = np.repeat(t.active(mask).reshape(-1, 32).argmax(1), 32)
        leader(t, first.astype(np.uint32), mask)
        flag(t, t.lane == first, mask)

    return run


@instr("match")
def _match(program, ins):
    if "any" not in ins.mods:
        raise PTXError("match.all is not supported")
    write, members = writer(program, ins.operands[0]), reader(program, ins.operands[2], "u32")
    value = reader(program, ins.operands[1], ins.mods[-1])

    def run(t, mask):
        check_members(t, members(t), mask, ins)
        v = lanes(t, value(t)).reshape(-1, 32)
        same = (v[:, :, None] == v[:, None, :]) & t.active(mask).reshape(-1, 1, 32)
        write(t, (same.astype(np.uint32) << _LANE_BITS).sum(2, dtype=np.uint32).reshape(-1), mask)

    return run


@instr("redux")
def _redux(program, ins):
    kind, op = ins.mods[-1], ins.mods[1]
    dtype = DTYPE[kind]
    if np.dtype(dtype).kind == "f":
        function, neutral = (np.fmin, dtype(np.inf)) if op == "min" else (np.fmax, dtype(-np.inf))
    else:
        info = np.iinfo(dtype)
        function, neutral = {
            "add": (np.add, 0),
            "or": (np.bitwise_or, 0),
            "xor": (np.bitwise_xor, 0),
            "and": (np.bitwise_and, -1 if info.min < 0 else info.max),
            "min": (np.minimum, info.max),
            "max": (np.maximum, info.min),
        }[op]
    write, value = writer(program, ins.operands[0]), reader(program, ins.operands[1], kind)
    members = reader(program, ins.operands[2], "u32")

    def run(t, mask):
        check_members(t, members(t), mask, ins)
        v = np.where(t.active(mask), lanes(t, value(t)), dtype(neutral)).reshape(-1, 32)
        write(t, np.repeat(function.reduce(v, 1, dtype=dtype), 32), mask)

    return run


def _matrix_form(ins):
    if "m8n8" not in ins.mods or ins.mods[-1] != "b16":
        raise PTXError("only the m8n8 .b16 form is supported")
    return (4 if "x4" in ins.mods else 2 if "x2" in ins.mods else 1), "trans" in ins.mods


@instr("ldmatrix")
def _ldmatrix(program, ins):
    count, transpose = _matrix_form(ins)
    where = address(program, ins.operands[1])
    writes = [writer(program, r) for r in vector(ins.operands[0])]

    def run(t, mask):
        warps = np.flatnonzero(t.active(mask).reshape(-1, 32).any(1))
        rows = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        addresses = where(t)
        everyone = count == 4 and rows.size == t.lanes
        x = shared_offsets(t, ins, addresses, 16, None if everyone else rows)
        shared_read(t, ins, x, 16, None if everyone else rows)
        if t.stats.enabled:
            used = None
            if not everyone:
                used = np.zeros(t.lanes, bool)
                used[rows] = True
            count_shared(t, ins, "ldmatrix", addresses, used, 16)
        tiles = (
            t.batch.shared.view(np.uint16).reshape(-1, 8)[x >> 4].reshape(warps.size, count, 8, 8)
        )
        if transpose:
            tiles = tiles.transpose(0, 1, 3, 2)
        fragments = np.ascontiguousarray(tiles).view(np.uint32).reshape(warps.size, count, 32)
        for i, write in enumerate(writes):
            full = np.zeros((t.lanes // 32, 32), np.uint32)
            full[warps] = fragments[:, i]
            write(t, full.reshape(-1), mask)

    return run


@instr("stmatrix")
def _stmatrix(program, ins):
    count, transpose = _matrix_form(ins)
    where = address(program, ins.operands[0])
    reads = [reader(program, r, "b32") for r in vector(ins.operands[1])]

    def run(t, mask):
        warps = np.flatnonzero(t.active(mask).reshape(-1, 32).any(1))
        rows = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        addresses = where(t)
        x = shared_offsets(t, ins, addresses, 16, rows)
        if t.stats.enabled:
            used = np.zeros(t.lanes, bool)
            used[rows] = True
            count_shared(t, ins, "stmatrix", addresses, used, 16)
        if t.batch.checker is not None:
            t.batch.checker.write(x, 16, t.warps(rows), t.epochs(rows), ins.text)
        tiles = np.stack([lanes(t, r(t)).reshape(-1, 32)[warps] for r in reads], 1)
        tiles = np.ascontiguousarray(tiles).view(np.uint16).reshape(warps.size, count, 8, 8)
        if transpose:
            tiles = tiles.transpose(0, 1, 3, 2)
        t.batch.shared.view(np.uint16).reshape(-1, 8)[x >> 4] = tiles.reshape(-1, 8)
        t.batch.shared_init.reshape(-1, 16)[x >> 4] = True

    return run


_PER_REGISTER = {"bf16": 2, "f16": 2, "s8": 4, "u8": 4, "tf32": 1}


def _fragment(t, reads, kind, per):
    """Operand registers -> array [warp, group, thread in group, register, element]."""
    bits = np.ascontiguousarray(np.stack([lanes(t, r(t)) for r in reads], 1))
    if kind == "bf16":
        value = bf16_to_f32(bits.view(np.uint16))
    elif kind == "f16":
        value = bits.view(np.float16).astype(np.float32)
    elif kind == "tf32":
        value = (bits & np.uint32(0xFFFFE000)).view(np.float32)
    else:
        value = bits.view(DTYPE[kind]).astype(np.float64)
    return value.reshape(t.lanes // 32, 8, 4, len(reads), per)


@instr("mma")
def _mma(program, ins):
    """mma.sync.m16n8k*: f16, bf16, tf32, s8, u8, summed in float32 in numpy's order."""
    shape = next(m for m in ins.mods if re.match(r"m\d+n\d+k\d+$", m))
    kinds = [m for m in ins.mods if m in DTYPE or m == "tf32"]
    if (
        not shape.startswith("m16n8")
        or len(kinds) != 4
        or kinds[1] not in _PER_REGISTER
        or "sp" in ins.mods
    ):
        raise PTXError("mma form is not supported")
    k = int(shape.split("k")[1])
    result, ka, kb, _ = kinds
    per = _PER_REGISTER[ka]
    out, ra, rb, rc = (vector(x) for x in ins.operands[:4])
    a_reads, b_reads = ([reader(program, r, "b32") for r in regs] for regs in (ra, rb))
    c_reads = [reader(program, r, {"s32": "s32", "f32": "f32"}.get(result, "b32")) for r in rc]
    writes = [writer(program, r) for r in out]
    halves = k // (4 * per)
    saturate = "satfinite" in ins.mods
    flops = 2 * 16 * 8 * k
    counter = "mma_flops_" + ("int8" if ka in ("s8", "u8") else ka)

    def run(t, mask):
        warps = t.lanes // 32
        a = _fragment(t, a_reads, ka, per).reshape(warps, 8, 4, halves, 2, per)
        b = _fragment(t, b_reads, kb, per)
        a = a.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, k)
        b = b.transpose(0, 3, 2, 4, 1).reshape(warps, k, 8)
        p = (
            np.matmul(a, b)
            .reshape(warps, 2, 8, 4, 2)
            .transpose(0, 2, 3, 1, 4)
            .reshape(t.lanes, 2, 2)
        )
        if result == "s32":
            for i, (write, c) in enumerate(zip(writes, c_reads, strict=False)):
                total = p[:, i // 2, i % 2].astype(np.int64) + c(t)
                write(
                    t,
                    (np.clip(total, -(2**31), 2**31 - 1) if saturate else total).astype(np.int32),
                    mask,
                )
        elif result == "f32":
            for i, (write, c) in enumerate(zip(writes, c_reads, strict=False)):
                write(t, p[:, i // 2, i % 2] + c(t), mask)
        else:
            for i, (write, c) in enumerate(zip(writes, c_reads, strict=False)):
                old = (
                    np.ascontiguousarray(lanes(t, c(t)))
                    .view(np.float16)
                    .reshape(-1, 2)
                    .astype(np.float32)
                )
                new = np.ascontiguousarray((p[:, i] + old).astype(np.float16))
                write(t, new.view(np.uint32).reshape(-1), mask)
        active = warps if mask is None else int(np.count_nonzero(mask.reshape(-1, 32).any(1)))
        t.stats.counters["mma_flops"] += active * flops
        t.stats.counters[counter] += active * flops

    return run
