"""Triton driver whose launches execute the compiled PTX on CPU tensors."""

import contextlib

import numpy as np

from . import machine
from .buffers import Buffers, is_tensor
from .parse import parse
from .types import PTXError, f32_to_bf16

log = []  # Stats of every launch, oldest first
options = machine.Options()  # settings of the installed driver
_saved = None
_SHARED_LIMIT = {
    70: 98304,
    75: 65536,
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}


def last():
    """Stats of the most recent launch."""
    if not log:
        raise RuntimeError("no kernel has been launched on ptxsim")
    return log[-1]


def _make_driver(cc):
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class SimulatedDriver(DriverBase):
        """The part of Triton's driver interface that launching needs."""

        ptxsim = True

        def __init__(self):
            self.utils, self.launcher_cls = self, None

        @classmethod
        def is_active(cls):
            return True

        def map_python_to_cpp_type(self, ty):
            return ty

        def get_current_target(self):
            return GPUTarget("cuda", cc, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_current_device(self):
            return f"ptxsim:{cc}"  # a cache key of its own in JITFunction.device_caches

        def get_current_stream(self, device=None):
            return 0

        def set_current_device(self, device):
            pass

        def get_device_properties(self, device=None):
            return {
                "max_shared_mem": _SHARED_LIMIT.get(cc, 101376),
                "multiprocessor_count": 108,
                "max_num_regs": 65536,
                "warpSize": 32,
                "sm_clock_rate": 1,
                "mem_clock_rate": 1,
                "mem_bus_width": 1,
            }

        def get_benchmarker(self):
            """Nothing is timed: the autotuner keeps its first configuration."""
            return lambda fn, quantiles=None, **_: [1.0] * len(quantiles) if quantiles else 1.0

        def get_empty_cache_for_benchmark(self):
            return torch.empty(0)

        def clear_cache(self, cache):
            pass

    return SimulatedDriver()


def _scalar(value, kind):
    """Python number in the form that its Triton type ``kind`` is passed in."""
    if kind == "bf16":
        return int(f32_to_bf16(np.array([value], np.float32))[0])
    return float(value) if kind in ("fp16", "fp32", "fp64") else value


def _launcher(compiled):
    """The function Triton calls to launch a CompiledKernel."""
    from triton.runtime.driver import driver

    metadata, source = compiled.metadata, compiled.src
    limit = driver.active.get_device_properties()["max_shared_mem"]
    if metadata.shared > limit:
        from triton.runtime.errors import OutOfResources

        raise OutOfResources(metadata.shared, limit, "shared memory")
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, scratch, 0):
            raise PTXError(f"{metadata.name} needs {scratch}, which ptxsim does not provide")
    program = machine.compile_kernel(parse(compiled.asm["ptx"]), metadata.name)
    names = source.fn.arg_names
    constants = {k[0] if isinstance(k, tuple) else names.index(k) for k in source.constants}

    def run(gx, gy, gz, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args):
        keep = [
            (names[i], a)
            for i, a in enumerate(args)
            if i not in constants and source.signature[names[i]] != "constexpr"
        ]
        tensors = [a for _, a in keep if is_tensor(a)]
        device = machine.Device(Buffers.arena_for(tensors, options.arena))
        buffers = Buffers(device)
        values = [
            buffers.address(a, n, n in options.poison)
            if is_tensor(a)
            else _scalar(a, source.signature[n])
            for n, a in keep
        ]
        threads = 32 * metadata.num_warps
        stats = machine.launch(
            program,
            device,
            (gx, gy, gz),
            (threads, 1, 1),
            values,
            metadata.shared,
            options.replace(strict=False),
        )
        buffers.finish(stats)
        stats.num_warps, stats.num_stages = (
            metadata.num_warps,
            getattr(metadata, "num_stages", None),
        )
        log.append(stats)
        machine.raise_if_strict(stats, options)

    return run


def install_triton(cc=80, **settings):
    """Make Triton launch on ptxsim for compute capability ``cc``; settings are those of `Options`.

    A second call changes the settings. `uninstall_triton` restores the previous driver.
    """
    global options, _saved
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.driver import driver

    options = machine.Options().replace(**settings)
    if _saved is None:
        _saved = (driver._active, CompiledKernel._init_handles)
        original = CompiledKernel._init_handles

        def init_handles(self):
            if not getattr(driver.active, "ptxsim", False):
                return original(self)
            if self.__dict__.get("_run") is None:
                self._run = _launcher(self)
                self.module = self.function = 0
                self.n_regs = self.n_spills = 0
                self.n_max_threads = 1024

        CompiledKernel._init_handles = init_handles
    driver.set_active(_make_driver(cc))


def uninstall_triton():
    """Undo `install_triton`."""
    global options, _saved
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.driver import driver

    if _saved is not None:
        driver._active, CompiledKernel._init_handles = _saved
        _saved = None
    options = machine.Options()


@contextlib.contextmanager
def triton_on_cpu(cc=80, **settings):
    """Run Triton's launches inside the block on ptxsim and append their Stats to the yielded list.

    The previous driver and settings come back at exit, also when blocks are nested.
    """
    global options, _saved, log
    from triton.runtime.driver import driver

    before = (_saved is not None, driver._active, options, log)
    log = mine = []
    try:
        install_triton(cc, **settings)
        yield mine
    finally:
        installed, active, options, log = before
        if installed:
            driver._active = active
        else:
            keep = options
            uninstall_triton()
            options = keep
