"""``doctor`` tells the truth about a machine, and fails where a backend computes wrong numbers."""

from __future__ import annotations

import json
import os

import fresh_python
import pytest
import torch
from fakes.triton import installed

from convmixer_fast import BackendError, cli
from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.backends import self_check
from convmixer_fast.backends.cpu import native
from convmixer_fast.diagnostics import doctor
from convmixer_fast.ops import depthwise_mix, pointwise_mix
from convmixer_fast.ops.dispatch import requested_backend


@pytest.fixture(scope="module")
def report():
    return doctor.examine()


def test_report_names_every_backend_and_checks_those_that_run(report):
    assert set(report["backends"]) == {"reference", "cpu", "triton", "cuda"}
    usable = {name for name, why in report["backends"].items() if not why}
    assert "reference" in usable
    checked = {(row["backend"], row["op"], row["act"]) for row in report["self_check"]}
    ops = ("depthwise_mix", "pointwise_mix", "block")
    assert checked == {(b, op, act) for b in usable for op in ops for act in ACTIVATIONS}
    assert doctor.healthy(report), doctor.render(report)


def test_self_check_errors_are_those_of_float32(report):
    errors = [row["max_error"] for row in report["self_check"]]
    # Not zero: the operators were run in float32 and compared with float64.
    assert all(0 < error < 1e-4 for error in errors)
    assert all(row["max_error"] <= row["bar"] for row in report["self_check"])


def test_versions_are_those_installed(report):
    assert report["libraries"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["cpu"]["cores"] >= 1
    assert report["cpu"]["name"]
    assert report["cpu"]["torch_threads"] == torch.get_num_threads()
    assert report["extension"]["usable"] == (native.load() is not None)
    assert doctor.version_of("a-library-that-nobody-has") is None


def test_text_and_json_say_the_same(capsys, monkeypatch):
    monkeypatch.setenv("CONVMIXER_FAST_BACKEND", "reference")
    assert cli.main(["doctor", "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["CONVMIXER_FAST_BACKEND"] == "reference"
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text == doctor.render(report) + "\n"
    assert "CONVMIXER_FAST_BACKEND" in text
    assert report["libraries"]["torch"] in text
    assert text.endswith("Everything that runs computes the right numbers.\n")


def test_the_environment_variable_does_not_stand_in_for_the_backend_under_check(monkeypatch):
    asked = []
    depthwise = doctor.depthwise_mix

    def spy(*operands):
        asked.append(requested_backend())
        return depthwise(*operands)

    monkeypatch.setenv("CONVMIXER_FAST_BACKEND", "auto")
    monkeypatch.setattr(doctor, "depthwise_mix", spy)
    assert all(row["ok"] for row in doctor.check_backend("reference"))
    assert set(asked) == {"reference"}
    assert os.environ["CONVMIXER_FAST_BACKEND"] == "auto"


def test_a_backend_that_computes_wrong_numbers_is_an_illness(capsys, monkeypatch):
    depthwise = doctor.depthwise_mix

    def wrong(x, weight, bias, scale, shift, act):
        return depthwise(x, weight, bias, scale, shift, act) + (1e-3 if act == "silu" else 0)

    def broken(*operands):
        raise RuntimeError("launch failed\nin a kernel")

    monkeypatch.setattr(doctor, "depthwise_mix", wrong)
    monkeypatch.setattr(doctor, "pointwise_mix", broken)
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "Failed checks" in text
    assert "(silu) max error" in text
    assert "launch failed in a kernel" in text
    assert f"FAILED 6 of {3 * len(ACTIVATIONS)} checks" in text


@pytest.mark.parametrize(
    ("asked", "says"), [("triton", "asks for triton, which cannot run"), ("tpu", "unknown backend")]
)
def test_an_environment_that_asks_for_what_cannot_run_is_an_illness(
    capsys, monkeypatch, asked, says
):
    monkeypatch.setenv("CONVMIXER_FAST_BACKEND", asked)
    assert cli.main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert says in out.splitlines()[-1]
    assert out.splitlines()[-1].startswith("Not well")
    assert err == ""


def test_a_result_of_nan_is_an_illness(monkeypatch):
    monkeypatch.setattr(doctor, "pointwise_mix", lambda x, *rest: torch.full_like(x, float("nan")))
    rows = doctor.check_backend("reference")
    assert [row["ok"] for row in rows if row["op"] == "pointwise_mix"] == [False] * len(ACTIVATIONS)
    assert all(row["ok"] for row in rows if row["op"] == "depthwise_mix")


def test_a_missing_extension_is_told_with_its_reason_and_no_illness(capsys, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "why_unavailable", lambda: "no compiler was found")
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "not usable" in text
    assert "not here: no compiler was found" in text


def test_gpus_are_shown_as_torch_sees_them(monkeypatch, report):
    class Properties:
        name, total_memory, major, minor = "Some GPU", 24 * 2**30, 8, 9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties)
    gpus = doctor._gpus()
    assert gpus == [{"name": "Some GPU", "memory_gib": 24.0, "capability": "8.9"}] * 2
    text = doctor.render(report | {"cuda": {"torch_built_with": "12.8", "gpus": gpus}})
    assert text.count("Some GPU, 24.0 GiB, compute capability 8.9") == 2


def test_a_machine_that_names_no_processor_is_unknown_or_its_architecture(monkeypatch):
    def unreadable(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(doctor.Path, "read_text", unreadable)
    monkeypatch.setattr(doctor.platform, "processor", lambda: "")
    monkeypatch.setattr(doctor.platform, "machine", lambda: "")
    assert doctor.cpu_name() == "unknown"


def test_triton_is_not_imported():
    code = (
        "import sys; from convmixer_fast.diagnostics import doctor; "
        "doctor.render(doctor.examine()); "
        "sys.exit('triton' in sys.modules)"
    )
    done = fresh_python.run("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.filterwarnings("ignore:the kernel for")
def test_gpu_kernels_that_failed_at_their_first_use_are_shown(report):
    with installed() as double:
        double.error["depthwise_mix"] = RuntimeError("out of resource")
        x, one = torch.randn(1, 4, 6, 6), torch.ones(4)
        with pytest.raises(BackendError):
            depthwise_mix(x, torch.ones(4, 1, 3, 3), None, one, one, "relu")
        pointwise_mix(x, torch.ones(4, 4, 1, 1), None, one, one, "relu")
        kernels = {str(case): why for case, why in self_check.results().items()}
    assert sorted(kernels.values()) == ["", "RuntimeError: out of resource"]
    text = doctor.render(report | {"kernels": kernels})
    (shown,) = [line for line in text.splitlines() if "out of resource" in line]
    assert "depthwise_mix of 4 -> 4 channels, kernel 3, relu, no bias, float32 on cpu" in shown
    assert "GPU kernels" not in doctor.render(report | {"kernels": {}})
