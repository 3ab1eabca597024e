"""PTX scalar types, number formats and the exception classes shared by every module."""

import numpy as np

GLOBAL_BASE = 0x7F0000000000  # device address of arena byte 0
SHARED_BASE = 0x600000000000  # generic-address window of shared memory
LOCAL_BASE = 0x610000000000  # generic-address window of local memory

UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
DTYPE = {
    "u8": np.uint8,
    "s8": np.int8,
    "b8": np.uint8,
    "u16": np.uint16,
    "s16": np.int16,
    "b16": np.uint16,
    "bf16": np.uint16,
    "f16": np.float16,
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "f32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
    "f64": np.float64,
    "f32x2": np.uint64,
    "pred": np.bool_,
    "b1": np.bool_,
}
SIZE = {name: np.dtype(dtype).itemsize for name, dtype in DTYPE.items()}
FLOATS = {"f16", "bf16", "f32", "f64"}


class PTXError(Exception):
    """An operation that a GPU rejects or leaves undefined, or that ptxsim does not support."""


class RaceError(PTXError):
    """Raised at the end of a launch in strict mode when any check reported a finding."""


def bf16_to_f32(bits):
    """uint16 array of bfloat16 bit patterns -> float32 array."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(value, toward_zero=False):
    """float32 array -> uint16 array of bfloat16 bit patterns (round to nearest even)."""
    u = np.ascontiguousarray(value, np.float32).view(np.uint32)
    if toward_zero:
        return (u >> 16).astype(np.uint16)
    rounded = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def f64_to_f32_odd(value):
    """float64 -> float32 rounded to odd: a second rounding to a narrower format is then exact."""
    near = np.atleast_1d(np.asarray(value).astype(np.float32))
    back = near.astype(np.float64)
    bits = near.view(np.uint32)
    fix = (back != value) & ((bits & 1) == 0) & np.isfinite(back)
    return np.where(fix, np.where(np.abs(back) > np.abs(value), bits - 1, bits + 1), bits).view(
        np.float32
    )


_SMALLEST_NORMAL = {"f16": 6.103515625e-05, "f16x2": 6.103515625e-05}


def flush(value, kind):
    """Flush denormals of PTX type ``kind``, held as float, to zero of the same sign (.ftz)."""
    tiny = value.dtype.type(_SMALLEST_NORMAL.get(kind, 1.1754943508222875e-38))
    return np.where(np.abs(value) < tiny, np.copysign(value.dtype.type(0), value), value)
