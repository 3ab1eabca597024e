"""Operands compiled to closures: readers, writers and addresses.

``reader(program, operand, type)`` gives ``read(strand)`` -> array over lanes or a numpy scalar;
``writer(program, operand)`` gives ``write(strand, value, mask)``. Registers hold raw unsigned bits
(predicates: bool). Register arrays are never modified in place, so several registers may share one
array.
"""

import re

import numpy as np

from .types import DTYPE, LOCAL_BASE, SHARED_BASE, UINT, PTXError, bf16_to_f32

_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyz]$|"
    r"%(laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock64|clock_hi|globaltimer|"
    r"globaltimer_lo|lanemask_\w+|dynamic_smem_size|total_smem_size|cluster_ctarank|"
    r"cluster_nctarank)$"
)


def convert(raw, size, kind):
    """Reinterpret raw register bits of any width as PTX type ``kind``."""
    dtype = DTYPE[kind]
    if raw.dtype.itemsize != size:
        raw = raw.astype(UINT[size * 8])
    return bf16_to_f32(raw) if kind == "bf16" else raw.view(dtype)


def reader(program, operand, kind):
    """Compile a source operand read as PTX type ``kind`` (bf16 is widened to float32)."""
    kernel = program.kernel
    if operand[0] == "!":
        inner = reader(program, operand[1:], "pred")
        return lambda t: ~inner(t)
    if operand == "WARP_SZ":
        operand = "32"
    if _SPECIAL.match(operand):
        program.specials.add(operand)
        size = np.dtype(DTYPE[kind]).itemsize
        return lambda t: convert(t.special[operand], size, kind)
    if kernel.is_register(operand):
        slot, width = kernel.slot(operand), kernel.width(operand)
        if kind in ("pred", "b1"):
            return lambda t: t.regs[slot]
        dtype = np.dtype(DTYPE[kind])
        if width == dtype.itemsize * 8 and kind != "bf16":
            if dtype.kind == "u":
                return lambda t: t.regs[slot]
            return lambda t: t.regs[slot].view(dtype)
        return lambda t: convert(t.regs[slot], dtype.itemsize, kind)
    if operand in kernel.globals:
        return lambda t: np.uint64(program.pointers[operand])
    value = immediate(kernel, operand, kind)
    return lambda t: value


def immediate(kernel, operand, kind):
    """Value of a literal or of a shared/local symbol as PTX type ``kind``."""
    dtype = np.dtype(DTYPE[kind])
    if operand in kernel.shared:
        return dtype.type(kernel.shared[operand])
    if operand in kernel.local:
        return dtype.type(kernel.local[operand])
    m = re.match(r"(-?)0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})$", operand)
    if m:
        wide = len(m.group(2)) == 16
        bits = int(m.group(2), 16) ^ ((1 << (63 if wide else 31)) if m.group(1) else 0)
        number = np.array(bits, np.uint64 if wide else np.uint32)
        value = number.view(np.float64 if wide else np.float32)[()]
        if kind == "bf16":
            return np.float32(value)
        return dtype.type(value) if dtype.kind == "f" else number.astype(dtype)[()]
    if re.match(r"-?\d+\.\d*([eE][-+]?\d+)?$", operand):
        return np.float32(operand) if kind == "bf16" else dtype.type(float(operand))
    try:
        number = (
            int(operand.rstrip("Uu"), 0)
            if operand[:1] != "0" or operand[1:2] in "xXbB"
            else int(operand.rstrip("Uu"), 8)
        )
    except ValueError:
        raise PTXError(f"operand {operand!r} is not supported") from None
    if kind in ("pred", "b1"):
        return np.bool_(number)
    bits = np.array(number & ((1 << (8 * dtype.itemsize)) - 1), UINT[8 * dtype.itemsize])
    if kind == "bf16":
        return bf16_to_f32(bits)[()]
    return bits.view(dtype)[()] if kind == "f16" or dtype.kind != "f" else dtype.type(number)


def writer(program, operand):
    """Compile a destination register; values of another width are extended as PTX does."""
    kernel = program.kernel
    if operand == "_":
        return lambda t, value, mask: None
    slot, width = kernel.slot(operand), kernel.width(operand)
    raw = np.dtype(np.bool_ if width == 1 else UINT[width])

    def write(t, value, mask):
        if value.dtype != raw:
            value = _to_bits(value, raw)
        if mask is None:
            t.regs[slot] = value if value.ndim else np.full(t.lanes, value)
        else:
            t.regs[slot] = np.where(mask, value, t.regs[slot])

    return write


def _to_bits(value, raw):
    value = np.asarray(value)
    if raw == np.bool_ or value.dtype == np.bool_:
        return value.astype(raw)
    if value.dtype.itemsize == raw.itemsize:
        return value.view(raw)
    if value.dtype.kind == "f":
        return value.view(UINT[8 * value.dtype.itemsize]).astype(raw)
    return (
        value.astype(f"i{raw.itemsize}").view(raw) if value.dtype.kind == "i" else value.astype(raw)
    )


def lanes(t, value):
    """Broadcast a scalar to all lanes."""
    return value if np.ndim(value) else np.broadcast_to(value, (t.lanes,))


def address(program, operand):
    """Compile ``[base+offset]``.

    Returns (parameter name, offset) for the parameter space, else a closure giving int64 byte
    addresses.
    """
    kernel = program.kernel
    m = re.match(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
    if not m:
        raise PTXError(f"address {operand!r} is not supported")
    base, offset = m.group(1), int(m.group(2) or "0", 0)
    if any(p[0] == base for p in kernel.params):
        return base, offset
    if kernel.is_register(base):
        slot = kernel.slot(base)
        if offset:
            return lambda t: t.regs[slot].astype(np.int64) + offset
        return lambda t: t.regs[slot].astype(np.int64)
    if base in kernel.globals:
        return lambda t: np.full(t.lanes, program.pointers[base] + offset, np.int64)
    constant = int(immediate(kernel, base, "u64")) + offset
    return lambda t: np.full(t.lanes, constant, np.int64)


def window(space):
    """Offset between a generic address and an address in ``space``."""
    return {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(space, 0)
