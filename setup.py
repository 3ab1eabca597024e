"""How is the compiled core built? With ninja, from csrc/, without torch; or not at all, saying why.

Everything else about the distribution stands in pyproject.toml. Environment:

    CONVMIXER_FAST_CPU     0: leave the CPU extension out; 1: fail where it cannot be built
                           (unset: install without it and record the reason)
    CONVMIXER_FAST_WERROR  1: -Wall -Wextra -Werror
    CXX, CXXFLAGS, LDFLAGS, MAX_JOBS as usual

The outcome is printed and kept in convmixer_fast/_build_info.json.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
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
    "csrc/cpu/channel_mix.cpp",
    "csrc/cpu/depthwise.cpp",
    "csrc/cpu/epilogue.cpp",
    "csrc/cpu/fingerprint.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/mixer.cpp",
    "csrc/cpu/peak.cpp",
    "csrc/cpu/threads.cpp",
)
#: Compiled once for each instruction set.
KERNELS = (
    "csrc/cpu/depthwise_kernel.cpp",
    "csrc/cpu/epilogue_kernel.cpp",
    "csrc/cpu/peak_kernel.cpp",
    "csrc/cpu/pointwise_kernel.cpp",
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


@dataclass
class Plan:
    """What can be built here, and why the rest cannot."""

    reason: str = ""  # why there is no extension; empty when there is one
    compiler: list[str] = field(default_factory=list)
    compiler_version: str = ""
    ninja: str = ""
    isas: dict[str, tuple[int, str]] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)


def last_lines(text: str, pattern: str = "error") -> str:
    """The line of a compiler's output that says what is wrong, else its last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if pattern in line.lower()]
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


@cache
def plan() -> Plan:
    """Ask the machine once, before anything is built."""
    if os.environ.get("CONVMIXER_FAST_CPU") == "0":
        return Plan(reason="left out: CONVMIXER_FAST_CPU=0")
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
    return Plan(reason=reason) if reason else plan_for(compiler, ninja)


def plan_for(compiler: list[str], ninja: str) -> Plan:
    """What that compiler makes of the sources: the instruction sets it takes, and refuses."""
    told = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    result = Plan(
        compiler=compiler,
        compiler_version=(told.splitlines() or ["unknown"])[0],
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
    strict = "-Wall -Wextra -Werror" if os.environ.get("CONVMIXER_FAST_WERROR") == "1" else ""
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
            objects.append(f"{Path(source).stem}.{name}.o")
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
    text = build_ninja(p, folder, output, sources, flags, link)
    write_if_changed(folder / "build.ninja", text)
    jobs = os.environ.get("MAX_JOBS")
    command = [p.ninja, *(["-j", jobs] if jobs else [])]
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout, end="")
    if done.returncode:
        raise RuntimeError("compilation failed: " + last_lines(done.stdout, "error:"))
    return folder / output


def compile_extension(p: Plan, folder: Path, version: str) -> Path:
    """The extension module, built in `folder`. Raises RuntimeError as run_ninja does."""
    output = "_cpu" + sysconfig.get_config_var("EXT_SUFFIX")
    flags = f"{all_flags()} {shlex.join(include_flags())}"
    return run_ninja(p, folder, output, version, SOURCES, flags, link_flags())


def install_file(source: Path, target: Path) -> None:
    """Put a copy at `target` in one step: a process that has the old file mapped keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as scratch:
        scratch.write(source.read_bytes())
    os.chmod(scratch.name, 0o755)
    os.replace(scratch.name, target)


def record(p: Plan, version: str, folder: Path) -> None:
    """Print the outcome and write it to `folder`/_build_info.json.

    Raises:
        SystemExit: there is no extension although CONVMIXER_FAST_CPU=1 demands it.
    """
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
    if p.reason:
        print(f"{PACKAGE}: CPU extension NOT built: {p.reason}")
        if os.environ.get("CONVMIXER_FAST_CPU") == "1":
            raise SystemExit(f"CONVMIXER_FAST_CPU=1, but the extension was not built: {p.reason}")
    else:
        print(f"{PACKAGE}: CPU extension built for {', '.join(p.isas)} by {p.compiler_version}")
        for name, why in p.omitted.items():
            print(f"{PACKAGE}: without {name}: {why}")


class BuildExtension(build_ext):
    """Ninja in the place of setuptools' compiler driver."""

    def run(self) -> None:
        p, version = plan(), self.distribution.get_version()
        in_place = self.inplace or self.editable_mode
        target = Path(self.get_ext_fullpath(EXTENSION)) if not in_place else in_place_module()
        # In place, a lasting folder: setuptools' own is thrown away after an editable install.
        folder = in_place_folder() if in_place else Path(self.build_temp)
        try:
            if not p.reason:
                install_file(compile_extension(p, folder, version), target)
        except RuntimeError as error:
            p.reason = str(error)
        if p.reason:
            self.extensions = []
            target.unlink(missing_ok=True)
        record(p, version, target.parent)


def in_place_folder() -> Path:
    return ROOT / "build" / f"in-place-{sys.implementation.cache_tag}"


def in_place_module() -> Path:
    return ROOT / PACKAGE / ("_cpu" + sysconfig.get_config_var("EXT_SUFFIX"))


class BuildPython(build_py):
    """Where there is no extension to build, the reason is recorded with the Python files."""

    def run(self) -> None:
        super().run()
        if plan().reason and not self.distribution.ext_modules:
            if self.editable_mode:
                in_place_module().unlink(missing_ok=True)
            folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE)
            record(plan(), self.distribution.get_version(), folder)


def extensions() -> list[Extension]:
    if plan().reason:
        return []
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
    return [Extension(EXTENSION, [*SOURCES, *KERNELS], depends=headers)]


# Build frontends run this file as __main__; tests/native/run.py imports it.
if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    )
