"""Loads, stores, asynchronous copies and atomics."""

import numpy as np

from .operands import address, lanes, reader, writer
from .ops import instr, pack, unpack
from .parse import vector
from .types import (
    DTYPE,
    GLOBAL_BASE,
    LOCAL_BASE,
    SHARED_BASE,
    SIZE,
    UINT,
    PTXError,
    bf16_to_f32,
    f32_to_bf16,
)

_SPACES = ("global", "shared", "local", "param", "const")


def _space(mods, where):
    """Address space named by the modifiers; None means generic."""
    if "shared::cluster" in mods:
        raise PTXError("distributed shared memory is not supported")
    for space in _SPACES:
        if space in mods:
            return "global" if space == "const" else space
    return "param" if isinstance(where, tuple) else None


def _resolve(t, addresses, mask):
    """(space, addresses in it) of a generic access; all lanes must agree."""
    active = addresses if mask is None else addresses[mask]
    if active.size:
        low, high = int(active.min()), int(active.max())
        if low >= SHARED_BASE and high < LOCAL_BASE:
            return "shared", addresses - SHARED_BASE
        if low >= LOCAL_BASE and high < GLOBAL_BASE:
            return "local", addresses - LOCAL_BASE
    return "global", addresses


def _where(t, offset, index):
    lane = int(index[offset]) if index is not None else int(offset)
    return f"cta {t.batch.ids[t.cta[lane]].tolist()} thread {int(t.thread[lane])}"


def global_offsets(t, ins, addresses, size, index, verb):
    """Arena offsets of the active lanes after checks, and whether all bytes are initialised."""
    x = (addresses if index is None else addresses[index]) - GLOBAL_BASE
    if not x.size:
        return x, True
    if size > 1 and (x & (size - 1)).any():
        bad = int(np.flatnonzero(x & (size - 1))[0])
        raise PTXError(
            f"misaligned global {verb} of {size} bytes at {_where(t, bad, index)}: {ins.text}"
        )
    low, high = int(x.min()), int(x.max()) + size
    inside, initialised = t.device.locate(low, high)
    if inside:
        return x, initialised
    bad = (x < 0) | (x + size > t.device.mem.size)
    if not bad.any():
        bad = ~(t.device.valid[x] & t.device.valid[x + size - 1])
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise PTXError(
            f"{t.kernel.name}: global {verb} out of bounds, "
            f"address {int(x[first]) + GLOBAL_BASE:#x}, "
            f"{_where(t, first, index)}: {ins.text}"
        )
    return x, False


def shared_offsets(t, ins, addresses, size, index):
    """Byte offsets into the batch's shared memory after checks."""
    x = addresses if index is None else addresses[index]
    if x.size:
        if size > 1 and (x & (size - 1)).any():
            bad = int(np.flatnonzero(x & (size - 1))[0])
            raise PTXError(
                f"misaligned shared access of {size} bytes at {_where(t, bad, index)}: {ins.text}"
            )
        low, high = int(x.min()), int(x.max()) + size
        if low < 0 or high > t.batch.shared_size:
            bad = int(np.flatnonzero((x < 0) | (x + size > t.batch.shared_size))[0])
            raise PTXError(
                f"{t.kernel.name}: shared access out of bounds (offset {int(x[bad])}, size "
                f"{t.batch.shared_size}), {_where(t, bad, index)}: {ins.text}"
            )
    return x + (t.cta_base if index is None else t.cta_base[index])


def shared_read(t, ins, x, size, index):
    """Initialisation and race checks of a shared read."""
    batch = t.batch
    if t.options.init and not (
        batch.shared_init[x].all() and batch.shared_init[x + size - 1].all()
    ):
        t.finding("uninitialised shared memory read: " + ins.text)
    if batch.checker is not None:
        batch.checker.read(x, size, t.warps(index), t.epochs(index), ins.text)


def _mark(flags, x, size):
    for k in range(size):
        flags[x + k] = True


def count_shared(t, ins, kind, addresses, mask, size):
    if t.stats.enabled:
        t.stats.shared_access(ins.pc, kind, addresses, mask, size, t.batch.ctas if t.regular else 1)


@instr("ld", "ldu")
def _load(program, ins):
    kind, mods = ins.mods[-1], ins.mods
    size = SIZE[kind]
    targets = vector(ins.operands[0])
    writes = [None if r == "_" else writer(program, r) for r in targets]
    where = address(program, ins.operands[1])
    space = _space(mods, where)
    total = size * len(targets)
    dtype, raw = np.dtype(DTYPE[kind]), UINT[size * 8]
    shift = size.bit_length() - 1
    if space == "param":
        if not isinstance(where, tuple):
            raise PTXError("computed parameter address")

        def load_param(t, mask):
            data = t.params[where[0]]
            for i, write in enumerate(writes):
                if write is not None:
                    write(t, np.frombuffer(data, dtype, 1, where[1] + i * size)[0], mask)

        return load_param

    def load(t, mask):
        where_to, addresses = space, where(t)
        mask, index = t.lanes_of(mask)
        if space is None:
            where_to, addresses = _resolve(t, addresses, mask)
        if where_to == "global":
            x, initialised = global_offsets(t, ins, addresses, total, index, "load")
            checked = t.options.init and x.size and not initialised
            if checked and not (t.device.init[x].all() and t.device.init[x + total - 1].all()):
                t.finding("uninitialised global memory read: " + ins.text)
            if t.stats.enabled:
                t.stats.global_access(ins.pc, "ld", addresses, mask, total)
            memory = t.device.view(raw)
        elif where_to == "shared":
            x = shared_offsets(t, ins, addresses, total, index)
            count_shared(t, ins, "ld", addresses, mask, total)
            shared_read(t, ins, x, total, index)
            memory = t.batch.shared.view(raw)
        else:
            lane = t.index if index is None else index
            x = (addresses if index is None else addresses[index]) + lane * t.local_stride
            memory = t.local.view(raw)
            t.stats.counters["local_ld_bytes"] += total * x.size
        element = x >> shift
        for i, write in enumerate(writes):
            if write is None:
                continue
            value = memory.take(element + i if i else element).view(dtype)
            if index is not None:
                spread = np.zeros(t.lanes, dtype)
                spread[index] = value
                value = spread
            write(t, value, mask)

    return load


@instr("st")
def _store(program, ins):
    kind, mods = ins.mods[-1], ins.mods
    size = SIZE[kind]
    sources = vector(ins.operands[1])
    reads = [reader(program, r, f"b{size * 8}") for r in sources]
    if "param" in mods:  # argument of a call, which is not supported anyway
        return lambda t, mask: None
    where = address(program, ins.operands[0])
    space = _space(mods, where)
    total, raw, shift = size * len(sources), UINT[size * 8], size.bit_length() - 1

    def store(t, mask):
        where_to, addresses = space, where(t)
        mask, index = t.lanes_of(mask)
        if space is None:
            where_to, addresses = _resolve(t, addresses, mask)
        values = [lanes(t, r(t)) if index is None else lanes(t, r(t))[index] for r in reads]
        if where_to == "global":
            x, initialised = global_offsets(t, ins, addresses, total, index, "store")
            if t.stats.enabled:
                t.stats.global_access(ins.pc, "st", addresses, mask, total)
            memory = t.device.view(raw)
            if not initialised:
                _mark(t.device.init, x, total)
        elif where_to == "shared":
            x = shared_offsets(t, ins, addresses, total, index)
            count_shared(t, ins, "st", addresses, mask, total)
            memory = t.batch.shared.view(raw)
            if t.batch.checker is not None:

                def changes():
                    e = x >> shift
                    return np.any([memory[e + i] != v for i, v in enumerate(values)], axis=0)

                t.batch.checker.write(x, total, t.warps(index), t.epochs(index), ins.text, changes)
            if t.options.init:
                _mark(t.batch.shared_init, x, total)
        else:
            lane = t.index if index is None else index
            x = (addresses if index is None else addresses[index]) + lane * t.local_stride
            memory = t.local.view(raw)
            t.stats.counters["local_st_bytes"] += total * x.size
        element = x >> shift
        for i, value in enumerate(values):
            e = element + i if i else element
            memory[e] = value
            if where_to != "local" and t.options.race and (memory[e] != value).any():
                t.finding(
                    "WAW race, one instruction stores different values to one address: " + ins.text
                )

    return store


@instr("cp")
def _cp_async(program, ins):
    """Data lands at the wait; until then the destination holds 0xFF bytes and is 'pending'."""
    mods = ins.mods
    if "async" not in mods or "bulk" in mods or "mbarrier" in mods:
        raise PTXError("only cp.async, commit_group, wait_group and wait_all are supported")
    if "commit_group" in mods:

        def commit(t, mask):
            t.async_group = t.async_group + t.active(mask)

        return commit
    if "wait_group" in mods or "wait_all" in mods:
        keep = int(ins.operands[0], 0) if "wait_group" in mods else -1
        return lambda t, mask: _complete(t, t.active(mask), keep)
    target, origin = address(program, ins.operands[0]), address(program, ins.operands[1])
    size = int(ins.operands[2], 0)
    ignore = amount = None
    if len(ins.operands) > 3 and not ("cache_hint" in ins.opcode and len(ins.operands) == 4):
        operand = ins.operands[3]
        if program.kernel.is_register(operand) and program.kernel.width(operand) == 1:
            ignore = reader(program, operand, "pred")
        else:
            amount = reader(program, operand, "u32")

    def issue(t, mask):
        mask, index = t.lanes_of(mask)
        active = t.active(mask)
        to, source = target(t), origin(t)
        if ignore is not None:
            length = np.where(ignore(t), 0, size)
        else:
            length = np.broadcast_to(size if amount is None else amount(t), (t.lanes,)).astype(
                np.int64
            )
        x = shared_offsets(t, ins, to, size, index)
        live = active & (length > 0)
        chosen = t.index if index is None else index
        if (live & (length != size)).any():
            raise PTXError("cp.async with a partial source size is not supported: " + ins.text)
        data = np.zeros((chosen.size, size), np.uint8)
        taking = np.flatnonzero(live)
        if taking.size:
            g, initialised = global_offsets(t, ins, source, size, taking, "load (cp.async)")
            if not initialised and t.options.init and not t.device.init[g].all():
                t.finding("uninitialised global memory read: " + ins.text)
            row = np.flatnonzero(live[chosen])
            data[row] = t.device.mem.reshape(-1, size)[g // size]
        if t.stats.enabled:
            t.stats.global_access(
                ins.pc, "ld", source, None if taking.size == t.lanes else live, size
            )
            count_shared(t, ins, "cpasync", to, mask, size)
        if t.batch.checker is not None:
            t.batch.checker.async_issue(x, size, t.warps(index), t.epochs(index), ins.text)
        t.batch.shared.reshape(-1, size)[x // size] = 0xFF
        t.async_copies.append((chosen, t.async_group[chosen], x, data, size))

    return issue


def _complete(t, active, keep):
    """Land the copies of all groups but the newest ``keep`` (all of them for -1)."""
    remaining = []
    for chosen, group, x, data, size in t.async_copies:
        done = active[chosen]
        if keep >= 0:
            done = done & (group < t.async_group[chosen] - keep)
        if done.any():
            everything = bool(done.all())
            xx, dd, lane = (x, data, chosen) if everything else (x[done], data[done], chosen[done])
            if t.batch.checker is not None:
                t.batch.checker.async_done(xx, size, t.warps(lane), t.epochs(lane))
            t.batch.shared.reshape(-1, size)[xx // size] = dd
            t.batch.shared_init.reshape(-1, size)[xx // size] = True
            if everything:
                continue
        rest = ~done
        remaining.append((chosen[rest], group[rest], x[rest], data[rest], size))
    t.async_copies = remaining


_ATOMIC = {
    "add": lambda o, v: o + v,
    "min": min,
    "max": max,
    "and": lambda o, v: o & v,
    "or": lambda o, v: o | v,
    "xor": lambda o, v: o ^ v,
    "exch": lambda o, v: v,
    "inc": lambda o, v: type(o)(0) if o >= v else o + type(o)(1),
    "dec": lambda o, v: v if o == 0 or o > v else o - type(o)(1),
}
_UFUNC = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instr("atom", "red")
def _atomic(program, ins):
    """Apply atomics in lane order; with an unused result by one ufunc.at, else lane by lane."""
    if "async" in ins.mods:
        raise PTXError("red.async is not supported")
    operands = ins.operands if ins.op == "atom" else ["_", *ins.operands]
    op = next(m for m in ins.mods if m in _ATOMIC or m == "cas")
    kind = ins.mods[-1]
    size = SIZE[kind]
    raw = f"b{size * 8}"
    targets, values = vector(operands[0]), vector(operands[2])
    targets = targets * len(values) if targets == ["_"] else targets
    writes = [None if r == "_" else writer(program, r) for r in targets]
    reads = [reader(program, r, raw) for r in values]
    swap = reader(program, operands[3], raw) if op == "cas" else None
    where = address(program, operands[1])
    space = _space(ins.mods, where)
    total, shift = size * len(values), size.bit_length() - 1
    narrow = kind in ("bf16", "f16x2", "bf16x2")
    dtype = UINT[size * 8] if narrow else DTYPE[kind]

    def apply(memory, element, value, other):
        """Sequential update; returns the old values."""
        old = np.empty(element.size, memory.dtype)
        for j, e in enumerate(element):
            o = old[j] = memory[e]
            if op == "cas":
                memory[e] = other[j] if o == value[j] else o
            elif narrow and op != "exch":
                memory[e] = _narrow(o, value[j], kind, _ATOMIC[op])
            else:
                memory[e] = _ATOMIC[op](o, value[j])
        return old

    def run(t, mask):
        where_to, addresses = space, where(t)
        mask, index = t.lanes_of(mask)
        if space is None:
            where_to, addresses = _resolve(t, addresses, mask)
        if where_to == "global":
            x, initialised = global_offsets(t, ins, addresses, total, index, "atomic")
            if not initialised:
                if t.options.init and not t.device.init[x].all():
                    t.finding("atomic on uninitialised global memory: " + ins.text)
                _mark(t.device.init, x, total)
            if t.stats.enabled:
                t.stats.global_access(ins.pc, "atom", addresses, mask, total)
            memory = t.device.view(dtype)
        else:
            x = shared_offsets(t, ins, addresses, total, index)
            if t.options.init and not t.batch.shared_init[x].all():
                t.finding("atomic on uninitialised shared memory: " + ins.text)
            count_shared(t, ins, "atom", addresses, mask, total)
            memory = t.batch.shared.view(dtype)
        element = x >> shift
        other = None
        if swap is not None:
            other = lanes(t, swap(t)).view(dtype)
            other = other if index is None else other[index]
        for i, (read, write) in enumerate(zip(reads, writes, strict=False)):
            value = lanes(t, read(t)).view(dtype)
            value = value if index is None else value[index]
            if write is None and op in _UFUNC and not narrow:
                _UFUNC[op].at(memory, element + i, value)
                continue
            old = apply(memory, element + i, value, other)
            if write is not None:
                spread = np.zeros(t.lanes, dtype)
                spread[slice(None) if index is None else index] = old
                write(t, spread, mask)

    return run


def _narrow(old, value, kind, function):
    """Atomic arithmetic on bf16 or a packed pair of halves."""
    if kind == "bf16":
        a, b = (bf16_to_f32(np.array([v], np.uint16)) for v in (old, value))
        return f32_to_bf16(np.array([function(a[0], b[0])], np.float32))[0]
    a, b = (unpack(np.array([v], np.uint32), kind)[0] for v in (old, value))
    return pack(np.array([[function(p, q) for p, q in zip(a, b, strict=False)]], np.float32), kind)[
        0
    ]
