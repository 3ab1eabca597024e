"""The host shim: the example passes for any warp order, planted bugs fail, ASan names the line."""

import shutil
import subprocess
from pathlib import Path

import pytest
from test_mutations import SYNC_BUGS

SHIM = Path(__file__).resolve().parent.parent / "shim"


@pytest.fixture(scope="module", autouse=True)
def compiler():
    if shutil.which("g++") is None:
        pytest.skip("g++ not found")


def build(folder, source, *flags):
    (folder / "kernel.cu").write_text(source)
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-g",
        "-Wno-unknown-pragmas",
        f"-I{SHIM}",
        '-DKERNEL="kernel.cu"',
        f"-I{folder}",
        str(SHIM / "example/gemm_host.cpp"),
        "-o",
        str(folder / "gemm"),
        *flags,
    ]
    subprocess.run(command, check=True)
    return lambda seed: subprocess.run(
        [str(folder / "gemm"), str(seed)], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def source():
    return (SHIM / "example/gemm.cu").read_text()


def test_example_is_right_for_several_orders(source, tmp_path):
    run = build(tmp_path, source)
    for seed in (1, 2, 3):
        result = run(seed)
        assert result.returncode == 0
        assert " 0 of 30400 wrong" in result.stdout


@pytest.mark.parametrize("name", SYNC_BUGS)
def test_synchronisation_bug_gives_wrong_results(source, tmp_path, name):
    old, new = SYNC_BUGS[name]
    run = build(tmp_path, source.replace(old, new))
    results = [run(seed) for seed in (1, 2, 3)]
    assert all(r.returncode for r in results), [r.stdout + r.stderr for r in results]


def test_address_sanitizer_names_the_line(source, tmp_path):
    probe = subprocess.run(
        ["g++", "-fsanitize=address", "-x", "c++", "-", "-o", str(tmp_path / "probe")],
        input="int main(){}",
        text=True,
        capture_output=True,
    )
    if probe.returncode:
        pytest.skip("this g++ has no AddressSanitizer")
    run = build(tmp_path, source, "-fsanitize=address,undefined")
    assert run(1).returncode == 0
    run = build(
        tmp_path,
        source.replace("row < M && col < N", "row <= M && col < N"),
        "-fsanitize=address,undefined",
    )
    result = run(1)
    assert result.returncode
    assert "heap-buffer-overflow" in result.stderr
    assert "kernel.cu:" in result.stderr
