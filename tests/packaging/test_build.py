"""Installs with a compiler and without one, and the source archive.

Nothing is downloaded: builds run in a copy of the project, in this environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from setup_file import setup_file

pytest.importorskip("ninja")
pytest.importorskip("pybind11")
pytest.importorskip("setuptools", minversion="77")

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(sys.platform == "win32", reason="the extension is not built on Windows"),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake"),
]

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build_info.json", "tests"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not run from a source tree")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("build") / "project", ignore=SKIPPED))


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CONVMIXER_FAST_")}
    for name in (
        *("CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS", "PYTHONPATH"),
        *("CUDA_HOME", "CUDA_PATH", "NVCC_APPEND_FLAGS", "TORCH_CUDA_ARCH_LIST"),
        "CUDA_VISIBLE_DEVICES",
    ):
        clean.pop(name, None)
    # Only the tests of the CUDA extension want it, with an nvcc of their own.
    clean["CONVMIXER_FAST_CUDA"] = "0"
    return subprocess.run(
        command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=540
    )


def build_wheel(project: Path, out: Path, **environment: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check"]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-w", str(out), str(project)]
    done = run(*pip, *options, cwd=project, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def contents(wheel: Path) -> tuple[list[str], dict]:
    """The names of a wheel's files, and what the build put on record."""
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read("convmixer_fast/_build_info.json"))
        return archive.namelist(), record


def reason_told_by(wheel: Path, folder: Path) -> str:
    """What the unpacked wheel says about its engine."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    # An editable install in this environment would lend its own extension to the package.
    script = (
        "import sys; "
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in f.__module__]; "
        "from convmixer_fast.backends.cpu import native; "
        "print(native.why_unavailable(), native.__file__)"
    )
    done = run(sys.executable, "-c", script, cwd=folder, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout
    return done.stdout


def assert_pure(wheel: Path, folder: Path, reason: str) -> None:
    names, record = contents(wheel)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")]
    assert record["built"] is False
    assert reason in record["reason"]
    assert reason in reason_told_by(wheel, folder)


def test_without_a_compiler_the_wheel_is_pure_and_says_why(project: Path, tmp_path: Path) -> None:
    wheel = build_wheel(project, tmp_path / "dist", CXX="/bin/false")
    reason = 'The C++ compiler "/bin/false" is not able to compile a simple test program'
    assert_pure(wheel, tmp_path / "installed", reason)


def test_with_nothing_on_path_the_wheel_is_pure_and_says_why(project: Path, tmp_path: Path) -> None:
    pytest.importorskip("cmake")
    (tmp_path / "empty").mkdir()
    environment = {"PATH": str(tmp_path / "empty"), "CUDA_HOME": str(tmp_path / "empty")}
    wheel = build_wheel(project, tmp_path / "dist", CONVMIXER_FAST_CUDA="", **environment)
    assert_pure(wheel, tmp_path / "installed", "no C++ compiler")
    assert contents(wheel)[1]["cuda"]["reason"].startswith("no nvcc in CUDA_HOME, on PATH or in")


def test_extension_can_be_left_out(project: Path, tmp_path: Path) -> None:
    left_out = {"CONVMIXER_FAST_CPU": "0", "CONVMIXER_FAST_CUDA": "0"}
    wheel = build_wheel(project, tmp_path / "dist", **left_out)
    assert_pure(wheel, tmp_path / "installed", "CONVMIXER_FAST_CPU=0")
    assert contents(wheel)[1]["cuda"]["reason"] == "left out: CONVMIXER_FAST_CUDA=0"


def test_extension_can_be_demanded(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    done = run(*command, cwd=project, CXX="/bin/false", CONVMIXER_FAST_CPU="1")
    assert done.returncode != 0
    assert "CONVMIXER_FAST_CPU=1, but the extension was not built: The C++ compiler" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_failed_compilation_is_recorded(project: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(project, tmp_path / "broken", ignore=SKIPPED))
    with open(broken / "csrc" / "cpu" / "engine" / "threads.cpp", "a") as source:
        source.write("\n#error the moon is in the wrong house\n")
    # The kernels take long and are not what fails.
    opening = "namespace convmixer_fast::CONVMIXER_FAST_ISA {"
    for source in broken.rglob("csrc/cpu/**/*.cpp"):
        if opening in source.read_text():
            source.write_text(opening + "}\n")
    wheel = build_wheel(broken, tmp_path / "dist")
    names, record = contents(wheel)
    assert not [name for name in names if name.endswith(".so")]
    assert record["built"] is False
    assert "the moon is in the wrong house" in record["reason"]
    assert "the moon is in the wrong house" in reason_told_by(wheel, tmp_path / "installed")


class Compiler:
    """The machine's C++ compiler behind a script that logs its calls and refuses AVX-512."""

    def __init__(self, folder: Path) -> None:
        real = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if real is None:
            pytest.skip("no C++ compiler")
        self.log = folder / "calls.log"
        self.path = folder / "compiler"
        self.path.write_text(
            "#!/bin/sh\n"
            f'echo "$*" >> "{self.log}"\n'
            'case "$*" in *-mavx512f*) echo "error: no AVX-512 in this house" >&2; exit 1;; esac\n'
            f'exec "{real}" "$@"\n'
        )
        self.path.chmod(0o755)

    def compiled(self) -> int:
        """How many sources of the core were compiled so far."""
        return sum("csrc/" in line and " -c " in line for line in self.log.read_text().splitlines())


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return Compiler(tmp_path_factory.mktemp("compiler"))


@pytest.fixture(scope="module")
def wheel(project: Path, compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # -O1 comes after the build's own -O3: a quick build serves here.
    environment = {"CXX": str(compiler.path), "CXXFLAGS": "-O1", "CONVMIXER_FAST_CPU": "1"}
    return build_wheel(project, tmp_path_factory.mktemp("dist"), **environment)


def test_with_a_compiler_the_wheel_holds_the_extension(wheel: Path, tmp_path: Path) -> None:
    names, record = contents(wheel)
    assert "none-any" not in wheel.name
    assert sum(name.startswith("convmixer_fast/_cpu.") for name in names) == 1
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks", "tools"))]
    assert {"convmixer_fast/py.typed", "convmixer_fast/backends/cpu/native.py"} <= set(names)
    assert record["built"] is True
    assert record["reason"] == ""
    assert record["compiler"]
    assert "baseline" in record["isas"]
    assert reason_told_by(wheel, tmp_path).startswith(" ")


def test_refused_instruction_set_is_left_out_and_named(wheel: Path) -> None:
    _, record = contents(wheel)
    assert "avx512" not in record["isas"]
    why = record["omitted"]["avx512"]
    assert "no AVX-512 in this house" in why or "not x86-64" in why


def test_second_build_compiles_nothing(
    project: Path, compiler: Compiler, wheel: Path, tmp_path: Path
) -> None:
    before = compiler.compiled()
    assert before > 5
    build_wheel(project, tmp_path, CXX=str(compiler.path), CXXFLAGS="-O1", CONVMIXER_FAST_CPU="1")
    assert compiler.compiled() == before


def test_kernel_objects_share_nothing_with_other_code(project: Path, wheel: Path) -> None:
    """A symbol that the linker may merge would let wide instructions into the other objects."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    objects = list(project.glob("build/**/kernels_*.dir/**/*.o"))
    assert len(objects) >= 2
    for path in objects:
        listing = run("nm", "--defined-only", "--extern-only", "-P", str(path), cwd=project).stdout
        symbols = [line.split()[0] for line in listing.splitlines()]
        (isa,) = (p[len("kernels_") : -len(".dir")] for p in path.parts if p.startswith("kernels_"))
        assert len(symbols) == 1, f"{path.name} exports {symbols}"
        assert isa in symbols[0]
        assert symbols[0].endswith("_kernelsE")


def test_source_archive_holds_what_the_build_needs(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    done = run(*command, cwd=project, CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {str(p.relative_to(project)) for p in (project / "csrc").rglob("*") if p.is_file()}
    assert len(needed) > 10
    assert needed | {"setup.py", "pyproject.toml", "convmixer_fast/backends/cpu/native.py"} <= names
    assert not [n for n in names if n.endswith(".so") or n.endswith("_build_info.json")]


NVCC = """#!{python}
# nvcc as the build uses it: says what it knows, and compiles stand-ins for the kernels.
import pathlib, subprocess, sys

given = sys.argv[1:]
with open({log!r}, "a") as log:
    print(*given, file=log)
if given == ["--version"]:
    print("Cuda compilation tools, release 13.0, V13.0.88")
elif given == ["--list-gpu-arch"]:
    print(*("compute_" + a for a in ("75", "80", "90", "120")), sep="\\n")
elif "-c" in given:
    source = pathlib.Path(given[given.index("-c") + 1])
    if "#error" in source.read_text():
        sys.exit(f"{{source}}(1): error: #error directive: the moon is in the wrong house")
    if "serialised" in source.read_text():
        print("ptxas info    : (C7510) Potential Performance Loss: wgmma instructions serialized")
    family = {{"pointwise_mma": "mma", "pointwise_wgmma": "wgmma"}}[source.stem]
    code = f\'\'\'
#include "{{source.parent}}/pointwise.h"
namespace convmixer_fast::cuda {{{{
static bool serves(int) {{{{ return true; }}}}
static std::string refusal(const Pointwise&, int) {{{{ return ""; }}}}
static std::string launch(const Pointwise&, int, void*) {{{{ return "no GPU in this house"; }}}}
const Family& {{family}}_family() {{{{
  static const Family f{{{{"{{family}}", serves, refusal, launch}}}};
  return f;
}}}}
}}}}\'\'\'
    output = given[given.index("-o") + 1]
    done = subprocess.run(
        ["{cxx}", "-std=c++17", "-fPIC", "-x", "c++", "-", "-c", "-o", output],
        input=code,
        text=True,
    )
    sys.exit(done.returncode)
else:
    own = ("-cudart", "static", "-Xlinker=--exclude-libs=ALL,-s")
    sys.exit(subprocess.run(["{cxx}", *(a for a in given if a not in own)]).returncode)
"""


class Nvcc:
    """A stand-in for nvcc in a CUDA_HOME of its own, and one for CUTLASS's headers."""

    def __init__(self, folder: Path) -> None:
        cxx = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if cxx is None:
            pytest.skip("no C++ compiler")
        self.log = folder / "nvcc.log"
        self.log.touch()
        self.home, self.cutlass = folder / "cuda", folder / "cutlass"
        program = self.home / "bin" / "nvcc"
        program.parent.mkdir(parents=True)
        program.write_text(NVCC.format(python=sys.executable, log=str(self.log), cxx=cxx))
        program.chmod(0o755)
        (self.cutlass / "cutlass").mkdir(parents=True)
        for name in ("cutlass.h", "version.h"):
            (self.cutlass / "cutlass" / name).touch()

    def environment(self, **more: str) -> dict[str, str]:
        # Without the CPU extension, which takes longer than all of this.
        return {
            "CUDA_HOME": str(self.home),
            "CONVMIXER_FAST_CUDA": "1",
            "CONVMIXER_FAST_CPU": "0",
            "CONVMIXER_FAST_CUTLASS": str(self.cutlass),
            "CXXFLAGS": "-O0",
        } | more

    def compiled(self) -> list[str]:
        """The command of every source for nvcc so far."""
        return [line for line in self.log.read_text().splitlines() if " -c " in line]


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory: pytest.TempPathFactory) -> Nvcc:
    if not sys.platform.startswith("linux"):
        pytest.skip("nvcc is looked for on Linux only")
    return Nvcc(tmp_path_factory.mktemp("nvcc"))


@pytest.fixture(scope="module")
def cuda_wheel(
    project: Path, nvcc: Nvcc, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """A wheel with the CUDA extension, and the variables it was built with."""
    environment = nvcc.environment(
        TORCH_CUDA_ARCH_LIST="7.5;8.0;9.0a 10.0,12.0+PTX",
        MAX_JOBS="3",
        CONVMIXER_FAST_BUILD_CACHE=str(tmp_path_factory.mktemp("cache")),
    )
    return build_wheel(project, tmp_path_factory.mktemp("dist"), **environment), environment


def test_with_nvcc_the_wheel_holds_the_cuda_extension(
    nvcc: Nvcc, cuda_wheel: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    wheel, _ = cuda_wheel
    names, record = contents(wheel)
    assert sum(name.startswith("convmixer_fast/_cuda.") for name in names) == 1
    assert not [name for name in names if name.startswith("convmixer_fast/_cpu.")]
    assert not record["built"]
    cuda = record["cuda"]
    assert (cuda["built"], cuda["reason"]) == (True, "")
    assert cuda["architectures"] == ["sm_80", "sm_90", "sm_120", "compute_120"]
    assert cuda["kernels"] == ["mma.sync", "wgmma"]
    assert cuda["omitted"] == {
        "sm_75": "the kernels begin at sm_80",
        "sm_100": "nvcc 13.0.88 does not know it",
    }
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # Without torch or a driver: the module alone.
    (module,) = tmp_path.glob("convmixer_fast/_cuda.*")
    script = (
        "import importlib.util as u; "
        f"s = u.spec_from_file_location('convmixer_fast._cuda', {str(module)!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        "print(m.families(), m.architectures(), m.compiler())"
    )
    done = run(sys.executable, "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = "['mma', 'wgmma'] sm_80 sm_90 sm_120 compute_120 nvcc 13.0.88"
    assert done.stdout.strip() == told


@pytest.mark.usefixtures("cuda_wheel")
def test_each_architecture_is_asked_of_nvcc(nvcc: Nvcc) -> None:
    mma, wgmma = sorted(nvcc.compiled()[:2], key=lambda line: "wgmma" in line)
    flags = [word for word in mma.split() if word.startswith("-gencode")]
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert "--threads 3" in mma
    assert "cutlass" not in mma
    assert [w for w in wgmma.split() if w.startswith("-gencode")] == [
        "-gencode=arch=compute_90a,code=sm_90a"
    ]
    assert f"-isystem {nvcc.cutlass}" in wgmma
    for line in (mma, wgmma):
        # Without -DNDEBUG CUTLASS's loop would wait after every instruction.
        assert "-DNDEBUG" in line
        assert "-cudart static" in line


def without_binding(project: Path, copy: Path) -> Path:
    """A copy of the project for tests that import nothing: the binding takes longest to compile."""
    shutil.copytree(project, copy, ignore=SKIPPED)
    (copy / "csrc" / "bindings" / "cuda.cpp").write_text("")
    return copy


def test_kept_objects_are_not_compiled_again_in_another_checkout(
    project: Path, nvcc: Nvcc, cuda_wheel: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    _, environment = cuda_wheel
    other = without_binding(project, tmp_path / "other")
    before = len(nvcc.compiled())
    _, record = contents(build_wheel(other, tmp_path / "first", **environment))
    assert record["cuda"]["built"]
    assert len(nvcc.compiled()) == before
    with open(other / "csrc" / "cuda" / "pointwise_wgmma.cu", "a") as source:
        source.write("// changed\n")
    build_wheel(other, tmp_path / "second", **environment)
    assert len(nvcc.compiled()) == before + 1
    assert "pointwise_wgmma.cu" in nvcc.compiled()[-1]
    # Another CUTLASS, and none: only the kernels that are made of it know.
    another = tmp_path / "cutlass"
    shutil.copytree(nvcc.cutlass, another)
    (another / "cutlass" / "version.h").write_text("// another\n")
    build_wheel(other, tmp_path / "third", **environment | {"CONVMIXER_FAST_CUTLASS": str(another)})
    assert len(nvcc.compiled()) == before + 2
    assert "pointwise_wgmma.cu" in nvcc.compiled()[-1]
    without = environment | {"CONVMIXER_FAST_CUTLASS": str(tmp_path / "nowhere")}
    _, record = contents(build_wheel(other, tmp_path / "fourth", **without))
    assert record["cuda"]["kernels"] == ["mma.sync"]
    assert len(nvcc.compiled()) == before + 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("#error", "the moon is in the wrong house"),
        ("// serialised", "(C7510) Potential Performance Loss"),
    ],
)
def test_a_cuda_source_that_nvcc_refuses_or_spoils_is_recorded(
    project: Path, nvcc: Nvcc, tmp_path: Path, line: str, reason: str
) -> None:
    broken = without_binding(project, tmp_path / "broken")
    with open(broken / "csrc" / "cuda" / "pointwise_mma.cu", "a") as source:
        source.write(f"\n{line}\n")
    environment = nvcc.environment(CONVMIXER_FAST_CUDA="")
    for _ in range(1 if line == "#error" else 2):  # what is spoilt is not kept
        wheel = build_wheel(broken, tmp_path / "dist", **environment)
        names, record = contents(wheel)
        wheel.unlink()
        assert not [name for name in names if name.endswith(".so")]
        assert record["cuda"]["built"] is False
        assert reason in record["cuda"]["reason"]


def test_a_cuda_extension_that_is_demanded_and_cannot_be_built_fails(
    project: Path, tmp_path: Path
) -> None:
    environment = {"CUDA_HOME": str(tmp_path), "CONVMIXER_FAST_CPU": "0"}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    done = run(*command, cwd=project, CONVMIXER_FAST_CUDA="1", **environment)
    assert done.returncode != 0
    assert "CONVMIXER_FAST_CUDA=1, but the extension was not built: no nvcc" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def cuda_info(nvcc: Nvcc, folder: Path, *options: str, **environment: str) -> dict:
    """What csrc finds for the CUDA extension with the stand-in of nvcc; nothing is compiled."""
    command = ["cmake", "-GNinja", "-S", str(ROOT / "csrc"), "-B", str(folder), "-DPART=_cuda"]
    given = nvcc.environment(CONVMIXER_FAST_CUTLASS="") | environment
    done = run(*command, *options, cwd=ROOT, **given)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "info.json").read_text())


def test_cutlass_is_looked_for_where_it_is_named(nvcc: Nvcc, tmp_path: Path) -> None:
    named = {"TORCH_CUDA_ARCH_LIST": "9.0a", "CONVMIXER_FAST_CUTLASS": str(tmp_path)}
    info = cuda_info(nvcc, tmp_path / "build", **named)
    assert info["omitted"] == {
        "wgmma": f"CONVMIXER_FAST_CUTLASS={tmp_path} has no cutlass/cutlass.h"
    }
    assert (info["architectures"], info["kernels"]) == (["sm_90"], ["mma.sync"])
    (tmp_path / "cutlass").mkdir()
    (tmp_path / "cutlass" / "cutlass.h").touch()
    info = cuda_info(nvcc, tmp_path / "build", **named)
    assert (info["omitted"], info["kernels"]) == ({}, ["mma.sync", "wgmma"])
    # As the package nvidia-cutlass lays its headers out.
    package = tmp_path / "cutlass_library"
    option = f"-DCUTLASS_PACKAGE={package}"
    info = cuda_info(nvcc, tmp_path / "build", option, TORCH_CUDA_ARCH_LIST="9.0a")
    assert info["omitted"]["wgmma"].startswith("no CUTLASS: pip install --no-deps nvidia-cutlass")
    (package / "source" / "include" / "cutlass").mkdir(parents=True)
    (package / "source" / "include" / "cutlass" / "cutlass.h").touch()
    info = cuda_info(nvcc, tmp_path / "build", option, TORCH_CUDA_ARCH_LIST="9.0a")
    assert (info["omitted"], info["kernels"]) == ({}, ["mma.sync", "wgmma"])
    info = cuda_info(nvcc, tmp_path / "build", option, TORCH_CUDA_ARCH_LIST="8.0")
    assert info["omitted"] == {"wgmma": "9.0a is not among the architectures: 8.0"}


def choose(asked: str, known: str, folder: Path) -> dict[str, str]:
    """What csrc/cuda/architectures.cmake makes of a list."""
    names = ("REAL", "VIRTUAL", "WGMMA", "OMITTED", "REASON")
    script = folder / "choose.cmake"
    script.write_text(
        f'include("{ROOT}/csrc/cuda/architectures.cmake")\n'
        f'choose_architectures("{asked}" "{known}" "nvcc 13.0.88")\n'
        + "".join(f'message("{name}=${{{name}}}")\n' for name in names)
    )
    done = subprocess.run(["cmake", "-P", script], capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("asked", "real", "ptx"),
    [
        ("8.0;8.6+PTX", "80;86", "86"),
        ("9.0a", "90", ""),
        ("Ampere", "80;86", "86"),
        ("Ada;Hopper 12.0", "89;90;120", "89;90"),
        (" 8.0 ; 8.0+PTX ", "80", "80"),
        ("Blackwell+Tegra", "110", ""),
        ("9.0,9.0a,12.1a+PTX", "90;121", "121"),
    ],
)
def test_lists_of_architectures_are_torchs(tmp_path: Path, asked: str, real: str, ptx: str) -> None:
    chosen = choose(asked, "80;86;89;90;110;120;121", tmp_path)
    assert (chosen["REAL"], chosen["VIRTUAL"], chosen["REASON"]) == (real, ptx, "")
    assert chosen["WGMMA"] == ("TRUE" if "9.0a" in asked else "FALSE")


@pytest.mark.parametrize("bad", ["80", "8.0+ptx", "Volta", "8", "sm_80"])
def test_what_is_no_architecture_is_an_error(tmp_path: Path, bad: str) -> None:
    reason = choose(f"8.0;{bad}", "80", tmp_path)["REASON"]
    assert reason.startswith(f"'{bad}' is none: architectures are as 8.0, 9.0a, 12.0+PTX, Ampere")


DEFAULT = ["sm_80", "sm_90", "sm_120", "compute_120"]  # of those that the stand-in knows


@pytest.mark.parametrize(
    ("capabilities", "built_for"),
    [
        ("12.0\n12.0\n", ["sm_120"]),
        ("9.0\n8.0\n", ["sm_90", "sm_80"]),
        ("12.1\n", DEFAULT),  # nvcc does not know it: it runs the default's PTX
        ("Failed to initialize NVML\n", DEFAULT),
    ],
)
def test_visible_gpus_are_built_for_where_no_list_is_given(
    nvcc: Nvcc, tmp_path: Path, capabilities: str, built_for: list[str]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{capabilities}'\necho $* >> {tmp_path}/asked\n")
    program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    info = cuda_info(nvcc, tmp_path / "build", PATH=path)
    assert info["architectures"] == built_for
    # Of 9.0 its own instructions too.
    wanted = "no CUTLASS" if "sm_90" in built_for else "9.0a is not among the architectures"
    assert info["omitted"]["wgmma"].startswith(wanted)
    # A list comes first, and hidden GPUs are none.
    info = cuda_info(nvcc, tmp_path / "build", PATH=path, TORCH_CUDA_ARCH_LIST="8.0+PTX")
    assert info["architectures"] == ["sm_80", "compute_80"]
    info = cuda_info(nvcc, tmp_path / "build", PATH=path, CUDA_VISIBLE_DEVICES="")
    assert info["architectures"] == DEFAULT
    assert len((tmp_path / "asked").read_text().splitlines()) == 1
    cuda_info(nvcc, tmp_path / "build", PATH=path, CUDA_VISIBLE_DEVICES="1,0")
    assert "--id=1,0" in (tmp_path / "asked").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("asked", "required"), [("9.0a", ["nvidia-cutlass"]), ("8.0", []), ("", [])]
)
def test_nvidia_cutlass_is_a_build_requirement_where_9_0a_is_built(
    project: Path, nvcc: Nvcc, asked: str, required: list[str]
) -> None:
    script = (
        "import sys; "
        "from setuptools import build_meta as b; print(b.get_requires_for_build_wheel())"
    )
    environment = nvcc.environment(TORCH_CUDA_ARCH_LIST=asked) | {"CONVMIXER_FAST_CUTLASS": ""}
    done = run(sys.executable, "-c", script, cwd=project, **environment)
    assert done.stdout.splitlines()[-1:] == [str(required)], done.stderr


@pytest.mark.parametrize("tool", ["cmake", "ninja"])
def test_without_a_build_tool_the_reason_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    for name in ("cmake", "ninja"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / ("ninja" if tool == "cmake" else "cmake")).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CONVMIXER_FAST_CPU", raising=False)
    reason = setup_file().Part("_cpu", "0").reason
    assert reason == f"{tool} is missing from the build environment: pip install {tool}"
