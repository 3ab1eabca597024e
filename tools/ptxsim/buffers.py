"""Host arrays <-> device memory for one launch."""

import numpy as np

from .types import GLOBAL_BASE


def _torch():
    import sys

    return sys.modules.get("torch")


def is_tensor(value):
    torch = _torch()
    return torch is not None and isinstance(value, torch.Tensor)


class Buffers:
    """Copies every distinct storage in once, hands out addresses, and copies everything back.

    Bounds are those of the storage: an access outside a view but inside its storage is not seen.
    """

    def __init__(self, device):
        self.device = device
        self._stores = {}  # host pointer -> (host bytes, device address)
        self._poisoned = {}

    def address(self, value, name=None, poison=False):
        """Device address of a torch CPU tensor or numpy array."""
        host, shift, span = self._host_bytes(value, name)
        key = host.ctypes.data
        if key not in self._stores:
            self._stores[key] = (host, self.device.put(host) if host.size else GLOBAL_BASE)
        address = self._stores[key][1] + shift
        if poison and span:
            self.device.poison(address, span)
            self._poisoned[name] = (address, span)
        return address

    @staticmethod
    def _host_bytes(value, name):
        if is_tensor(value):
            if value.device.type != "cpu":
                raise ValueError(f"argument {name}: ptxsim takes CPU tensors, not {value.device}")
            torch = _torch()
            storage = value.untyped_storage()
            host = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            if value.numel() == 0:
                return host, 0, 0
            last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=False))
            return host, value.data_ptr() - storage.data_ptr(), (last + 1) * value.element_size()
        array = np.asarray(value)
        if not array.flags.c_contiguous or not array.flags.writeable:
            raise ValueError(f"argument {name}: numpy arrays must be C-contiguous and writeable")
        host = array.reshape(-1).view(np.uint8)
        return host, 0, host.size

    def finish(self, stats):
        """Copy device memory back to the host and record unwritten output bytes."""
        for name, (address, span) in self._poisoned.items():
            stats.unwritten[str(name)] = self.device.unwritten(address, span)
        for host, address in self._stores.values():
            host[:] = self.device.mem[address - GLOBAL_BASE :][: host.size]

    @staticmethod
    def arena_for(values, at_least):
        """Arena size that certainly holds all the values."""
        need = 1 << 20
        for v in values:
            need += (v.untyped_storage().nbytes() if is_tensor(v) else np.asarray(v).nbytes) + 2048
        return (max(at_least, need) + 511) // 512 * 512
