"""Simulated device memory: one arena, bump-allocated, with validity and initialisation shadows."""

import bisect

import numpy as np

from .types import GLOBAL_BASE, PTXError

_ALIGN = 512


class Device:
    """Global memory.

    Addresses are ``GLOBAL_BASE + offset``; a guard gap follows every allocation.
    """

    def __init__(self, size=1 << 28):
        self.mem = np.zeros(size, np.uint8)  # pages are mapped on first touch
        self.valid = np.zeros(size, np.bool_)
        self.init = np.zeros(size, np.bool_)
        self.top = _ALIGN
        self._starts, self._ends, self._full = [], [], []
        self._views = {}

    def alloc(self, size, initialised=False):
        """Device address of ``size`` new bytes, filled with 0xFF (NaN in every float format)."""
        start = self.top
        self.top += (size + _ALIGN - 1) // _ALIGN * _ALIGN + _ALIGN
        if self.top > self.mem.size:
            raise PTXError(f"device arena of {self.mem.size} bytes is full: pass a larger `arena`")
        self.valid[start : start + size] = True
        self.init[start : start + size] = initialised
        self.mem[start : start + size] = 0xFF
        self._starts.append(start)
        self._ends.append(start + size)
        self._full.append(initialised)
        return GLOBAL_BASE + start

    def put(self, array):
        """Copy an array into a new allocation."""
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        address = self.alloc(flat.size, True)
        self.mem[address - GLOBAL_BASE :][: flat.size] = flat
        return address

    def poison(self, address, size):
        """Fill a range with NaN patterns and mark it uninitialised."""
        offset = address - GLOBAL_BASE
        self.mem[offset : offset + size] = 0xFF
        self.init[offset : offset + size] = False
        self._full[bisect.bisect_right(self._starts, offset) - 1] = False

    def unwritten(self, address, size):
        """Number of bytes of a range that are still uninitialised."""
        offset = address - GLOBAL_BASE
        return int(size - np.count_nonzero(self.init[offset : offset + size]))

    def get(self, address, shape, dtype):
        """Copy memory out as an array."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.mem[address - GLOBAL_BASE :][:size].copy().view(dtype).reshape(shape)

    def view(self, dtype):
        """The whole arena as ``dtype``."""
        dtype = np.dtype(dtype)
        if dtype not in self._views:
            self._views[dtype] = self.mem.view(dtype)
        return self._views[dtype]

    def locate(self, low, high):
        """Two flags of the byte range [low, high).

        It lies inside one allocation; that allocation is fully initialised.
        """
        i = bisect.bisect_right(self._starts, low) - 1
        if i >= 0 and high <= self._ends[i]:
            return True, self._full[i]
        return False, False
