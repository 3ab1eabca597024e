"""Simulator of compiled GPU kernels: runs PTX on a CPU, counts its work, checks its barriers.

Triton:   ``ptxsim.install_triton(cc=80)`` or ``with ptxsim.triton_on_cpu(cc=80) as log:``
CUDA C++: ``ptxsim.cuda.compile(path).launch(name, grid, block, args)``
Static:   ``ptxsim.sass.analyse(cubin)``, ``ptxsim.sass.aot(fn, signature, ...)``
Bounds:   ``ptxsim.model.bound(stats, 'A100')``
"""

from . import cuda, model, sass, triton_driver
from .machine import ORDERS, Device, Options, Program, compile_kernel, launch
from .parse import parse
from .stats import Stats
from .triton_driver import install_triton, last, triton_on_cpu, uninstall_triton
from .types import PTXError, RaceError

__version__ = "1.0.0"
__all__ = [
    "ORDERS",
    "Device",
    "Options",
    "PTXError",
    "Program",
    "RaceError",
    "Stats",
    "compile_kernel",
    "cuda",
    "install_triton",
    "last",
    "launch",
    "log",
    "model",
    "parse",
    "sass",
    "triton_on_cpu",
    "uninstall_triton",
]


def __getattr__(name):
    if name == "log":  # the list that launches are appended to now
        return triton_driver.log
    raise AttributeError(f"module 'ptxsim' has no attribute {name!r}")
