"""The runs on other versions of torch and Python: what is counted, recorded and shown."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import figures
import pytest
import versions
from versions import NotRun, Pair

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_ops" name="test_a[1]"/>
<testcase classname="tests.test_ops" name="test_b"><failure message="no"/></testcase>
<testcase classname="tests.test_ops" name="test_b"><error message="teardown"/></testcase>
<testcase classname="tests.test_ops" name="test_c"><skipped message="no GPU"/></testcase>
<testcase classname="" name="tests.test_gone"><error message="collection"/></testcase>
</testsuite></testsuites>"""
ENTRY = {"torch": "2.11.0+cpu", "triton": "", "python": "3.11.7", "date": "2030-01-02"}
COUNTS = {"passed": 7, "failed": 0, "skipped": 2, "failures": []}


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """A runner whose records are in a folder of their own."""
    monkeypatch.setattr(versions, "RECORDS", tmp_path / "versions.json")
    monkeypatch.setattr(versions, "sources", list)
    return versions.Runner(tmp_path / "cache", "1", 1, None)


def test_a_pair_is_read_from_torch_with_or_without_python():
    assert versions.parse("2.11") == Pair("2.11", versions.THIS)
    assert versions.parse("2.8:3.13") == Pair("2.8", "3.13")
    for wrong in ("2", "2.8.0", "2.8:", "2.8:3", "newest", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="use TORCH or TORCH:PYTHON"):
            versions.parse(wrong)


def test_a_failure_and_its_teardown_are_one_failed_test(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    assert versions.counted(tmp_path / "report.xml") == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": ["test_gone", "test_ops::test_b"],
    }


def test_every_test_file_that_is_named_exists():
    paths = [versions.path_of(name) for name in versions.FILES]
    assert not [path for path in paths if not (path.is_file() or list(path.glob("test_*.py")))]


def test_a_python_that_is_absent_is_named():
    with pytest.raises(NotRun, match=r"no Python 3\.99"):
        versions.interpreter("3.99")


def test_recorded_versions_are_ordered_and_not_run_again(runner, tmp_path, monkeypatch, capsys):
    ran = []

    def run(self, pair, files):
        ran.append(str(pair))
        if pair.torch == "2.10":
            raise NotRun("the network failed")
        if pair.torch == "2.99":
            raise NotRun("pip finds no torch 2.99", lasting=True)
        return ENTRY | COUNTS | {"sources": self.sources}

    monkeypatch.setattr(versions.Runner, "run", run)
    arguments = ["--record", "--cache", str(tmp_path / "cache"), "2.10", "2.99:3.11", "2.8:3.11"]
    assert versions.main([*arguments, "2.11:3.11"]) == 1
    entries = json.loads(versions.RECORDS.read_text())
    assert list(entries) == ["2.8:3.11", "2.11:3.11", "2.99:3.11"], "what may still succeed is left"
    assert entries["2.99:3.11"]["reason"] == "pip finds no torch 2.99"
    assert len(capsys.readouterr().out.splitlines()) == 4
    ran.clear()
    assert versions.main([*arguments, "2.11:3.11"]) == 1
    assert ran == [f"2.10:{versions.THIS}"]
    assert versions.main(["--again", *arguments[:3], "2.11:3.11"]) == 0


def test_failed_tests_are_the_exit_status_and_are_named(runner, tmp_path, monkeypatch, capsys):
    failed = {"passed": 1, "failed": 1, "skipped": 0, "failures": ["test_ops::test_b"]}
    monkeypatch.setattr(versions.Runner, "run", lambda *_: ENTRY | failed)
    assert versions.main(["--cache", str(tmp_path / "cache"), "2.11:3.11"]) == 1
    assert "test_ops::test_b" in capsys.readouterr().out
    assert not versions.RECORDS.exists(), "without --record"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_command_that_does_not_end_is_stopped_with_its_children(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(NotRun, match="no end after"):
        versions.call(["sh", "-c", "sleep 600 & echo $!; wait"], log, 5)
    child = Path("/proc", log.read_text().strip())
    for _ in range(100):
        # Without a parent that waits for it, a killed process may stay as a zombie.
        if not child.exists() or ") Z " in (child / "stat").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {child.name} is still running")
    with pytest.raises(NotRun, match="exit status 3"):
        versions.call(["sh", "-c", "exit 3"], log, 60)


def test_the_table_names_failures_and_what_could_not_be_installed():
    recorded = {
        "2.11:3.11": ENTRY | COUNTS,
        "2.12:3.11": ENTRY | COUNTS | {"failed": 1, "failures": ["test_ops::test_b"]},
        "2.99:3.11": {"reason": "pip finds no torch 2.99 for Python 3.11", "date": "2030-01-02"},
    }
    lines = figures.versions(recorded).splitlines()
    assert lines[2] == "| 2.11.0+cpu | none | 3.11.7 | 7 | 0 | 2 | 2030-01-02 |"
    assert "* torch 2.12, Python 3.11 fails `test_ops::test_b`." in lines
    assert "* torch 2.99, Python 3.11: pip finds no torch 2.99 for Python 3.11." in lines
    assert figures.versions({"2.11:3.11": ENTRY | COUNTS}).splitlines() == lines[:3]
