"""Results are on the disk once each, whole or absent, whatever kills the run that writes them."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import fresh_python
import numpy as np
import photographs
import pytest

from convmixer_fast import ConvMixer, save_checkpoint
from convmixer_fast.inference import Columns, Failure, Prediction, ResultFile, Vector, files
from convmixer_fast.testing import trained_like_

FORMATS = ("csv", "json", "jsonl", "parquet")
COLUMNS = Columns("prob", 2)


def rows(numbers, prefix: str = "") -> list[Prediction]:
    rng = np.random.default_rng(5)
    scores = rng.random((1000, 2)).astype(np.float32)
    return [
        Prediction(f"{prefix}{n}.jpg", (n, n + 1), (f"cat {n}", 'a "dog", tame'),
                   tuple(float(s) for s in scores[n]))
        for n in numbers
    ]  # fmt: skip


def interrupted(path: Path, given, failures=(), **options) -> None:
    """A run that is given rows and does not come to its end."""
    with suppress(KeyboardInterrupt), ResultFile(path, COLUMNS, **options) as results:
        results.write(given, failures)
        raise KeyboardInterrupt


def read(path: Path, kind: str) -> list[dict[str, object]]:
    """The rows of a result, by other readers than the ones under test."""
    if kind == "parquet":
        return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    if kind == "json":
        return json.loads(path.read_text())
    if kind == "jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(params=FORMATS)
def kind(request) -> str:
    if request.param == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    return request.param


def test_rows_come_back_from_every_format_to_the_last_bit(tmp_path, kind):
    path = tmp_path / f"r.{kind}"
    given = rows(range(30))
    with ResultFile(path, COLUMNS, part_seconds=0) as results:
        for start in (0, 10, 20):
            results.write(given[start : start + 10], [Failure(f"bad{start}.jpg", "cut, short")])
    found = read(path, kind)
    assert [list(row) for row in found] == [COLUMNS.names] * 30
    for row, expected in zip(found, given, strict=True):
        assert row["filename"] == expected.filename
        assert (int(row["index_0"]), int(row["index_1"])) == expected.indices
        assert (row["label_0"], row["label_1"]) == expected.labels
        scores = np.array([row["prob_0"], row["prob_1"]], dtype=np.float32)
        assert np.array_equal(scores, np.array(expected.scores, dtype=np.float32))
    errors = read(tmp_path / "r.errors.csv", "csv")
    assert errors == [{"filename": f"bad{n}.jpg", "error": "cut, short"} for n in (0, 10, 20)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["r.errors.csv", f"r.{kind}"])


def test_vectors_come_back_from_every_format_to_the_last_bit(tmp_path, kind):
    path = tmp_path / f"r.{kind}"
    values = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    with ResultFile(path, Columns("embedding"), part_seconds=0) as results:
        for n in range(6):
            results.write([Vector(f"{n}.jpg", values[n])])
    for n, row in enumerate(read(path, kind)):
        cells = list(row.values())
        vector = cells[1:] if kind == "csv" else cells[1]
        assert row["filename"] == f"{n}.jpg"
        assert np.array_equal(np.array(vector, dtype=np.float32), values[n])


def test_parts_are_there_while_the_run_goes_on(tmp_path, kind):
    results = ResultFile(tmp_path / f"r.{kind}", COLUMNS, part_seconds=0)
    with results:
        results.write(rows(range(4)), [Failure("bad.jpg", "cut")])
        part_kind = "jsonl" if kind == "json" else kind
        names = sorted(p.name for p in (tmp_path / f"r.{kind}.parts").iterdir())
        assert f"part-00000001.{part_kind}" in names
        assert "part-00000000.errors" in names
        part = tmp_path / f"r.{kind}.parts" / f"part-00000001.{part_kind}"
        assert len(read(part, part_kind)) == 4
        assert not (tmp_path / f"r.{kind}").exists()
    assert len(read(tmp_path / f"r.{kind}", kind)) == 4


def test_a_failed_run_goes_on_where_it_was(tmp_path, kind):
    path = tmp_path / f"r.{kind}"
    interrupted(path, rows(range(5)), [Failure("bad.jpg", "cut")])
    assert not path.exists()
    with pytest.raises(ValueError, match=r"parts holds an unfinished run: --resume"):
        ResultFile(path, COLUMNS)
    with ResultFile(path, COLUMNS, resume=True) as results:
        assert (results.kept, results.failed) == (5, 1)
        assert all(results.is_done(f"{n}.jpg") for n in range(5))
        assert results.is_done("bad.jpg")
        assert not results.is_done("5.jpg")
        results.write(rows(range(5, 9)))
    assert [row["filename"] for row in read(path, kind)] == [f"{n}.jpg" for n in range(9)]
    assert len(read(tmp_path / "r.errors.csv", "csv")) == 1


def test_a_finished_file_gets_what_it_lacks(tmp_path, kind):
    path = tmp_path / f"r.{kind}"
    with ResultFile(path, COLUMNS) as results:
        results.write(rows(range(5)), [Failure("bad.jpg", "cut")])
    with pytest.raises(ValueError, match=rf"r\.{kind} exists: --resume adds"):
        ResultFile(path, COLUMNS)
    before = path.read_bytes()
    with ResultFile(path, COLUMNS, resume=True) as results:
        assert results.kept == 5
        assert results.is_done("bad.jpg")
    assert path.read_bytes() == before
    for numbers in ((5, 6), (7,)):
        with ResultFile(path, COLUMNS, resume=True) as results:
            results.write(rows(numbers), [Failure(f"bad{numbers[0]}.jpg", "cut")])
    assert [row["filename"] for row in read(path, kind)] == [f"{n}.jpg" for n in range(8)]
    errors = [row["filename"] for row in read(tmp_path / "r.errors.csv", "csv")]
    assert errors == ["bad.jpg", "bad5.jpg", "bad7.jpg"]
    assert not (tmp_path / f"r.{kind}.parts").exists()


def test_overwriting_forgets_the_parts_and_the_errors_of_before(tmp_path, kind):
    path = tmp_path / f"r.{kind}"
    with ResultFile(path, COLUMNS) as results:
        results.write(rows(range(5)), [Failure("bad.jpg", "cut")])
    before = path.read_bytes()
    interrupted(path, rows(range(3)), overwrite=True)
    assert path.read_bytes() == before
    with ResultFile(path, COLUMNS, overwrite=True) as results:
        assert not results.is_done("0.jpg")
        results.write(rows((7, 8)))
    assert [row["filename"] for row in read(path, kind)] == ["7.jpg", "8.jpg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"r.{kind}"]


def test_a_kill_between_any_two_steps_on_the_disk_loses_and_repeats_nothing(
    tmp_path, kind, monkeypatch
):
    """Every rename, unlink and removal is once the moment of death."""

    class Killed(BaseException):
        pass

    def run(path: Path, numbers, dies_at: int) -> int:
        steps = 0

        def counted(real):
            def step(*args, **kwargs):
                nonlocal steps
                if steps == dies_at:
                    raise Killed
                steps += 1
                return real(*args, **kwargs)

            return step

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(os, "fsync", lambda _: None)
            patch.setattr(files.shutil, "rmtree", counted(files.shutil.rmtree))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            results = None
            try:
                results = ResultFile(path, COLUMNS, resume=True, part_seconds=0)
                for n in numbers:
                    if not results.is_done(f"{n}.jpg"):
                        bad = n % 3 == 2
                        results.write([] if bad else rows([n]), [Failure(f"{n}.jpg", "x")] * bad)
                results.__exit__(None, None, None)
            except Killed:
                # A killed process leaves its lock to the system, and its files as they are.
                if results is not None:
                    results._release()
                return -1
        return steps

    deaths = 0
    for dies_at in range(200):
        path = tmp_path / str(dies_at) / f"r.{kind}"
        path.parent.mkdir()
        # A finished file of an earlier run, to be taken over; then one that dies, and its heir.
        assert run(path, range(4), 10**9) > 0
        died = run(path, range(8), dies_at) < 0
        deaths += died
        assert run(path, range(8), 10**9) >= 0
        good = [row["filename"] for row in read(path, kind)]
        bad = [row["filename"] for row in read(path.with_name("r.errors.csv"), "csv")]
        assert Counter(good + bad) == Counter(f"{n}.jpg" for n in range(8)), dies_at
        assert bad == ["2.jpg", "5.jpg"]
        assert not path.with_name(f"r.{kind}.parts").exists()
        if not died:
            break
    assert deaths > 10


def test_what_a_kill_leaves_of_a_write_is_swept_up(tmp_path):
    litter = [tmp_path / ".r.csv.17.partial", tmp_path / ".r.errors.csv.17.partial"]
    others = tmp_path / ".q.csv.17.partial"
    interrupted(tmp_path / "r.csv", rows([1]))
    for path in (*litter, others):
        path.write_text("half a ro")
    with ResultFile(tmp_path / "r.csv", COLUMNS, resume=True) as results:
        results.write(rows([2]))
    assert sorted(p.name for p in tmp_path.iterdir()) == [others.name, "r.csv"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_device_is_named():
    def run():
        with ResultFile("/dev/full", COLUMNS) as results:
            results.write(rows([1]))

    with pytest.raises(OSError, match="No space left") as caught:
        run()
    assert caught.value.filename == "/dev/full"


def test_another_run_on_the_same_file_is_refused_while_it_lives(tmp_path):
    with ResultFile(tmp_path / "r.csv", COLUMNS) as results:
        results.write(rows([1]))
        with pytest.raises(ValueError, match=r"another run is writing .*r\.csv"):
            ResultFile(tmp_path / "r.csv", COLUMNS, resume=True)
    assert len(read(tmp_path / "r.csv", "csv")) == 1


def test_going_on_with_other_settings_is_refused(tmp_path):
    path = tmp_path / "r.csv"
    interrupted(path, rows([1]), settings={"model": "a"})
    with pytest.raises(ValueError, match="another model \\('a', now 'b'\\)"):
        ResultFile(path, COLUMNS, resume=True, settings={"model": "b"})
    with pytest.raises(ValueError, match="another columns"):
        ResultFile(path, Columns("logit", 2), resume=True, settings={"model": "a"})
    with ResultFile(path, COLUMNS, resume=True, settings={"model": "a"}):
        pass
    assert len(read(path, "csv")) == 1
    with pytest.raises(ValueError, match=r"other columns \(filename, index_0"):
        ResultFile(path, Columns("prob", 3), resume=True)


def test_a_full_disk_is_named_and_costs_only_what_did_not_fit(tmp_path, kind, monkeypatch):
    path = tmp_path / f"r.{kind}"
    real = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def run():
        with ResultFile(path, COLUMNS, part_seconds=0) as results:
            results.write(rows(range(3)))
            monkeypatch.setattr(os, "fsync", full)
            results.write(rows(range(3, 6)))

    with pytest.raises(OSError, match="No space left") as caught:
        run()
    assert caught.value.filename == str(path)
    assert [p for p in tmp_path.rglob("*") if ".partial" in p.name] == []
    monkeypatch.setattr(os, "fsync", real)
    with ResultFile(path, COLUMNS, resume=True) as results:
        assert results.kept == 3
        results.write(rows(range(3, 6)))
    assert [row["filename"] for row in read(path, kind)] == [f"{n}.jpg" for n in range(6)]


def test_places_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        ResultFile(tmp_path / "none" / "r.csv", COLUMNS)
    assert caught.value.filename == str(tmp_path / "none" / "r.csv")
    with pytest.raises(IsADirectoryError):
        ResultFile(tmp_path, COLUMNS)
    with pytest.raises(ValueError, match="unknown format 'xml'"):
        ResultFile(tmp_path / "r.csv", COLUMNS, format="xml")
    if Path(os.devnull).exists():
        with pytest.raises(ValueError, match="takes csv or jsonl, not json"):
            ResultFile(os.devnull, COLUMNS, format="json")


def test_names_that_are_not_utf8_are_kept_and_found_again(tmp_path, kind):
    name = os.fsdecode(b"caf\xe9 \n.jpg")
    path = tmp_path / f"r.{kind}"
    row = rows([1])[0]._replace(filename=name)
    with ResultFile(path, COLUMNS) as results:
        results.write([row])
    with ResultFile(path, COLUMNS, resume=True) as results:
        assert results.is_done(name)
        results.write(rows([2]))
    assert len(read(path, kind) if kind != "csv" else list(files.Csv.filenames(path))) == 2


@pytest.mark.slow
def test_every_image_is_there_once_after_five_kills(tmp_path):
    folder = tmp_path / "images"
    broken = photographs.write_folder(folder, 200)
    checkpoint = tmp_path / "w.safetensors"
    net = trained_like_(ConvMixer(16, 2, 3, 4, num_classes=5), (4, 3, 32, 32))
    save_checkpoint(net, checkpoint)
    # Slow enough to be killed in the middle, whatever the machine.
    slow = (
        "import sys, time\n"
        "from convmixer_fast import cli, inference\n"
        "real = inference.Predictor.rows\n"
        "def rows(*args):\n"
        "    time.sleep(0.05)\n"
        "    return real(*args)\n"
        "inference.Predictor.rows = rows\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    results = tmp_path / "r.csv"
    arguments = ["-c", slow, "predict", folder, "--checkpoint", checkpoint, "--img-size", "32",
                 "-b", "4", "-j", "1", "--results-file", results, "--resume", "--part-seconds",
                 "0.1", "--no-console-results"]  # fmt: skip
    arguments = [str(a) for a in arguments]
    parts = tmp_path / "r.csv.parts"
    random.seed(0)
    seen = []
    for _ in range(5):
        process = fresh_python.start(*arguments, stderr=subprocess.DEVNULL)
        before = len(list(parts.glob("part-*")))
        deadline = time.monotonic() + 60
        while len(list(parts.glob("part-*"))) <= before and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(len(list(parts.glob("part-*"))))
    assert seen == sorted(seen)
    assert not results.exists()
    done = fresh_python.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "were there already" in done.stderr
    good = [str(row["filename"]) for row in read(results, "csv")]
    bad = [row["filename"] for row in read(tmp_path / "r.errors.csv", "csv")]
    everything = [str(p) for p in folder.rglob("*.jpg")]
    assert len(everything) == 200
    assert Counter(good + bad) == Counter(everything)
    assert set(bad) == set(broken)
    assert not parts.exists()
