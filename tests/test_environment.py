"""Environment variables are read by one strict parser: no typo is silently a default."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import fresh_python
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convmixer_fast import ConvMixer, cli, environment
from convmixer_fast.backends.cpu import native
from convmixer_fast.environment import BUILD_VARIABLES, PREFIX, VARIABLES
from convmixer_fast.ops.dispatch import BackendError, requested_backend
from convmixer_fast.ops.registry import BACKENDS

ROOT = Path(__file__).parents[1]
CHOSEN = [v for v in VARIABLES.values() if v.values]


@pytest.fixture(autouse=True)
def looked_at_anew() -> Iterator[None]:
    environment.check.cache_clear()
    yield
    environment.check.cache_clear()


def test_every_variable_in_the_source_is_in_the_table_and_in_the_docs() -> None:
    found = set()
    for folder in ("convmixer_fast", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp") and path.name != "environment.py":
                text = path.read_text()
                found |= set(
                    re.findall(rf'(?:getenv\(|environ[^"\n]*|= )"{PREFIX}([A-Z_]+)"', text)
                )
                found |= set(re.findall(r'environment\.(?:flag|read|why_off)\("([A-Z_]+)"', text))
    assert found == set(VARIABLES)
    docs = (
        (ROOT / "docs" / "reference" / "support.md")
        .read_text()
        .split("## Environment variables")[1]
    )
    listed = set(re.findall(rf"{PREFIX}([A-Z_]+)", docs))
    assert set(VARIABLES) <= listed <= set(VARIABLES) | set(BUILD_VARIABLES)
    assert VARIABLES["BACKEND"].values == ("auto", *BACKENDS)


def test_no_other_place_reads_the_environment_of_this_package() -> None:
    for path in (ROOT / "convmixer_fast").rglob("*.py"):
        if path.name != "environment.py":
            assert not re.search(rf"environ(\.get\(|\[)[^\n]*{PREFIX}", path.read_text()), path


def any_case(text: str) -> st.SearchStrategy[str]:
    return st.tuples(*[st.sampled_from([c.lower(), c.upper()]) for c in text]).map("".join)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), variable=st.sampled_from(CHOSEN))
def test_values_are_read_in_any_case_and_others_raise(
    data: st.DataObject, variable: environment.Variable, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = data.draw(st.sampled_from(variable.values))
    with monkeypatch.context() as patch:
        patch.setenv(variable.full_name, f" {data.draw(any_case(value))}")
        assert environment.read(variable.name) == value
        if variable.kind == "switch":
            assert environment.flag(variable.name) == (value in ("1", "true", "yes", "on"))
        wrong = data.draw(
            st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1)
        )
        if wrong.strip().lower() in variable.values:
            return
        patch.setenv(variable.full_name, wrong)
        with pytest.raises(ValueError, match=f"^{variable.full_name}: unknown") as caught:
            environment.read(variable.name)
        line = str(caught.value)
        assert line.isprintable()
        assert all(name in line for name in variable.values)
        assert environment.problems() == [line]
        patch.setenv(variable.full_name, "")
        assert environment.read(variable.name) is None
        assert environment.flag(variable.name, default=True)


#: Of a forward pass, in a process of its own.
FORWARD = """
import torch
from convmixer_fast import ConvMixer, explain
from convmixer_fast.backends.cpu import native
model = ConvMixer(16, 1, kernel_size=3, patch_size=4, num_classes=2).eval()
x = torch.zeros(1, 3, 16, 16)
try:
    with torch.inference_mode():
        model(x)
    module = native.load()
    print("ran", module.isa() if module else None, "|", native.why_unavailable())
except (ValueError, RuntimeError) as error:
    print("raised", error)
"""


@pytest.mark.parametrize(
    ("name", "value"),
    [(v.name, "nonsense") for v in CHOSEN if v.name != "DEBUG"] + [("STRASSEN", "2")],
)
def test_a_typo_raises_at_the_first_forward_and_not_at_the_import(name: str, value: str) -> None:
    told = fresh_python.run("-c", FORWARD, env={PREFIX + name: value}).stdout
    assert told.startswith(f"raised {PREFIX}{name}: unknown"), told
    assert value in told
    assert all(allowed in told for allowed in VARIABLES[name].values)
    told = fresh_python.run(
        "-c", "import convmixer_fast; print('fine')", env={PREFIX + name: value}
    )
    assert told.stdout == "fine\n"


@pytest.mark.parametrize("value", ["TRUE", "yes", "On", "1"])
def test_a_switch_works_under_every_name_of_on(value: str) -> None:
    told = fresh_python.run("-c", FORWARD, env={PREFIX + "DISABLE_NATIVE": value}).stdout
    assert told == f"ran None | switched off by {PREFIX}DISABLE_NATIVE\n"


@pytest.mark.skipif(not native.load(), reason=native.why_unavailable())
@pytest.mark.parametrize("value", ["BASELINE", "Baseline", "baseline "])
def test_an_instruction_set_is_read_in_any_case(value: str) -> None:
    told = fresh_python.run("-c", FORWARD, env={PREFIX + "ISA": value}).stdout
    assert told == "ran baseline | \n"


def test_the_backend_is_read_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "BACKEND", "Reference")
    assert requested_backend() == "reference"
    monkeypatch.setenv(PREFIX + "BACKEND", "referense")
    with pytest.raises(BackendError, match="BACKEND: unknown backend 'referense': one of auto, "):
        ConvMixer(8, 1, kernel_size=3, patch_size=4)(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ISA", "AVX1024", "unknown instruction set AVX1024; use one of baseline, avx2, avx512"),
        ("DISABLE_CUDA", "ja", "unknown switch ja; use one of 1, true"),
        ("ISSA", "avx2", "is no variable of this package"),
    ],
)
def test_doctor_names_what_cannot_be_read(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(PREFIX + name, value)
    assert cli.main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert f"{PREFIX}{name}" in out.split("Environment")[1]
    assert says in out.splitlines()[-1]
    assert err == ""


def test_the_command_line_refuses_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(PREFIX + "DEBUG", "maybe")
    assert cli.main(["info"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"convmixer-fast: error: {PREFIX}DEBUG: unknown switch maybe; use one of")
    assert err.count("\n") == 1
