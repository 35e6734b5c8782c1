"""Where metrics and pictures are shown beside the files of a run: TensorBoard, Weights & Biases, MLflow."""

import concurrent.futures
import functools
import importlib.util
import logging
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, TypedDict

import numpy as np

from ard_jax.config import flatten
from ard_jax.errors import UserError, first_line
from ard_jax.files import read_json, write_json

log = logging.getLogger("ard_jax")

NOTES = "loggers.json"
SAMPLES = "samples"  # what pictures are called at a logger
PROJECT = "ard_jax"  # in which the runs of Weights & Biases and MLflow lie
# The module that a logger needs, and how it is called; the extra that brings it.
NEEDED = {
    "tensorboard": ("tensorflow", "TensorFlow", "train"),
    "wandb": ("wandb", "Weights & Biases", "wandb"),
    "mlflow": ("mlflow", "MLflow", "mlflow"),
}


class Notes(TypedDict):
    """What a training keeps of its loggers: the last step that they were given, and their runs' ids by name."""

    given: int
    runs: dict[str, str]


class Writer(Protocol):
    """What writes for a logger, as clu's metric writers do."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Each uint8 (height, width, 3)."""

    def close(self) -> None: ...


def check_loggers(names: Collection[str]) -> None:
    """Raises UserError if what one of them needs is not installed."""
    for name in names:
        module, title, extra = NEEDED[name]
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"run.loggers has {name!r}, which needs {title}, which is not installed: pip install "
                f"'ard_jax[{extra}]', or leave it out and read metrics.jsonl."
            )


class Logger:
    """A writer in a thread of its own, so that the training waits neither for imports nor for a network."""

    def __init__(self, make: Callable[[], Writer]):
        self.thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self.writer = self.thread.submit(make)
        self.last: concurrent.futures.Future = self.writer

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.last = self.thread.submit(lambda: self.writer.result().write_scalars(step, values))

    def show(self, step: int, picture: np.ndarray) -> None:
        """A picture, uint8 (height, width, 3)."""
        self.last = self.thread.submit(lambda: self.writer.result().write_images(step, {SAMPLES: picture}))

    def close(self) -> None:
        """Waits for what is still to be written; raises what writing it raised."""
        self.last.result()
        self.thread.submit(lambda: self.writer.result().close()).result()
        self.thread.shutdown()


def open_loggers(names: Collection[str], directory: pathlib.Path, after: int) -> list[Logger]:
    """The loggers of a training; started again, each goes on with its run.

    Args:
        names: of `NEEDED`.
        directory: of the training, which has TensorBoard's files and, in loggers.json, the ids of the others' runs.
        after: the last step that they have been given, -1 if none. A training that was killed beyond its last
            checkpoint makes later steps again, with the same metrics, and only TensorBoard can replace what it has.

    Raises:
        UserError: a package is not installed, or Weights & Biases or MLflow cannot be reached.
    """
    check_loggers(names)
    opened = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            opened.append(tensorboard(directory))
        else:
            opened.append(Logger(_open(name, directory, _note_given(directory, after))))
    return opened


def _note_given(directory: pathlib.Path, after: int) -> int:
    """The last step that was ever given, kept before metrics.jsonl, which says so, is cut to the checkpoint."""
    noted = _read_notes(directory)
    given = max(after, noted["given"])
    write_json(directory / NOTES, {**noted, "given": given})
    return given


def _read_notes(directory: pathlib.Path) -> Notes:
    path = directory / NOTES
    return read_json(path, Notes) if path.exists() else {"given": -1, "runs": {}}


def tensorboard(directory: pathlib.Path) -> Logger:
    """TensorBoard's files in a folder; TensorFlow takes seconds to import, while XLA compiles the training step."""
    return Logger(lambda: _summary_writer(directory))


def _summary_writer(directory: pathlib.Path) -> Writer:
    """clu's writer of TensorBoard files; this is the only place that imports TensorFlow."""
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # nothing is computed with it, and it would say so at length
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(directory))


def _open(name: str, directory: pathlib.Path, after: int) -> Callable[[], Writer]:
    """What makes the writer of Weights & Biases or MLflow, which is begun here, where a mistake is answered early."""
    try:
        writer = WandB(directory, after) if name == "wandb" else MLflow(directory, after)
        return lambda: writer
    except UserError:
        raise
    except Exception as error:  # of many kinds: no login, no server, no room
        remedy = {
            "wandb": "log in with `wandb login`, or set WANDB_MODE=offline in the environment",
            "mlflow": "set MLFLOW_TRACKING_URI in the environment to a server that answers",
        }[name]
        raise UserError(
            f"run.loggers has {name!r}, which cannot be begun ({first_line(error).rstrip('.')}): {remedy}, or leave it "
            f"out and read metrics.jsonl."
        ) from error


class WandB:
    """Weights & Biases, where the environment says (WANDB_MODE, WANDB_ENTITY, …); its files lie beside the training."""

    def __init__(self, directory: pathlib.Path, after: int):
        import wandb

        self.after = after
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_title(directory),
            id=_run_of(directory, "wandb", lambda: uuid.uuid4().hex),
            resume="allow",
            dir=directory,
            config=_settings(directory),
            allow_val_change=True,  # of settings that may be others when a training goes on
            settings=wandb.Settings(silent=True),
        )

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if step > self.after:
            self.run.log(dict(scalars), step=step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        import wandb

        if step > self.after:
            self.run.log({name: wandb.Image(image) for name, image in images.items()}, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """MLflow, at the place that MLFLOW_TRACKING_URI names."""

    def __init__(self, directory: pathlib.Path, after: int):
        from mlflow.entities import Metric, RunTag
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self.after, self.client, self.metric, self.refusal = after, MlflowClient(), Metric, MlflowException
        self.run = _run_of(directory, "mlflow", lambda: self._begin(directory))
        self.client.set_terminated(self.run, "RUNNING")
        # tags, which may be others when a training goes on; those of MLflow hold at most 5000 characters
        tags = [RunTag(key, str(value)[:5000]) for key, value in flatten(_settings(directory)).items()]
        for start in range(0, len(tags), 100):  # which is what it takes at once
            self.client.log_batch(self.run, tags=tags[start : start + 100])

    def _begin(self, directory: pathlib.Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        return self.client.create_run(experiment, run_name=_title(directory)).info.run_id

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if step > self.after:
            now = int(1000 * time.time())
            metrics = [self.metric(key, value, now, step) for key, value in scalars.items()]
            self._tell(lambda: self.client.log_batch(self.run, metrics=metrics), f"step {step}")

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, image in images.items() if step > self.after else ():
            give = functools.partial(self.client.log_image, self.run, image, key=name, step=step)
            self._tell(give, f"the picture of step {step}")

    def close(self) -> None:
        self._tell(lambda: self.client.set_terminated(self.run), "the end")

    def _tell(self, call: Callable[[], object], what: str) -> None:
        """No training ends because a server does not answer; metrics.jsonl has it all."""
        try:
            call()
        except self.refusal as error:
            log.warning("MLflow did not take %s: %s", what, first_line(error))


def _run_of(directory: pathlib.Path, name: str, begin: Callable[[], str]) -> str:
    """The id of a training's run at a logger, begun if there is none yet."""
    noted = _read_notes(directory)
    if name not in noted["runs"]:
        noted["runs"][name] = begin()
        write_json(directory / NOTES, noted)
    return noted["runs"][name]


def _settings(directory: pathlib.Path) -> dict[str, Any]:
    """The config of a training, {} if there is none beside it."""
    path = directory / "config.json"
    return read_json(path, dict[str, Any]) if path.exists() else {}


def _title(directory: pathlib.Path) -> str:
    """How people know a training: the last words of its path, such as digits/distill/ard."""
    return "/".join(directory.absolute().parts[-3:])
