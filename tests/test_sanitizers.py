"""Is the C++ core clean under sanitizers, and right on instruction sets of other machines?

Minutes of compiling, so not part of a plain `pytest`: run it with `pytest -m sanitize`.
"""

from __future__ import annotations

import pytest

pytest.importorskip("setuptools", minversion="77")

from native import run as native

pytestmark = [pytest.mark.sanitize, pytest.mark.slow]


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_core_is_clean_under_sanitizer(mode: str) -> None:
    try:
        lines = native.run(mode, native.build(mode), scale=0.25)
    except native.Unavailable as why:
        pytest.skip(str(why))
    assert [line.split(":")[1] for line in lines] == [" kernels", " threads"]


def test_kernels_compile_for_avx2_and_avx512() -> None:
    try:
        compiler, _ = native.find_compiler("plain")
        folder = native.build("plain").parent
    except native.Unavailable as why:
        pytest.skip(str(why))
    refused = native.setup().plan_for(compiler, native.setup().find_ninja()).omitted
    if refused:
        pytest.skip("; ".join(f"{isa}: {why}" for isa, why in refused.items()))
    objects = {path.name for path in folder.glob("*_kernel.*.o")}
    kernels = [source.split("/")[-1].removesuffix(".cpp") for source in native.setup().KERNELS]
    isas = ("baseline", "avx2", "avx512")
    assert objects == {f"{kernel}.{isa}.o" for kernel in kernels for isa in isas}


def test_neon_kernels_compile_and_are_right() -> None:
    try:
        lines = native.run("aarch64", native.build("aarch64"), scale=0.05)
    except native.Unavailable as why:
        pytest.skip(str(why))
    assert "right on baseline," in lines[0]


def test_shapes_of_avx512_are_right_in_vectors_of_avx2() -> None:
    try:
        lines = native.run("wide", native.build("wide"), scale=0.25)
    except native.Unavailable as why:
        pytest.skip(str(why))
    if "avx2" not in lines[0]:
        pytest.skip("this machine has no AVX2")
    assert "right on baseline avx2," in lines[0]
