"""The CUDA extension without a GPU: it imports, says what is missing, checks its arguments."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import fresh_python
import pytest
import torch
from fakes.cuda import cuda_installed

from convmixer_fast import BackendError, available_backends
from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.backends.cuda import native as native_cuda
from convmixer_fast.backends.extensions import build_info
from convmixer_fast.backends.kernel_key import MANY_OUTPUTS
from convmixer_fast.diagnostics import doctor
from convmixer_fast.ops import pointwise_mix

ENGINE = native_cuda.load()
built = pytest.mark.skipif(ENGINE is None, reason=native_cuda.why_unavailable() or "built")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

ADDRESSES = ("a", "w", "bias", "scale", "shift", "d")
#: family, six addresses, m, n, k, a's stride, type, activation, capability.
GOOD = {
    "family": "mma.sync",
    **{f"{name}_ptr": 512 * i for i, name in enumerate(ADDRESSES, 1)},
    **{"m": 100, "n": 64, "k": 64, "a_stride": 64, "type": 0, "act": 0, "capability": 80},
}


def fresh(script: str, **env: str) -> str:
    done = fresh_python.run("-c", script, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@built
def test_it_imports_where_there_is_no_driver():
    # Alone: neither torch nor anything of NVIDIA's has loaded a driver before.
    script = (
        "import importlib.util as u; "
        f"s = u.spec_from_file_location('convmixer_fast._cuda', {ENGINE.__file__!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.families())"
    )
    assert "mma.sync" in fresh(script, CUDA_VISIBLE_DEVICES="")


@built
def test_the_module_and_python_number_the_same_things():
    assert ENGINE.activations() == list(ACTIVATIONS)
    assert ENGINE.types() == ["bfloat16", "float16", "tf32"]
    assert set(ENGINE.families()) <= set(native_cuda.FAMILIES)
    # Both forms of a kernel are checked, each before it serves: the border must be the same.
    assert ENGINE.few_outputs == MANY_OUTPUTS
    info = build_info()["cuda"]
    assert info["built"]
    assert info["kernels"] == ENGINE.families()
    assert " ".join(info["architectures"]) == ENGINE.architectures()
    assert info["compiler"] == ENGINE.compiler()


@built
@without_gpu
def test_a_launch_that_fails_raises_with_the_kernel_shape_and_architecture():
    kernels = {
        "mma.sync": ("pointwise_mma 64x64, copies of 16 bytes", 80),
        "wgmma": ("pointwise_wgmma 64x128", 90),
    }
    for family in ENGINE.families():
        kernel, capability = kernels[family]
        what = re.escape(f"{kernel} (100 x 64 -> 64 bfloat16 gelu, sm_{capability}): ")
        with pytest.raises(RuntimeError, match=rf"^{what}.* failed with cudaError\w+ \(.+\)$"):
            ENGINE.pointwise_mix(**{**GOOD, "family": family, "capability": capability}, stream=0)
    # Nothing to do asks for no driver.
    for size in ("m", "n"):
        ENGINE.pointwise_mix(**{**GOOD, size: 0}, stream=0)


@built
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"family": "warp"}, "family: must be one of mma.sync.*got warp"),
        ({"m": -1}, "m: must not be negative, got -1"),
        ({"a_stride": 63}, "a_stride: rows of 64 elements must not overlap, got 63"),
        ({"type": 3}, "type: must be 0 to 2, got 3"),
        ({"act": 5}, "act: must be 0 to 4, got 5"),
        ({"scale_ptr": 0}, "scale_ptr: must not be null"),
        ({"d_ptr": 0}, "d_ptr: must not be null"),
        ({"w_ptr": 0}, "a_ptr and w_ptr: must not be null"),
        ({"d_ptr": GOOD["a_ptr"]}, "does not work in place"),
    ],
)
def test_bad_numbers_are_refused_by_name(bad, message):
    for call in (ENGINE.refusal, lambda **given: ENGINE.pointwise_mix(**given, stream=0)):
        with pytest.raises(ValueError, match=message):
            call(**{**GOOD, **bad})


@built
def test_refusals_say_why_and_ask_for_no_gpu():
    assert ENGINE.refusal(**GOOD) == ""
    assert "sm_75" in ENGINE.refusal(**{**GOOD, "capability": 75})
    for capability in (80, 86, 89, 90, 120):
        assert ENGINE.serves("mma.sync", capability)
        assert native_cuda.why_not_gpu(capability) == ""
    assert "no kernel for sm_75" in native_cuda.why_not_gpu(75)
    assert "ROCm" in native_cuda.why_not_gpu(0)
    assert native_cuda.refusal("mma.sync", 80, "bfloat16", 64, 64, 64, "gelu") == ""
    if "wgmma" not in ENGINE.families():
        why = build_info()["cuda"]["omitted"]["wgmma"]
        assert native_cuda.refusal("wgmma", 90, "bfloat16", 64, 64, 64, "gelu") == why
        return
    wgmma = {**GOOD, "family": "wgmma", "capability": 90}
    assert ENGINE.refusal(**wgmma) == ""
    assert "bfloat16 and float16" in ENGINE.refusal(**{**wgmma, "type": 2})
    for odd in ({"k": 60}, {"n": 60}, {"a_stride": 70}):
        assert "16 bytes" in ENGINE.refusal(**{**wgmma, **odd})
    for name in ADDRESSES:
        assert "16 bytes" in ENGINE.refusal(**{**wgmma, f"{name}_ptr": 512 * 9 + 8})
    assert "not for sm_89" in ENGINE.refusal(**{**wgmma, "capability": 89})


def test_tensors_that_do_not_fit_are_named(monkeypatch):
    x = torch.zeros(2, 8, 3, 3, dtype=torch.float16)
    weight, vector = torch.zeros(8, 8, 1, 1, dtype=torch.float16), torch.zeros(8)
    good = [x, weight, vector, vector, vector, "gelu", torch.empty_like(x)]
    monkeypatch.setattr(native_cuda, "_find", lambda: (object(), ""))
    with pytest.raises(ValueError, match="x must be on x's GPU, x is on cpu"):
        native_cuda.pointwise_mix(*good)
    with pytest.raises(ValueError, match=r"TF32 allowed, got torch.float64"):
        native_cuda.pointwise_mix(x.double(), *good[1:])
    with pytest.raises(ValueError, match=r"weight must have shape \(4, 8, 1, 1\)"):
        native_cuda._check("weight", weight, (4, 8, 1, 1), x.dtype, x.device)
    monkeypatch.setattr(native_cuda, "_find", lambda: (None, "the moon is in the wrong house"))
    with pytest.raises(RuntimeError, match="not available: the moon is in the wrong house"):
        native_cuda.pointwise_mix(*good)


def test_a_refusal_says_which_kernel_shape_and_architecture(monkeypatch):
    engine = SimpleNamespace(
        refusal=lambda *given: "rows of a lie backwards",
        types=lambda: ["bfloat16", "float16", "tf32"],
        activations=lambda: list(ACTIVATIONS),
    )
    x, weight = torch.zeros(2, 8, 3, 3).half(), torch.zeros(24, 8, 1, 1).half()
    vector, out = torch.zeros(24), torch.zeros(2, 24, 3, 3).half()
    monkeypatch.setattr(native_cuda, "_find", lambda: (engine, ""))
    monkeypatch.setattr(native_cuda, "_check", lambda *given, **named: None)
    monkeypatch.setattr(native_cuda.support, "architecture", lambda device: 86)
    native_cuda._numbers.cache_clear()
    try:
        what = r"mma.sync \(18 x 8 -> 24 float16 silu, sm_86\): rows of a lie backwards"
        with pytest.raises(ValueError, match=what):
            native_cuda.pointwise_mix(x, weight, None, vector, vector, "silu", out)
    finally:
        native_cuda._numbers.cache_clear()


@pytest.mark.parametrize(
    ("name", "runs_on"),
    [
        ("sm_80", {80, 86, 89}),
        ("sm_86", {86, 89}),
        ("sm_90", {90}),
        ("compute_86", {86, 89, 90, 100, 120}),
        ("sm_120", {120}),
    ],
)
def test_code_runs_on_later_cards_of_its_kind_and_ptx_on_all_that_came_later(name, runs_on):
    cards = (75, 80, 86, 89, 90, 100, 120)
    assert {card for card in cards if native_cuda._runs_on(name, card)} == runs_on


@pytest.fixture
def asked_anew():
    """What was found out about the extension is forgotten, before and after."""
    native_cuda._find.cache_clear()
    yield
    native_cuda._find.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("CONVMIXER_FAST_DISABLE_CUDA", "1")
    assert native_cuda.load() is None
    assert available_backends()["cuda"] == "switched off by CONVMIXER_FAST_DISABLE_CUDA"


@pytest.mark.usefixtures("asked_anew")
def test_why_it_is_not_there_is_the_builds_own_reason(monkeypatch):
    def absent(name):
        raise ImportError("no such file\nhere")

    monkeypatch.setattr(native_cuda, "import_module", absent)
    monkeypatch.setattr(
        native_cuda, "build_info", lambda: {"cuda": {"reason": "no nvcc in this house"}}
    )
    why = native_cuda.why_unavailable()
    assert why == (
        "the CUDA extension was not built: no nvcc in this house; "
        "convmixer_fast._cuda: no such file here"
    )
    assert available_backends()["cuda"] == why
    report = doctor.examine()
    assert report["cuda_extension"]["reason"] == why
    assert "CUDA extension\n  not usable  the CUDA extension was not" in doctor.render(report)
    monkeypatch.setenv("CONVMIXER_FAST_BACKEND", "cuda")
    given = (torch.zeros(1, 2, 3, 3), torch.zeros(2, 2, 1, 1), None, torch.ones(2))
    with pytest.raises(BackendError, match="tensors are on cpu"):
        pointwise_mix(*given, torch.zeros(2), "relu")


@built
def test_doctor_says_what_was_built_and_for_what():
    report = doctor.examine()
    found = report["cuda_extension"]
    assert found["usable"]
    assert found["architectures"] == ENGINE.architectures()
    text = doctor.render(report)
    assert "CUDA extension" in text
    assert ENGINE.compiler() in text
    for name in found["build"]["omitted"]:
        assert f"{name}: " in text
    json.dumps(report)


def test_doctor_checks_the_cuda_backend_in_half_precision(monkeypatch):
    with cuda_installed() as double:
        move = torch.Tensor.to
        module_to = torch.nn.Module.to
        # There is no device "cuda" here: what is sent there stays.
        monkeypatch.setattr(
            torch.Tensor,
            "to",
            lambda t, *a, **k: t if a == ("cuda",) else move(t, *a, **k),
        )
        monkeypatch.setattr(
            torch.nn.Module,
            "to",
            lambda m, *a, **k: m if a == ("cuda",) else module_to(m, *a, **k),
        )
        rows = doctor.check_backend("cuda")
    assert {row["op"] for row in rows} == {"depthwise_mix", "pointwise_mix", "block"}
    assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]
    assert double.calls["mma.sync"] > 2 * len(ACTIVATIONS)
    # Numbers of half precision, not of float32.
    assert all(row["max_error"] > 1e-5 for row in rows)
