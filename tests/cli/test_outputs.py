"""No option and no function that names a file to write destroys what is not a file.

Every option is found in the parsers, so that a new one is tested too.
"""

from __future__ import annotations

import argparse
import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import photographs
import pytest
import torch

from convmixer_fast import ConvMixer, cli, files, save_checkpoint
from convmixer_fast.cli.common import output_file, output_folder
from convmixer_fast.diagnostics import gpu_report
from convmixer_fast.inference import Columns, Failure, Prediction, ResultFile, stream
from convmixer_fast.inference.evaluate import Evaluation
from convmixer_fast.inference.heatmap import write_overlay, write_scores
from convmixer_fast.testing import trained_like_

#: Names that an option or a function asks for.
SUFFIX = {"stream --output": ".npy", "stream --heatmap": ".png", "convert target": ".safetensors"}
SUFFIX |= {"stream(out=)": ".npy"}
#: These cannot go into a device: they are not written from the first byte to the last.
FILES_ONLY = {"stream --output", "stream --state", "stream(out=)", "stream(checkpoint=)"}


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (
        a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)
    )
    return dict(commands.choices)


def options() -> dict[str, argparse.Action]:
    """``"predict --results-file"`` -> the option, for all that name a file to write."""
    return {
        f"{command} {(action.option_strings or [action.dest])[-1]}": action
        for command, parser in subparsers().items()
        for action in parser._actions
        if action.type is output_file
    }


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a folder of two classes with a file that is no image, and an array."""
    folder = tmp_path_factory.mktemp("things")
    net = ConvMixer(8, 1, kernel_size=3, patch_size=4, num_classes=2)
    save_checkpoint(trained_like_(net, (2, 3, 32, 32)), folder / "w.safetensors")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        photographs.picture(rng, 40, 50).save(folder / "images" / name / "1.png")
    (folder / "images" / "a" / "cut.jpg").write_bytes(b"")
    np.save(folder / "image.npy", rng.integers(0, 256, (64, 40, 3), dtype=np.uint8))
    return folder


def command_line(option: str, things: Path, target: Path) -> list[str]:
    """A run of the command that writes to ``target``."""
    command, flag = option.split()
    model = ["--checkpoint", str(things / "w.safetensors")]
    sized = [*model, "--img-size", "32", "-j", "0", "--device", "cpu"]
    base = {
        "predict": [str(things / "images"), *sized, "--no-console-results"],
        "evaluate": [str(things / "images"), *sized],
        "stream": [str(things / "image.npy"), *model, "--overwrite", "--device", "cpu"],
        "benchmark": ["-m", "256/8", "-b", "1", "--num-warm-iter", "1", "--num-bench-iter", "1"],
        "doctor": ["--gpu"],
        "convert": [str(things / "w.safetensors"), str(target), "--format", "locuslab"],
    }[command]
    if command == "convert":
        return [command, *base]
    more = ["--resume"] if flag == "--state" else []
    if command == "predict" and flag != "--results-file":
        more += ["--results-file", str(things / f"results-{os.urandom(4).hex()}.csv")]
    return [command, *base, *more, flag, str(target)]


def functions(things: Path) -> dict[str, Callable[[Path], object]]:
    """Every function of the package that writes a file whose name it is given."""
    net = ConvMixer.from_checkpoint(things / "w.safetensors")
    counted = Evaluation(["a", "b"], np.eye(2, dtype=np.int64), np.ones(2, np.int64))

    def results(path: Path, **named: Any) -> None:
        with ResultFile(path, Columns("prob", 1), overwrite=True, **named) as file:
            row = Prediction("a.png", (0,), ("a",), (0.5,))
            file.write([row], [Failure("b.png", "cut")])

    return {
        "save_checkpoint": lambda path: save_checkpoint(net, path),
        "ResultFile": results,
        "ResultFile(errors_file=)": lambda path: results(
            things / f"results-{os.urandom(4).hex()}.csv", errors_file=path
        ),
        "write_per_class": counted.write_per_class,
        "write_confusion": counted.write_confusion,
        "write_overlay": lambda path: write_overlay(path, torch.ones(4, 4)),
        "write_scores": lambda path: write_scores(path, torch.ones(4, 4)),
        "write_whole": lambda path: files.write_whole(path, "text\n"),
        "stream(out=)": lambda path: stream(net, things / "image.npy", "features", out=path),
        "stream(checkpoint=)": lambda path: stream(
            net, things / "image.npy", "logits", checkpoint=path, checkpoint_rows=4
        ),
    }


FUNCTIONS = (
    "save_checkpoint", "ResultFile", "ResultFile(errors_file=)", "write_per_class",
    "write_confusion", "write_overlay", "write_scores", "write_whole", "stream(out=)",
    "stream(checkpoint=)",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIPE_PATIENCE", 0.1)
    # The report of a GPU takes minutes; its writing is what counts here.
    monkeypatch.setattr(gpu_report, "report", lambda **_: {"rows": []})


def write(
    writer: str, things: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> str | None:
    """Write to ``target``: None, or the one line of the refusal."""
    if writer in FUNCTIONS:
        try:
            functions(things)[writer](target)
        except (OSError, ValueError) as error:
            return " ".join(map(str, [error, getattr(error, "filename", "")]))
        return None
    code = cli.main(command_line(writer, things, target))
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if code == 0:
        return None
    assert code == 2, err
    line = err.rstrip().splitlines()[-1]
    assert line.startswith("convmixer-fast: error: ")
    return line


def target_of(writer: str, folder: Path) -> Path:
    return folder / f"target{SUFFIX.get(writer, '.csv')}"


def test_the_list_of_functions_is_the_one_that_is_tested(things: Path) -> None:
    assert set(functions(things)) == set(FUNCTIONS)


def test_every_option_that_names_a_file_says_whether_it_is_written() -> None:
    inputs = {"paths", "data", "data_dir", "image_list", "checkpoint", "class_map", "source"}
    inputs |= {"image", "image_column"}
    for command, parser in subparsers().items():
        for action in parser._actions:
            names = action.metavar in {"PATH", "FILE", "DIR", "SRC", "DST", "IMAGE"}
            written = action.type in (output_file, output_folder)
            assert not names or written or action.dest in inputs, (command, action.dest)
            assert names or not written
    assert len(options()) >= 11


@pytest.mark.parametrize("writer", [*options(), *FUNCTIONS])
def test_a_file_is_written_and_replaced(
    writer: str, things: Path, tmp_path: Path, capsys: Any
) -> None:
    target = target_of(writer, tmp_path)
    assert write(writer, things, target, capsys) is None
    if "state" in writer or "checkpoint=" in writer:  # removed at the end
        return
    assert target.stat().st_size
    if writer not in ("predict --results-file", "ResultFile"):
        target.write_bytes(b"old")
        target.chmod(0o600)
        assert write(writer, things, target, capsys) is None
        assert target.read_bytes() != b"old"
    assert [p for p in tmp_path.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize("writer", [*options(), *FUNCTIONS])
def test_a_link_stays_and_what_it_leads_to_is_written(
    writer: str, things: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "there").mkdir()
    target, real = target_of(writer, tmp_path), target_of(writer, tmp_path / "there")
    target.symlink_to(real)
    assert write(writer, things, target, capsys) is None
    assert target.is_symlink()
    if "state" not in writer and "checkpoint=" not in writer:
        assert real.stat().st_size
    assert [p for p in tmp_path.rglob("*") if "partial" in p.name] == []


@pytest.mark.parametrize("writer", [*options(), *FUNCTIONS])
@pytest.mark.parametrize("reader", [False, True])
def test_a_pipe_stays_a_pipe(
    writer: str, reader: bool, things: Path, tmp_path: Path, capsys: Any
) -> None:
    target = target_of(writer, tmp_path)
    os.mkfifo(target)
    got: list[bytes] = []
    if reader:
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK)
        thread = threading.Thread(target=lambda: got.append(_drain(descriptor)), daemon=True)
        os.set_blocking(descriptor, True)
    told = None
    if reader:
        keep = os.open(target, os.O_WRONLY)  # so that the reader does not see the end too early
        thread.start()
        told = write(writer, things, target, capsys)
        os.close(keep)
        thread.join(10)
        assert not thread.is_alive()
    else:
        told = write(writer, things, target, capsys)
    assert stat.S_ISFIFO(target.stat().st_mode)
    if writer in FILES_ONLY or not reader:
        assert told is not None
        assert str(target) in told
        assert "a device or a pipe" in told
    else:
        assert told is None, told
        assert got[0]


def _drain(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


@pytest.fixture
def null(tmp_path: Path) -> Path:
    """A node of the null device that nobody else needs."""
    node = tmp_path / "null.csv"
    try:
        os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        with open(node, "wb"):
            pass
    except OSError:
        pytest.skip("device nodes cannot be made or used here")
    return node


@pytest.mark.parametrize("writer", [*options(), *FUNCTIONS])
def test_the_null_device_stays_itself(
    writer: str, things: Path, tmp_path: Path, null: Path, capsys: Any
) -> None:
    target = target_of(writer, tmp_path)
    if target != null:
        null.rename(target)
    told = write(writer, things, target, capsys)
    assert stat.S_ISCHR(target.stat().st_mode)
    assert (told is not None) == (writer in FILES_ONLY), told


@pytest.mark.parametrize("writer", [*options(), *FUNCTIONS])
@pytest.mark.parametrize("kind", ["folder", "socket", "missing folder", "file for folder"])
def test_what_cannot_be_written_is_refused_by_name_and_stays(
    writer: str, kind: str, things: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    target = target_of(writer, tmp_path)
    if kind == "folder":
        target.mkdir()
        (target / "inside").touch()
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # the names of sockets are short
        socket.socket(socket.AF_UNIX).bind(target.name)
    elif kind == "missing folder":
        target = target_of(writer, tmp_path / "none")
    else:
        (tmp_path / "file").touch()
        target = target_of(writer, tmp_path / "file")
    told = write(writer, things, target, capsys)
    assert told is not None
    assert str(target) in told
    if kind == "folder":
        assert [p.name for p in target.iterdir()] == ["inside"]
    elif kind == "socket":
        assert target.is_socket()
    else:
        assert not (tmp_path / "none").exists()
    assert [p for p in tmp_path.rglob("*") if "partial" in p.name] == []


@pytest.mark.parametrize("how", [">", ">>", "|"])
def test_standard_output_is_written_to_wherever_it_goes(how: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    script = (
        "import sys; from pathlib import Path; from convmixer_fast.files import write_whole; "
        "print('before'); write_whole('/dev/stdout', 'within\\n'); print('after')"
    )
    out = tmp_path / "out"
    out.write_text("old\n")
    command = f'{sys.executable} -c "{script}" {how} {"cat > " if how == "|" else ""}{out}'
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    assert out.read_text() == ("old\n" if how == ">>" else "") + "before\nwithin\nafter\n"
