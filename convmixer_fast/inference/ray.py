"""Prediction on a cluster: copies of the Predictor in an actor pool of Ray Data.

Needs ``pip install 'convmixer_fast[ray]'``, and images that every machine reaches under the same
name. As a step of a user's pipeline::

    ds = ray.data.read_images("photos/", include_paths=True)
    ds = ds.map_batches(PredictorActor, fn_constructor_args=[predictor], concurrency=2)
    ds.write_parquet("predictions/")

(`ray.data.read_images` stops at the first damaged image, and `predict_files` does not.)
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .predictor import Arrays, Outcome, Predictor
from .remote import located
from .results import Failure, Row

try:
    import ray
    import ray.data
except ImportError as error:
    raise ImportError("the ray engine needs Ray: pip install 'convmixer_fast[ray]'") from error

#: A task has the files of a few batches, because the actor reads ahead within a task; more files
#: if the number of tasks would otherwise exceed what Ray schedules without delay.
BATCHES_PER_TASK, MOST_TASKS = 4, 4000


class PredictorActor:
    """A Predictor's copy in one of Ray's worker processes, for `Dataset.map_batches`."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def __call__(self, batch: Arrays) -> Arrays:
        """See `Predictor`: a dict of arrays, with ``"image"`` or ``"path"``."""
        answer: Arrays = self.predictor(batch)
        return answer


class _FileActor(PredictorActor):
    """Pickled lists in and out, so that names and rows are those of a run on one machine."""

    def __init__(self, boxed: list[Any], folder: str, workers: int) -> None:
        # Ray does not resolve a reference inside a list, so that the actor that replaces a dead one
        # can fetch it again.
        super().__init__(ray.get(boxed[0]))
        self.folder, self.workers = folder, workers

    def __call__(self, batch: Arrays) -> Any:
        return {"outcome": [pickle.dumps(self._look(pickle.loads(t))) for t in batch["names"]]}

    def _look(self, names: list[str]) -> tuple[list[Row], list[Failure]]:
        places = {str(located(name, self.folder)): name for name in names}
        rows: list[Row] = []
        failures: list[Failure] = []
        for outcome in self.predictor.predict_files(list(places), self.workers):
            rows += [row._replace(filename=places[row.filename]) for row in outcome.rows]
            failures += [f._replace(filename=places[f.filename]) for f in outcome.failures]
        return rows, failures


def predict_files(
    predictor: Predictor,
    paths: Sequence[str | os.PathLike[str]],
    *,
    actors: int | None = None,
    workers: int = 2,
    address: str | None = None,
    cpus_per_actor: float = 1,
    gpus_per_actor: float | None = None,
) -> Iterator[Outcome]:
    """`Predictor.predict_files` on a cluster: the same rows and failures, in the same order.

    A worker or machine that dies is replaced and its task repeated; every file is reported once.
    The caller's process collects all rows.

    Args:
        actors: copies of the model, at most; default: as many as the cluster has room for.
        workers: threads that read ahead, in each actor.
        address: of a running cluster; default: the one this process is connected to, else the
            one ``RAY_ADDRESS`` names, else one on this machine, stopped at the end.
        cpus_per_actor: cores an actor is given (and threads: Ray sets ``OMP_NUM_THREADS``).
        gpus_per_actor: GPUs; default: 1 where the predictor is on one, else none.

    Raises:
        RuntimeError: an actor fails with an error of its own.
        ConnectionError: there is no cluster at that address.
    """
    names = [str(path) for path in paths]
    if not names:
        return
    started = not ray.is_initialized()
    if started:
        # Silences the log of Ray's C++ core, which is for Ray's developers.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        options: dict[str, Any] = {"address": address} if address else {}
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    try:
        if gpus_per_actor is None:
            gpus_per_actor = 1 if predictor.device.type == "cuda" else 0
        resources = {"num_cpus": cpus_per_actor, "num_gpus": gpus_per_actor}
        yield from _collect(_dataset(predictor, names, actors, workers, resources))
    finally:
        if started:
            ray.shutdown()


def _dataset(
    predictor: Predictor,
    names: list[str],
    actors: int | None,
    workers: int,
    resources: dict[str, Any],
) -> Any:
    if actors is None:
        there = ray.cluster_resources()
        wanted = (("CPU", resources["num_cpus"]), ("GPU", resources["num_gpus"]))
        actors = min(int(there.get(name, 0) // each) for name, each in wanted if each)
    # Several tasks an actor, so that no actor is left with a long last one.
    most = BATCHES_PER_TASK * predictor.images_at_once
    size = min(most, -(-len(names) // (4 * max(1, actors))))
    size = max(1, size, len(names) // MOST_TASKS)
    tasks = [pickle.dumps(names[i : i + size]) for i in range(0, len(names), size)]
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    # The command shows progress in images itself; rows keep the order of the files.
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    before = ray.data.DataContext.get_current()
    ray.data.DataContext._set_current(context)
    try:
        items = ray.data.from_items([{"names": t} for t in tasks], override_num_blocks=len(tasks))
        return items.map_batches(
            _FileActor,
            batch_size=1,
            fn_constructor_args=([ray.put(predictor)], os.getcwd(), workers),
            # One actor is enough to continue if a machine is lost.
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                initial_size=max(1, actors),
                max_size=max(1, actors),
                max_tasks_in_flight_per_actor=2,
            ),
            **resources,
        )
    finally:
        ray.data.DataContext._set_current(before)


def _collect(dataset: Any) -> Iterator[Outcome]:
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
            for pickled in batch["outcome"]:
                rows, failures = pickle.loads(pickled)
                yield Outcome(rows, failures, 0.0)
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"a Ray worker failed: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """One line of Ray's message, which holds the traceback of another process: its first error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b: ", line)]
    return (causes or lines or [type(error).__name__])[0]
