"""Static facts of the wgmma kernel: needs nvcc and CUTLASS, no GPU; takes minutes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import ptxsim
import pytest
from setup_file import ROOT, setup_file

pytestmark = pytest.mark.gpu_static_full


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The object file, compiled with the build's own flags, and the output of ptxas."""
    setup = setup_file()
    nvcc = setup.find_nvcc()
    if not nvcc:
        pytest.skip("no nvcc")
    cutlass, why = setup.find_cutlass()
    if why:
        pytest.skip(why)
    plan = setup.CudaPlan(cutlass=cutlass, architectures=["90"])
    flags = [*setup.nvcc_flags().split(), *setup.cuda_sources(plan)[setup.CUTLASS_KERNELS]]
    made = tmp_path_factory.mktemp("wgmma") / "wgmma.o"
    source = str(ROOT / setup.CUTLASS_KERNELS)
    command = [nvcc, *flags, "-Xptxas=-v", "-c", source, "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return made, output


def test_nothing_spills_and_nothing_is_serialised(built: tuple[Path, str]) -> None:
    _, output = built
    assert not setup_file().SERIALISED.search(output)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", output)
    # Two types, two tiles.
    assert frames == [("0", "0", "0")] * 4
    assert {int(n) for n in re.findall(r"Used (\d+) registers", output)} == {168}


def test_it_multiplies_by_hgmma_and_moves_tiles_by_the_copy_engine(
    built: tuple[Path, str],
) -> None:
    made, _ = built
    tool = ptxsim.sass.tool("cuobjdump")
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
