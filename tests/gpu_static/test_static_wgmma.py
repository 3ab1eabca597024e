"""The machine code of the wgmma kernel; needs nvcc and CUTLASS, no GPU; minutes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from setup_file import ROOT, setup_file
from simulator import ptxsim

pytestmark = pytest.mark.gpu_static_full


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The object, with the build's own flags, and what ptxas said."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("no cmake or no ninja")
    folder = tmp_path_factory.mktemp("wgmma")
    spec = importlib.util.find_spec("cutlass_library")
    package = Path(spec.origin).parent if spec and spec.origin else ""
    environment = {**os.environ, "NVCC_APPEND_FLAGS": "-Xptxas=-v", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    environment.pop("CONVMIXER_FAST_BUILD_CACHE", None)
    options = ["-GNinja", "-DPART=_cuda", f"-DCUTLASS_PACKAGE={package}"]
    told = ""
    for command in (
        ["-S", ROOT / "csrc", "-B", folder, *options],
        ["--build", folder, "--target", "pointwise_wgmma.o"],
    ):
        done = subprocess.run(
            ["cmake", *command], capture_output=True, text=True, check=False, env=environment
        )
        told = done.stdout + done.stderr
        if "no nvcc" in told or "without wgmma" in told:
            pytest.skip("no nvcc or no CUTLASS")
        assert done.returncode == 0, told
    made = folder / "pointwise_wgmma.o"
    return made, told


def test_nothing_spills_and_nothing_is_serialised(built: tuple[Path, str]) -> None:
    _, told = built
    assert not setup_file().SERIALISED.search(told)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", told)
    # Two types, two tiles.
    assert frames == [("0", "0", "0")] * 4
    assert {int(n) for n in re.findall(r"Used (\d+) registers", told)} == {168}


def test_it_multiplies_by_hgmma_and_moves_tiles_by_the_copy_engine(
    built: tuple[Path, str],
) -> None:
    made, _ = built
    tool = ptxsim().sass.tool("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump")
    sass = subprocess.run([tool, "-sass", str(made)], capture_output=True, text=True).stdout
    # Each kernel's sections are its own.
    kernels = sass.split("Function : ")[1:]
    assert len(kernels) == 4
    for code in kernels:
        names = re.findall(r"\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9.]*)", code)
        count = lambda start, names=names: sum(n.startswith(start) for n in names)  # noqa: E731
        assert count("HGMMA") >= 4
        assert count("UTMALDG") == 2
        assert count("UTMASTG") >= 1
        assert count("LDL") == count("STL") == count("CALL") == 0
        assert count("HMMA") == 0
