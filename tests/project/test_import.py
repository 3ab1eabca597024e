"""What `import convmixer_fast` costs and touches."""

from __future__ import annotations

import importlib
from pathlib import Path

import fresh_python
import pytest

import convmixer_fast

ROOT = Path(__file__).parents[2]

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


def test_import_brings_in_nothing_heavy_and_builds_nothing():
    result = fresh_python.run("-c", SCRIPT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ok\n"


def test_a_forward_pass_does_not_import_triton():
    result = fresh_python.run(
        "-c",
        "import sys, torch, convmixer_fast as cf\n"
        "with torch.no_grad(): cf.ConvMixer(8, 1, 3, 4).eval()(torch.randn(1, 3, 8, 8))\n"
        "print('triton' in sys.modules)",
    )
    assert result.stdout == "False\n", result.stderr


def test_a_fresh_python_imports_the_package_under_test(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    code = "import convmixer_fast; print(convmixer_fast.__file__)"
    script = tmp_path / "script.py"
    script.write_text(code)
    module = ("-m", "inspect", "--details", "convmixer_fast")  # -m looks in the folder too
    for arguments in (("-c", code), (script,), module):
        done = fresh_python.run(*arguments)
        assert convmixer_fast.__file__ in done.stdout, done.stdout + done.stderr


def test_every_fresh_python_is_fresh_pythons():
    # Builds run in copies of the project on purpose; benchmarks/cpu.py starts its suites, and
    # test_outputs.py a shell, in an empty folder. counts.py and the simulator's tests start scripts
    # that do not import the package; versions.py starts the Pythons of other environments.
    own = {
        "tests/packaging/test_build.py",
        str(Path(__file__).relative_to(ROOT)),
        "tests/versions.py",
        "tests/cli/test_outputs.py",
        "benchmarks/cpu.py",
        "benchmarks/fresh_python.py",
        "tools/counts.py",
        "tools/ptxsim/tests/test_static.py",
    }
    folders = ("tests", "benchmarks", "tools")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    mine = {ROOT / name for name in own}
    assert [f for f in files if f not in mine and "sys.executable" in f.read_text()] == []


def test_public_names_are_there():
    for name in convmixer_fast.__all__:
        assert getattr(convmixer_fast, name) is not None
    assert convmixer_fast.__version__[0].isdigit()


@pytest.mark.parametrize(("old", "name"), [("blocks", "MixerBlock"), ("model", "ConvMixer")])
def test_paths_of_0_1_0_work_and_warn(old: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"convmixer_fast\.{old}\b.* is now"):
        found = getattr(importlib.import_module(f"convmixer_fast.{old}"), name)
    assert found is getattr(convmixer_fast, name)
