"""How is the compiled core built? With ninja, from csrc/, without torch; or not at all, saying why.

Two extensions: ``_cpu``, by a C++ compiler, and ``_cuda``, by nvcc as well. Everything else about
the distribution stands in pyproject.toml. Environment:

    CONVMIXER_FAST_CPU, CONVMIXER_FAST_CUDA
        0: leave that extension out; 1: fail where it cannot be built
        (unset: install without it and record the reason)
    CONVMIXER_FAST_WERROR       1: -Wall -Wextra -Werror
    CONVMIXER_FAST_CUTLASS      the include folder of CUTLASS 3.x, for the Hopper kernels
                                (unset: that of an installed nvidia-cutlass, if any)
    CONVMIXER_FAST_BUILD_CACHE  a folder that keeps the objects of CUDA sources between builds
    TORCH_CUDA_ARCH_LIST        what to compile CUDA kernels for, in torch's words: "8.0;8.6+PTX"
    CUDA_HOME                   where nvcc is, if not on PATH
    CXX, CXXFLAGS, LDFLAGS, NVCC_APPEND_FLAGS, MAX_JOBS as usual

The outcome is printed and kept in convmixer_fast/_build_info.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "convmixer_fast"
EXTENSION = f"{PACKAGE}._cpu"

#: Compiled once.
SOURCES = (
    "csrc/bindings.cpp",
    "csrc/cpu/depthwise/depthwise.cpp",
    "csrc/cpu/engine/fingerprint.cpp",
    "csrc/cpu/engine/isa.cpp",
    "csrc/cpu/engine/stack.cpp",
    "csrc/cpu/engine/threads.cpp",
    "csrc/cpu/epilogue/pass.cpp",
    "csrc/cpu/gemm/pointwise.cpp",
    "csrc/cpu/peak/peak.cpp",
    "csrc/steady.cpp",
)
#: Compiled once for each instruction set: the files of csrc/cpu that are named for a dtype.
KERNELS = (
    "csrc/cpu/depthwise/f32.cpp",
    "csrc/cpu/epilogue/f32.cpp",
    "csrc/cpu/gemm/f32.cpp",
    "csrc/cpu/peak/f32.cpp",
)

#: Floats in a vector, and the compiler's flags, of each instruction set beyond the baseline.
X86_64 = {
    "avx2": (8, "-mavx2 -mfma"),
    "avx512": (16, "-mavx2 -mfma -mavx512f -mavx512vl -mavx512dq -mavx512bw"),
}
BASELINE_LANES = 4

# -ffp-contract=fast: a * b + c is one multiply-add wherever the machine has it; the kernels count
# on it. Nothing of -ffast-math: NaN and infinity must come out as PyTorch gives them.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -pthread"

PROBE = """
#include <Python.h>
#include <thread>
typedef float Vector __attribute__((vector_size(16)));
extern "C" int probe(Vector* v) {
  *v = *v < 0.0f ? *v * *v : *v;
  std::thread([] {}).join();
  return PY_MAJOR_VERSION;
}
"""


NO_COMPILER = "no C++ compiler: no c++, g++ or clang++ on PATH; install one or set CXX"

CUDA_EXTENSION = f"{PACKAGE}._cuda"
CUDA_BINDINGS = "csrc/bindings_cuda.cpp"
#: Compiled for every architecture asked for.
CUDA_KERNELS = "csrc/cuda/pointwise_mma.cu"
#: Compiled for sm_90a alone, where CUTLASS is found: its instructions exist nowhere else.
CUTLASS_KERNELS = "csrc/cuda/pointwise_wgmma.cu"
CUTLASS_ARCHITECTURE = "90a"

#: What TORCH_CUDA_ARCH_LIST is where it is not set: each architecture of data centres and desktops
#: since bfloat16, and code that later ones can translate.
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0;9.0a;12.0+PTX"
#: torch's names for several.
NAMED_ARCHITECTURES = {
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
#: The kernels' instructions begin there.
FIRST_ARCHITECTURE = 80

NVCC_FLAGS = "-std=c++17 -O3 -DNDEBUG -cudart static -Xcompiler=-fPIC,-fvisibility=hidden"
#: What ptxas calls information is a kernel that waits after every tensor-core instruction.
SERIALISED = re.compile(r"\(C75\d\d\)")


@dataclass
class Plan:
    """What can be built here, and why the rest cannot."""

    reason: str = ""  # why there is no extension; empty when there is one
    compiler: list[str] = field(default_factory=list)
    compiler_version: str = ""
    ninja: str = ""
    isas: dict[str, tuple[int, str]] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)


@dataclass
class CudaPlan:
    """What nvcc can build here, and why the rest cannot be built."""

    reason: str = ""  # why there is no extension; empty when there is one
    tools: Plan = field(default_factory=Plan)
    nvcc: list[str] = field(default_factory=list)
    nvcc_version: str = ""
    #: "80" and so on: for which to compile machine code, and for which PTX.
    architectures: list[str] = field(default_factory=list)
    ptx: list[str] = field(default_factory=list)
    cutlass: str = ""  # the include folder
    omitted: dict[str, str] = field(default_factory=dict)

    def built_for(self) -> list[str]:
        return [*(f"sm_{a}" for a in self.architectures), *(f"compute_{a}" for a in self.ptx)]


def last_lines(text: str, pattern: str = "error") -> str:
    """The line of a compiler's output that says what is wrong, else its last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if re.search(pattern, line, re.IGNORECASE)]
    return (told or lines or ["no message"])[0 if told else -1]


def attempt(command: list[str], cwd: str | None = None) -> str:
    """Run a command; the reason why it failed, empty when it did not."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        return last_lines(done.stdout + done.stderr) + f" (exit status {done.returncode})"
    return ""


def link_flags() -> list[str]:
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup"]
    return ["-shared", "-pthread", "-ldl"]


def include_flags() -> list[str]:
    import pybind11

    paths = dict.fromkeys([sysconfig.get_path("include"), sysconfig.get_path("platinclude")])
    return [*(f"-I{p}" for p in paths), f"-I{pybind11.get_include()}"]


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja") or ""
    return shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja") or ""


def compilers() -> list[list[str]]:
    """The commands of the C++ compilers to try, in that order."""
    if os.environ.get("CXX"):
        return [shlex.split(os.environ["CXX"])]
    return [[name] for name in ("c++", "g++", "clang++") if shutil.which(name)]


def find_compiler(folder: str) -> tuple[list[str], str]:
    """A C++ compiler that makes an extension module, as a command; or why there is none."""
    source = Path(folder, "probe.cpp")
    source.write_text(PROBE)
    candidates = compilers()
    if not candidates:
        return [], NO_COMPILER
    reasons = []
    for command in candidates:
        flags = [*FLAGS.split(), *include_flags(), str(source), *link_flags()]
        reason = attempt([*command, *flags, "-o", str(Path(folder, "probe.so"))])
        if not reason:
            return command, ""
        reasons.append(f"{shlex.join(command)} cannot build an extension module: {reason}")
    return [], "; ".join(reasons)


def switch(name: str) -> bool | None:
    """A variable that is on, off or absent (None), as convmixer_fast/environment.py reads it."""
    value = os.environ.get(name, "").strip().lower()
    allowed = {"": None, "1": True, "true": True, "yes": True, "on": True}
    allowed |= {"0": False, "false": False, "no": False, "off": False}
    if value not in allowed:
        raise SystemExit(
            f"{name}: unknown switch {value}; use one of {', '.join(filter(None, allowed))}"
        )
    return allowed[value]


@cache
def plan() -> Plan:
    """Ask the machine once, before anything is built."""
    if switch("CONVMIXER_FAST_CPU") is False:
        return Plan(reason="left out: CONVMIXER_FAST_CPU=0")
    found = tools()
    return found if found.reason else plan_for(found.compiler, found.ninja)


@cache
def tools() -> Plan:
    """The compiler and ninja, which both extensions need, or why there is one too few."""
    if sys.platform == "win32":
        return Plan(reason="MSVC lacks GNU vector extensions: it needs Linux or macOS")
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return Plan(reason="pybind11 is missing from the build environment: pip install pybind11")
    ninja = find_ninja()
    if not ninja:
        return Plan(reason="ninja is missing from the build environment: pip install ninja")
    with tempfile.TemporaryDirectory() as folder:
        compiler, reason = find_compiler(folder)
    return Plan(reason=reason, compiler=compiler, ninja=ninja)


def version_line(compiler: list[str], number: int = 0) -> str:
    """One line of what a compiler says about its version."""
    told = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    return (told.splitlines() or ["unknown"])[number]


def plan_for(compiler: list[str], ninja: str) -> Plan:
    """What that compiler makes of the sources: the instruction sets it takes, and refuses."""
    result = Plan(
        compiler=compiler,
        compiler_version=version_line(compiler),
        ninja=ninja,
        isas={"baseline": (BASELINE_LANES, "")},
    )
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "isa.cpp")
        empty.write_text("#ifndef __x86_64__\n#error not x86-64\n#endif\nint isa;\n")
        objects = ["-c", str(empty), "-o", str(Path(folder, "isa.o"))]
        is_x86_64 = not attempt([*compiler, *objects])
        for name, (lanes, flags) in X86_64.items():
            if not is_x86_64:
                result.omitted[name] = f"the target is {platform.machine()}, not x86-64"
                continue
            refused = attempt([*compiler, *flags.split(), *objects])
            if refused:
                result.omitted[name] = f"the compiler refuses {flags}: {refused}"
            else:
                result.isas[name] = (lanes, flags)
    return result


@cache
def cuda_plan() -> CudaPlan:
    """The same for nvcc."""
    if switch("CONVMIXER_FAST_CUDA") is False:
        return CudaPlan(reason="left out: CONVMIXER_FAST_CUDA=0")
    if not sys.platform.startswith("linux"):
        return CudaPlan(reason="it needs Linux")
    nvcc = find_nvcc()
    if not nvcc:
        return CudaPlan(
            reason="no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda: "
            "install the CUDA toolkit, or set CUDA_HOME"
        )
    found = tools()
    if found.reason:
        return CudaPlan(reason=found.reason)
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = {line.strip().removeprefix("compute_") for line in listing.stdout.splitlines()}
    if listing.returncode or not known:
        return CudaPlan(reason=f"{nvcc} does not run: {last_lines(listing.stderr)}")
    result = CudaPlan(tools=found, nvcc=[nvcc], nvcc_version=nvcc_version(nvcc))
    if os.environ.get("CXX"):
        # Else nvcc's own choice, which NVCC_CCBIN moves.
        result.nvcc += ["-ccbin", found.compiler[0]]
    try:
        asked = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES)
    except ValueError as error:
        return CudaPlan(reason=f"TORCH_CUDA_ARCH_LIST: {error}")
    choose_architectures(result, asked, known)
    if not result.architectures and not result.ptx:
        why = "; ".join(f"{name}: {why}" for name, why in result.omitted.items())
        return CudaPlan(reason=f"nothing to compile for: {why}", omitted=result.omitted)
    return result


def find_nvcc() -> str:
    """nvcc of CUDA_HOME, else the one on PATH, else the toolkit's usual place; "" for none."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return shutil.which("nvcc", path=Path(os.environ[name], "bin")) or ""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin") or ""


def nvcc_version(nvcc: str) -> str:
    """As in "nvcc 13.0.88"."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\bV(\d+(\.\d+)+)", told)
    return f"nvcc {found[1] if found else 'of an unknown version'}"


def architectures(text: str) -> list[tuple[str, bool]]:
    """A list in torch's words as ("80", whether PTX is wanted too).

    Raises:
        ValueError: an entry is no architecture.
    """
    for name, numbers in NAMED_ARCHITECTURES.items():
        text = text.replace(name, numbers)
    found: dict[str, bool] = {}
    for entry in re.split(r"[;,\s]+", text.strip()):
        parts = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if parts is None:
            names = ", ".join(NAMED_ARCHITECTURES)
            raise ValueError(
                f"{entry!r} is none: architectures are as 8.0, 9.0a, 12.0+PTX, {names}"
            )
        number = parts[1] + parts[2]
        found[number] = found.get(number, False) or parts[3] is not None
    return list(found.items())


def choose_architectures(p: CudaPlan, asked: list[tuple[str, bool]], known: set[str]) -> None:
    """Fill in for what to compile, and why not for the rest."""
    for number, ptx in asked:
        plain = number.rstrip("af")
        name = f"sm_{number}"
        if int(plain) < FIRST_ARCHITECTURE:
            p.omitted[name] = f"the kernels begin at sm_{FIRST_ARCHITECTURE}"
        elif plain not in known:
            p.omitted[name] = f"{p.nvcc_version} does not know it"
        else:
            # What only sm_90a has is CUTLASS's; the other kernels are the same on it.
            if plain not in p.architectures:
                p.architectures.append(plain)
            if ptx and plain not in p.ptx:
                p.ptx.append(plain)
            if number == CUTLASS_ARCHITECTURE:
                p.cutlass, why = find_cutlass()
                if why:
                    p.omitted["wgmma"] = why
    if CUTLASS_ARCHITECTURE not in dict(asked):
        p.omitted["wgmma"] = "9.0a is not in TORCH_CUDA_ARCH_LIST"


def find_cutlass() -> tuple[str, str]:
    """CUTLASS's include folder, or why there is none."""
    named = os.environ.get("CONVMIXER_FAST_CUTLASS")
    if named:
        if Path(named, "cutlass", "cutlass.h").is_file():
            return str(Path(named).resolve()), ""
        return "", f"CONVMIXER_FAST_CUTLASS={named} has no cutlass/cutlass.h"
    spec = find_spec("cutlass_library")
    for place in [] if spec is None else spec.submodule_search_locations or []:
        include = Path(place, "source", "include")
        if Path(include, "cutlass", "cutlass.h").is_file():
            return str(include), ""
    return "", "no CUTLASS: pip install --no-deps nvidia-cutlass, or set CONVMIXER_FAST_CUTLASS"


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=True)


def build_config(p: Plan, version: str) -> str:
    """The generated header: what the compiled module knows about its own build."""
    each = " ".join(
        f"CONVMIXER_FAST_ISA_FLAGS({quoted(name)}, {quoted(flags)})"
        for name, (_, flags) in p.isas.items()
    )
    lines = [
        "#pragma once",
        f"#define CONVMIXER_FAST_VERSION {quoted(version)}",
        f"#define CONVMIXER_FAST_COMPILER {quoted(p.compiler_version)}",
        f"#define CONVMIXER_FAST_FLAGS {quoted(all_flags())}",
        f"#define CONVMIXER_FAST_FOR_EACH_ISA {each}",
        *(f"#define CONVMIXER_FAST_HAVE_{name.upper()} 1" for name in p.isas),
    ]
    return "\n".join(lines) + "\n"


def all_flags() -> str:
    strict = "-Wall -Wextra -Werror" if switch("CONVMIXER_FAST_WERROR") else ""
    return " ".join(f"{FLAGS} {strict} {os.environ.get('CXXFLAGS', '')}".split())


def ninja_path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build_ninja(
    p: Plan, folder: Path, output: str, sources: Sequence[str], flags: str, link: Sequence[str]
) -> str:
    """build.ninja: every source once, every kernel once for each instruction set, one link."""
    escape = lambda text: text.replace("$", "$$")  # noqa: E731
    includes = shlex.join([f"-I{ROOT / 'csrc'}", f"-I{folder}"])
    libraries = shlex.join([*link, *shlex.split(os.environ.get("LDFLAGS", ""))])
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {escape(shlex.join(p.compiler))}",
        f"flags = {escape(flags)} {escape(includes)}",
        f"libraries = {escape(libraries)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $cxx $in -o $out $libraries",
        "  description = link $out",
    ]
    objects = []
    for source in sources:
        objects.append(Path(source).stem + ".o")
        lines.append(f"build {objects[-1]}: compile {ninja_path(ROOT / source)}")
    for name, (lanes, isa_flags) in p.isas.items():
        for source in KERNELS:
            objects.append(f"{Path(source).parent.name}_{Path(source).stem}.{name}.o")
            lines.append(f"build {objects[-1]}: compile {ninja_path(ROOT / source)}")
            defines = f"-DCONVMIXER_FAST_ISA={name} -DCONVMIXER_FAST_LANES={lanes}"
            lines.append(f"  isa = {defines} {isa_flags}")
    lines.append(f"build {ninja_path(output)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def run_ninja(
    p: Plan,
    folder: Path,
    output: str,
    version: str,
    sources: Sequence[str],
    flags: str,
    link: Sequence[str],
) -> Path:
    """Link the sources and all kernels into `folder`/`output`, doing again only what has changed.

    Raises:
        RuntimeError: the compiler failed; the message is the first error it named.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_if_changed(folder / "build_config.h", build_config(p, version))
    call_ninja(p.ninja, folder, build_ninja(p, folder, output, sources, flags, link))
    return folder / output


def call_ninja(ninja: str, folder: Path, text: str) -> str:
    """Do what ``text``, a build.ninja, says; what was printed meanwhile.

    Raises:
        RuntimeError: a command failed; the message is the first error it named.
    """
    write_if_changed(folder / "build.ninja", text)
    jobs = os.environ.get("MAX_JOBS")
    command = [ninja, *(["-j", jobs] if jobs else [])]
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout, end="")
    if done.returncode:
        raise RuntimeError("compilation failed: " + last_lines(done.stdout, r"(error|fatal)\s*:"))
    return done.stdout


def compile_extension(p: Plan, folder: Path, version: str) -> Path:
    """The extension module, built in `folder`. Raises RuntimeError as run_ninja does."""
    output = "_cpu" + sysconfig.get_config_var("EXT_SUFFIX")
    flags = f"{all_flags()} {shlex.join(include_flags())}"
    return run_ninja(p, folder, output, version, SOURCES, flags, link_flags())


def cuda_config(p: CudaPlan, version: str) -> str:
    """The generated header of the CUDA extension."""
    lines = [
        "#pragma once",
        f"#define CONVMIXER_FAST_VERSION {quoted(version)}",
        f"#define CONVMIXER_FAST_NVCC {quoted(p.nvcc_version)}",
        f"#define CONVMIXER_FAST_ARCHITECTURES {quoted(' '.join(p.built_for()))}",
        *(["#define CONVMIXER_FAST_HAVE_WGMMA 1"] if p.cutlass else []),
    ]
    return "\n".join(lines) + "\n"


def nvcc_flags() -> str:
    strict = switch("CONVMIXER_FAST_WERROR")
    return NVCC_FLAGS + (" -Werror all-warnings -Xcompiler=-Wall,-Wextra" if strict else "")


def gencode(p: CudaPlan) -> list[str]:
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in p.architectures]
    return flags + [f"-gencode=arch=compute_{a},code=compute_{a}" for a in p.ptx]


def cuda_sources(p: CudaPlan) -> dict[str, list[str]]:
    """Every source for nvcc with the flags of its own."""
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    found = {CUDA_KERNELS: [*gencode(p), "--threads", jobs]}
    if p.cutlass:
        one = f"-gencode=arch=compute_{CUTLASS_ARCHITECTURE},code=sm_{CUTLASS_ARCHITECTURE}"
        # -isystem: warnings about CUTLASS's headers are not ours to mend.
        found[CUTLASS_KERNELS] = [one, "--expt-relaxed-constexpr", "-isystem", p.cutlass]
    return found


def kept_object(p: CudaPlan, source: str, flags: str) -> Path | None:
    """Where CONVMIXER_FAST_BUILD_CACHE keeps the object of a CUDA source; None without one.

    The name is a hash of all that the object depends on, so that one which is there is right.
    """
    folder = os.environ.get("CONVMIXER_FAST_BUILD_CACHE")
    if not folder:
        return None
    told = [p.nvcc_version, version_line(p.tools.compiler), os.environ.get("NVCC_APPEND_FLAGS", "")]
    digest = hashlib.sha256(json.dumps([*told, re.sub(r" --threads \S+", "", flags)]).encode())
    headers = [ROOT / "csrc/common/activation.h", *(ROOT / "csrc/cuda").glob("*.*h")]
    if source == CUTLASS_KERNELS:
        # The other kernels see nothing of it: with and without CUTLASS they are the same object.
        headers.append(Path(p.cutlass, "cutlass", "version.h"))
    for path in [ROOT / source, *sorted(headers)]:
        digest.update(path.read_bytes())
    return Path(folder).resolve() / f"{Path(source).stem}-{digest.hexdigest()[:24]}.o"


def cuda_ninja(p: CudaPlan, output: str) -> str:
    """build.ninja of the CUDA extension: nvcc's objects, the binding, one link."""
    escape = lambda text: text.replace("$", "$$")  # noqa: E731
    binding = f"{all_flags()} {shlex.join(include_flags())} -I."
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {escape(shlex.join(p.tools.compiler))}",
        f"nvcc = {escape(shlex.join(p.nvcc))}",
        "rule compile",
        f"  command = $cxx -MMD -MF $out.d {escape(binding)} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        # nvcc works on several architectures at a time: it has the machine for itself.
        "pool nvcc",
        "  depth = 1",
        "rule nvcc",
        "  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  pool = nvcc",
        "  description = nvcc $out",
        "rule link",
        # The CUDA runtime in it is a private copy: torch has one of its own.
        "  command = $nvcc -shared -cudart static -Xlinker=--exclude-libs=ALL,-s $in -o $out",
        "  description = link $out",
        f"build bindings_cuda.o: compile {ninja_path(ROOT / CUDA_BINDINGS)}",
    ]
    objects = ["bindings_cuda.o"]
    for source, own in cuda_sources(p).items():
        flags = f"{nvcc_flags()} {shlex.join(own)}"
        kept = kept_object(p, source, flags)
        objects.append(Path(source).stem + ".o" if kept is None else ninja_path(kept))
        if kept is None or not kept.is_file():
            lines.append(f"build {objects[-1]}: nvcc {ninja_path(ROOT / source)}")
            lines.append(f"  flags = {escape(flags)}")
    lines.append(f"build {ninja_path(output)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def compile_cuda(p: CudaPlan, folder: Path, version: str) -> Path:
    """The CUDA extension module, built in `folder`.

    Raises:
        RuntimeError: a compiler failed, or ptxas made a kernel that waits where it must not.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_if_changed(folder / "build_config.h", cuda_config(p, version))
    output = "_cuda" + sysconfig.get_config_var("EXT_SUFFIX")
    text = cuda_ninja(p, output)
    told = call_ninja(p.tools.ninja, folder, text)
    if SERIALISED.search(told):
        # The next build is to say so again.
        for line in re.findall(r"^build (.+): nvcc ", text, re.MULTILINE):
            (folder / line).unlink(missing_ok=True)
        raise RuntimeError("ptxas: " + last_lines(told, SERIALISED.pattern))
    return folder / output


def install_file(source: Path, target: Path) -> None:
    """Put a copy at `target` in one step: a process that has the old file mapped keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as scratch:
        scratch.write(source.read_bytes())
    os.chmod(scratch.name, 0o755)
    os.replace(scratch.name, target)


def record(version: str, folder: Path) -> None:
    """Print what became of both extensions and write it to `folder`/_build_info.json.

    Raises:
        SystemExit: one that its variable demands was not built.
    """
    p, cuda = plan(), cuda_plan()
    info: dict[str, Any] = {
        "version": version,
        "built": not p.reason,
        "reason": p.reason,
        "python": platform.python_version(),
        "platform": sysconfig.get_platform(),
    }
    if not p.reason:
        info["compiler"] = p.compiler_version
        info["flags"] = all_flags()
        info["isas"] = {name: {"lanes": n, "flags": flags} for name, (n, flags) in p.isas.items()}
        info["omitted"] = p.omitted
    info["cuda"] = {"built": not cuda.reason, "reason": cuda.reason, "omitted": cuda.omitted}
    if not cuda.reason:
        info["cuda"] |= {
            "compiler": cuda.nvcc_version,
            "flags": nvcc_flags(),
            "architectures": cuda.built_for(),
            "kernels": ["mma.sync", *(["wgmma"] if cuda.cutlass else [])],
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    tell("CPU", p.reason, f"{', '.join(p.isas)} by {p.compiler_version}", p.omitted)
    tell("CUDA", cuda.reason, f"{', '.join(cuda.built_for())} by {cuda.nvcc_version}", cuda.omitted)
    for kind, reason in (("CPU", p.reason), ("CUDA", cuda.reason)):
        demanded = f"CONVMIXER_FAST_{kind}"
        if reason and switch(demanded):
            raise SystemExit(f"{demanded}=1, but the extension was not built: {reason}")


def tell(kind: str, reason: str, built: str, omitted: dict[str, str]) -> None:
    """The lines about one extension that end a build."""
    if reason:
        print(f"{PACKAGE}: {kind} extension NOT built: {reason}")
        return
    print(f"{PACKAGE}: {kind} extension built for {built}")
    for name, why in omitted.items():
        print(f"{PACKAGE}: without {name}: {why}")


class BuildExtension(build_ext):
    """Ninja in the place of setuptools' compiler driver."""

    def run(self) -> None:
        version = self.distribution.get_version()
        in_place = self.inplace or self.editable_mode
        # In place, a lasting folder: setuptools' own is thrown away after an editable install.
        folder = in_place_folder() if in_place else Path(self.build_temp)
        builds = {
            EXTENSION: (plan(), lambda p: compile_extension(p, folder, version)),
            CUDA_EXTENSION: (cuda_plan(), lambda p: compile_cuda(p, folder / "cuda", version)),
        }
        built = []
        for name, (p, build) in builds.items():
            target = in_place_module(name) if in_place else Path(self.get_ext_fullpath(name))
            try:
                if not p.reason:
                    install_file(build(p), target)
            except RuntimeError as error:
                p.reason = str(error)
            if p.reason:
                target.unlink(missing_ok=True)
            else:
                built.append(name)
        # What a wheel is said to hold.
        self.extensions = [e for e in self.extensions if e.name in built]
        record(version, target.parent)


def in_place_folder() -> Path:
    return ROOT / "build" / f"in-place-{sys.implementation.cache_tag}"


def in_place_module(name: str) -> Path:
    return ROOT / (name.replace(".", "/") + sysconfig.get_config_var("EXT_SUFFIX"))


class BuildPython(build_py):
    """Where there is no extension to build, the reasons are recorded with the Python files."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            if self.editable_mode:
                for name in (EXTENSION, CUDA_EXTENSION):
                    in_place_module(name).unlink(missing_ok=True)
            folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE)
            record(self.distribution.get_version(), folder)


def extensions() -> list[Extension]:
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*h"))
    found = []
    if not plan().reason:
        found.append(Extension(EXTENSION, [*SOURCES, *KERNELS], depends=headers))
    if not cuda_plan().reason:
        sources = [CUDA_BINDINGS, *cuda_sources(cuda_plan())]
        found.append(Extension(CUDA_EXTENSION, sources, depends=headers))
    return found


# Build frontends run this file as __main__; tests/native/run.py imports it.
if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    )
