"""What `import convmixer_fast` costs and touches."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import torch
before = set(sys.modules)
import convmixer_fast
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = new & {"triton", "timm", "torchvision", "sklearn", "scipy", "PIL", "huggingface_hub",
               "ninja", "pybind11", "setuptools", "mmengine", "mmpretrain", "pandas", "pyarrow"}
assert not heavy, heavy
assert "triton" not in sys.modules
assert "convmixer_fast._cpu" not in sys.modules, "the extension loads at first use"
print("ok")
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def test_import_brings_in_nothing_heavy_and_builds_nothing():
    result = run("-c", SCRIPT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ok\n"


def test_a_forward_pass_does_not_import_triton():
    result = run(
        "-c",
        "import sys, torch, convmixer_fast as cf\n"
        "with torch.no_grad(): cf.ConvMixer(8, 1, 3, 4).eval()(torch.randn(1, 3, 8, 8))\n"
        "print('triton' in sys.modules)",
    )
    assert result.stdout == "False\n", result.stderr


def test_public_names_are_there():
    import convmixer_fast

    for name in convmixer_fast.__all__:
        assert getattr(convmixer_fast, name) is not None
    assert convmixer_fast.__version__[0].isdigit()
