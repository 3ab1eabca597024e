"""On a cluster of two nodes the rows are those of one machine, also when workers and nodes die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fresh_python
import numpy as np
import photographs
import pytest

from convmixer_fast import ConvMixer, Predictor, cli, save_checkpoint
from convmixer_fast.inference import Preprocessing
from convmixer_fast.testing import trained_like_

ray = pytest.importorskip("ray", reason="ray is not installed")
pytest.importorskip("ray.data", reason="ray[data] is not installed")

from convmixer_fast.inference.ray import PredictorActor, predict_files  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
PREPARE = Preprocessing((3, 32, 32))
IMAGES = 120


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with a core each; each has raylet, object store and workers of its own."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        patch.setenv("RAY_worker_niceness", "0")
        # A dead node is noticed in seconds.
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("RAY_health_check_failure_threshold", "4")
        # Workers look for modules where the driver stood when it joined.
        surroundings = fresh_python.surroundings()
        patch.chdir(surroundings["cwd"])
        if (path := surroundings["env"].get("PYTHONPATH")) is not None:
            patch.setenv("PYTHONPATH", path)
        node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        there = Cluster(initialize_head=True, head_node_args=node)
        try:
            there.add_node(num_cpus=1, object_store_memory=100 * 2**20)
            ray.init(address=there.address, log_to_driver=False, logging_level="ERROR")
            there.wait_for_nodes()
            yield there
        finally:
            ray.shutdown()
            there.shutdown()


@pytest.fixture(scope="module")
def model() -> ConvMixer:
    net = ConvMixer(16, 2, kernel_size=3, patch_size=4, num_classes=7)
    return trained_like_(net, (4, 3, 32, 32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    photographs.write_folder(root, IMAGES)
    return root


@pytest.fixture(scope="module")
def paths(folder) -> list[Path]:
    return sorted(folder.rglob("*.jpg"))


@pytest.fixture(scope="module")
def local(model, paths) -> tuple[list, list]:
    outcomes = list(Predictor(model, preprocessing=PREPARE, batch_size=4).predict_files(paths))
    rows = [row for outcome in outcomes for row in outcome.rows]
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    assert len(rows) + len(failures) == IMAGES
    assert len(failures) == len(photographs.BROKEN)
    return rows, failures


def slow_predictor(model, seen: Path, actors: int) -> Predictor:
    """Takes its time, and leaves the numbers of its node and process in a folder.

    None begins before all have come, or one could do the work of all.
    """

    class Slow:
        channels = 3

        def __init__(self, prepare) -> None:
            self.prepare = prepare

        def __call__(self, image):
            node = ray.get_runtime_context().get_node_id()
            (seen / f"{node}-{os.getpid()}").touch()
            deadline = time.monotonic() + 120
            while len(list(seen.iterdir())) < actors and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.05)
            return self.prepare(image)

    return Predictor(model, preprocessing=Slow(PREPARE), batch_size=4)


def collect(outcomes) -> tuple[list, list]:
    rows, failures = [], []
    for outcome in outcomes:
        rows += outcome.rows
        failures += outcome.failures
    return rows, failures


def test_rows_are_those_of_one_machine_to_the_last_bit(cluster, model, paths, local):
    predictor = Predictor(model, preprocessing=PREPARE, batch_size=3)
    assert collect(predict_files(predictor, paths, actors=2)) == local
    assert list(predict_files(predictor, [])) == []


def test_workers_read_what_urls_lead_to(cluster, model, paths, local):
    predictor = Predictor(model, preprocessing=PREPARE, batch_size=8)
    found = collect(predict_files(predictor, [f"file://{path}" for path in paths], actors=2))
    for there, here in zip(found, local, strict=True):
        names = [one.filename.removeprefix("file://") for one in there]
        assert [a._replace(filename=n) for a, n in zip(there, names, strict=True)] == here


def test_a_killed_worker_loses_and_repeats_nothing(cluster, model, paths, local, tmp_path):
    outcomes = predict_files(slow_predictor(model, tmp_path, 2), paths, actors=2, workers=1)
    first = next(outcomes)
    pids = [int(p.name.split("-")[1]) for p in tmp_path.iterdir()]
    assert pids
    assert os.getpid() not in pids
    os.kill(pids[0], signal.SIGKILL)
    rows, failures = collect(outcomes)
    assert (first.rows + rows, first.failures + failures) == local
    assert len({p.name for p in tmp_path.iterdir()}) > len(pids), "no worker took its place"


@pytest.mark.ray
def test_a_dead_node_loses_and_repeats_nothing(cluster, model, paths, local, tmp_path):
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    outcomes = predict_files(slow_predictor(model, tmp_path, 3), paths, actors=3, workers=1)
    first = next(outcomes)
    assert list(tmp_path.glob(f"{node.node_id}-*")), "the node that is to die has no work in hand"
    cluster.remove_node(node, allow_graceful=False)
    rows, failures = collect(outcomes)
    assert (first.rows + rows, first.failures + failures) == local


@pytest.mark.ray
def test_the_command_line_goes_on_with_ray_where_one_machine_stopped(
    cluster, model, folder, paths, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(folder)  # relative names must be found by workers that stand elsewhere
    save_checkpoint(model, tmp_path / "w.safetensors")
    common = ["--checkpoint", str(tmp_path / "w.safetensors"), "--img-size", "32", "-b", "4",
              "--no-console-results"]  # fmt: skip
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    assert cli.main(["predict", ".", *common, "--results-file", str(one)]) == 0
    some = [str(p.relative_to(folder)) for p in paths[:50]]
    assert cli.main(["predict", *some, *common, "--results-file", str(two)]) == 0
    ray_options = ["--engine", "ray", "--actors", "2", "--resume", "--results-file", str(two)]
    assert cli.main(["predict", ".", *common, *ray_options]) == 0
    assert "were there already" in capsys.readouterr().err
    assert one.read_bytes() == two.read_bytes()
    errors = [p.with_name(f"{p.stem}.errors.csv").read_text() for p in (one, two)]
    assert errors[0] == errors[1]
    assert len(errors[0].splitlines()) == 1 + len(photographs.BROKEN)


@pytest.mark.ray
def test_the_actor_is_a_step_of_a_pipeline_of_ones_own(cluster, model, folder, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        photographs.picture(rng, 40 + i, 30).save(tmp_path / f"{i}.png")
    predictor = Predictor(model, preprocessing=PREPARE, topk=1)
    dataset = ray.data.read_images(str(tmp_path), include_paths=True)
    found = dataset.map_batches(
        PredictorActor, fn_constructor_args=[predictor], concurrency=1, batch_size=4
    )
    rows = {Path(row["path"]).name: row for row in found.take_all()}
    assert sorted(rows) == [f"{i}.png" for i in range(6)]
    for name, row in rows.items():
        expected = predictor(tmp_path / name)
        assert (row["index"], row["label"]) == (expected.indices[0], expected.labels[0])
        assert row["prob"] == np.float32(expected.scores[0])


@pytest.mark.ray
def test_a_worker_that_fails_by_itself_is_one_line(cluster, model, paths):
    class Broken:
        channels = 3

        def __call__(self, image):
            raise KeyError("a bug")

    predictor = Predictor(model, preprocessing=Broken())
    with pytest.raises(RuntimeError, match=r"a Ray worker failed: KeyError: 'a bug'") as caught:
        list(predict_files(predictor, paths[:20], actors=1))
    assert "\n" not in str(caught.value)
