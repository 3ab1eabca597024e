"""CUDA C++ kernels: compile with nvcc to PTX and launch on host arrays."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from . import machine, triton_driver
from .buffers import Buffers, is_tensor
from .parse import parse


class CompileError(RuntimeError):
    """nvcc failed; the message is its output."""


def nvcc():
    """Path of nvcc ($PTXSIM_NVCC, PATH, $CUDA_HOME/bin, /usr/local/cuda/bin) or None."""
    candidates = [os.environ.get("PTXSIM_NVCC"), shutil.which("nvcc")]
    candidates += [
        os.path.join(root, "bin", "nvcc")
        for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
        if root
    ]
    return next((c for c in candidates if c and os.path.exists(c)), None)


def compile(source, arch="sm_80", includes=(), flags=(), defines=None):
    """Compile a .cu file (path) or source text to PTX and parse it.

    ``defines``: dict name -> value (None for a bare -D). ``includes``: directories. Needs nvcc.
    """
    return CudaModule(to_ptx(source, arch, includes, flags, defines))


def to_ptx(source, arch="sm_80", includes=(), flags=(), defines=None):
    """PTX text of a .cu file or of source text."""
    tool = nvcc()
    if tool is None:
        raise CompileError("nvcc not found: put it on PATH or set PTXSIM_NVCC")
    with tempfile.TemporaryDirectory(prefix="ptxsim") as work:
        is_text = isinstance(source, str) and ("\n" in source or "{" in source)
        path = Path(work, "kernel.cu") if is_text else Path(source)
        if is_text:
            path.write_text(source)
        out = Path(work, "kernel.ptx")
        command = [tool, f"-arch={arch}", "-ptx", "-std=c++17", str(path), "-o", str(out)]
        command += [f"-I{d}" for d in includes]
        command += [f"-D{k}" if v is None else f"-D{k}={v}" for k, v in (defines or {}).items()]
        result = subprocess.run(command + list(flags), capture_output=True, text=True)
        if result.returncode:
            raise CompileError(result.stderr or result.stdout)
        return out.read_text()


class CudaModule:
    """Kernels of one PTX file; the text may come from any compiler."""

    def __init__(self, ptx):
        self.ptx = ptx
        self.module = parse(ptx)

    @property
    def kernels(self):
        return sorted(self.module.kernels)

    def launch(self, name, grid, block, args, dynamic_smem=0, **settings):
        """Run a kernel and return its Stats, also appended to ``ptxsim.log``.

        Arrays are updated in place.

        name : kernel name, or a substring of exactly one mangled name.
        args : numpy arrays (C-contiguous), torch CPU tensors, None (null pointer), numbers, numpy
            scalars, or bytes / ctypes structures / structured numpy scalars for parameters passed
            by value.
        settings : fields of `Options`; ``poison`` holds positions in ``args``.
        """
        options = machine.Options().replace(**settings)
        program = machine.compile_kernel(self.module, name)
        arrays = [a for a in args if is_tensor(a) or (isinstance(a, np.ndarray) and a.ndim)]
        device = machine.Device(Buffers.arena_for(arrays, options.arena))
        buffers = Buffers(device)
        values = []
        for i, a in enumerate(args):
            if is_tensor(a) or (isinstance(a, np.ndarray) and a.ndim):
                values.append(buffers.address(a, i, i in options.poison))
            elif a is None:
                values.append(0)
            elif isinstance(a, (np.void, np.floating, np.ndarray)):
                values.append(a.tobytes())
            elif isinstance(a, (int, float, bytes, bytearray, np.integer)):
                values.append(a)
            else:
                values.append(bytes(a))  # ctypes structure
        if len(values) != len(program.kernel.params):
            raise TypeError(
                f"{program.kernel.name} takes {len(program.kernel.params)} arguments, "
                f"{len(values)} given"
            )
        stats = machine.launch(
            program, device, grid, block, values, dynamic_smem, options.replace(strict=False)
        )
        buffers.finish(stats)
        triton_driver.log.append(stats)
        machine.raise_if_strict(stats, options)
        return stats
