"""Metrics beside metrics.jsonl: every step once, in one run, over all starts of a training."""

import importlib.util
import itertools
import pathlib
import re
import shlex
import struct
import time
import types

import pytest
from pipeline_fixtures import ROOT, run, sentence, smoke
from test_training import at_step, fit, lines, quick_peak, terminate  # noqa: F401 (fixtures)

from ard_jax.errors import Preempted, UserError
from ard_jax.files import read_json, tree_sha256
from ard_jax.training import loggers, loop
from ard_jax.training.loggers import WandB, open_loggers

BLOCK = 2**15
STEPS = [2, 3, 4, 6, 8, 9, 10, 12]  # that a training of `test_training` reports


def needs(module: str):
    """Of a test that CI runs in its second round, which has the extras."""
    reason = f"needs {module}: pip install -e '.[{module}]'"
    skip = pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=reason)
    return lambda test: pytest.mark.slow(skip(test))


@pytest.fixture
def offline_wandb(monkeypatch):
    """Its clock goes a second a reading, since it names the folder of a start by the second."""
    from wandb.sdk import wandb_init

    readings = itertools.count()
    clock = vars(time) | {"time": lambda: time.time() + next(readings)}
    monkeypatch.setattr(wandb_init, "time", types.SimpleNamespace(**clock))
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def mlflow_files(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlflow'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def logged(path: pathlib.Path) -> list[bytes]:
    """The records of a file of Weights & Biases: a header of 7 bytes, then LevelDB's log format."""
    data, at, found, record = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left  # which is filled with zeros
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)  # after the checksum
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            found.append(record)
            record = b""
    return found


def wandb_history(directory):
    """(id, [(step, loss)]) of every start, as their files have it."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process may still be writing the end of a run that is finished
    found = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        histories = [record.history for record in map(Record.FromString, logged(path)) if record.HasField("history")]
        rows = [{"".join(item.nested_key) or item.key: item.value_json for item in one.item} for one in histories]
        steps = [(int(row["_step"]), float(row["loss"])) for row in rows]
        found.append((path.stem.removeprefix("run-"), steps))
    return found


def mlflow_history(run):
    from mlflow.tracking import MlflowClient

    return [(metric.step, metric.value) for metric in MlflowClient().get_metric_history(run, "loss")]


def losses(directory):
    return [(line["step"], line["loss"]) for line in lines(directory)]


def run_in_three(directory, at_step, names):  # noqa: F811
    """Saved and stopped after step 4; broken off in 12, so that 9's checkpoint is the last; then to the end."""

    def fail():
        raise RuntimeError("the power is gone")

    at_step(4, terminate)
    with pytest.raises(Preempted):
        fit(directory, loggers=names)
    at_step(4, lambda: None)
    at_step(12, fail)
    with pytest.raises(RuntimeError):
        fit(directory, loggers=names)
    at_step(12, lambda: None)
    return fit(directory, loggers=names).state


@needs("wandb")
def test_wandb_has_every_step_once_in_one_run(offline_wandb, at_step, tmp_path):  # noqa: F811
    run_in_three(tmp_path, at_step, ("wandb",))
    starts = wandb_history(tmp_path)
    assert {run for run, _ in starts} == {read_json(tmp_path / "loggers.json")["runs"]["wandb"]} and len(starts) == 3
    assert [step for step, _ in losses(tmp_path)] == STEPS
    assert [row for _, steps in starts for row in steps] == losses(tmp_path)


@needs("wandb")
def test_the_command_of_the_page(offline_wandb, tmp_path):
    (line,) = re.findall(r"^python -m ard_jax (.*)$", (ROOT / "docs" / "LOGGERS.md").read_text(), re.MULTILINE)
    words = shlex.split(line.replace(" runs/smoke", f" {tmp_path}"))
    outcome = run(*words)
    assert outcome.status == 0, outcome.err
    ((_, steps),) = wandb_history(tmp_path / "teacher")
    assert steps == losses(tmp_path / "teacher") and list((tmp_path / "teacher").glob("events.out*"))


@needs("mlflow")
def test_mlflow_has_every_step_once_in_one_run(mlflow_files, at_step, tmp_path):  # noqa: F811
    run_in_three(tmp_path, at_step, ("mlflow",))
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("ard_jax").experiment_id])
    assert run.info.run_id == read_json(tmp_path / "loggers.json")["runs"]["mlflow"]
    assert run.info.status == "FINISHED" and [step for step, _ in losses(tmp_path)] == STEPS
    assert mlflow_history(run.info.run_id) == losses(tmp_path)


@needs("mlflow")
def test_a_second_break_before_the_lost_steps_are_made_again(mlflow_files, tmp_path):
    """What was given is known even when metrics.jsonl has been cut."""
    for after, steps in ((0, (2, 4)), (4, ()), (2, (4, 6))):
        (logger,) = open_loggers(("mlflow",), tmp_path, after)
        for step in steps:
            logger.write(step, {"loss": float(step)})
        logger.close()
    assert mlflow_history(read_json(tmp_path / "loggers.json")["runs"]["mlflow"]) == [(2, 2.0), (4, 4.0), (6, 6.0)]


@needs("wandb")
@needs("mlflow")
def test_loggers_change_nothing_of_what_is_trained(offline_wandb, mlflow_files, tmp_path):
    alone, shown = fit(tmp_path / "alone"), fit(tmp_path / "shown", loggers=("wandb", "mlflow"))
    assert tree_sha256(alone.state.params) == tree_sha256(shown.state.params)
    assert losses(tmp_path / "alone") == losses(tmp_path / "shown")


@needs("mlflow")
def test_a_server_that_stops_answering_ends_no_training(mlflow_files, at_step, tmp_path, caplog):  # noqa: F811
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    def refuse(*_, **__):
        raise MlflowException("no answer")

    with pytest.MonkeyPatch.context() as patch:
        at_step(5, lambda: patch.setattr(MlflowClient, "log_batch", refuse))
        fit(tmp_path, loggers=("mlflow",))
    assert [step for step, _ in losses(tmp_path)] == STEPS
    assert "MLflow did not take step 12: no answer" in caplog.text


@needs("mlflow")
def test_a_place_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    with pytest.raises(UserError, match=r"^run.loggers has 'mlflow', which cannot be begun \(.*\): set MLFLOW_TRACK"):
        fit(tmp_path, loggers=("mlflow",))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_only_the_first_host_logs(monkeypatch, tmp_path):
    """One that is told it is another opens nothing."""
    begun = []
    monkeypatch.setattr(loop, "is_first", lambda: False)
    monkeypatch.setattr(loggers, "check_loggers", lambda names: begun.append(names))
    fit(tmp_path, loggers=("tensorboard",), steps=1)
    assert not begun and not list(tmp_path.glob("events.out*"))


@pytest.mark.parametrize(("name", "said"), [("wandb", "Weights & Biases"), ("mlflow", "MLflow")])
def test_a_logger_that_is_not_installed(monkeypatch, tmp_path, name, said):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *more: None if module == name else find(module))
    refused = sentence(smoke("teacher", tmp_path, f"run.loggers=('{name}',)"), "teacher", last=True)
    assert refused == (
        f"ard_jax teacher: run.loggers has '{name}', which needs {said}, which is not installed: "
        f"pip install 'ard_jax[{name}]', or leave it out and read metrics.jsonl."
    )


def test_a_logger_that_there_is_not(tmp_path):
    refused = sentence(smoke("teacher", tmp_path, "run.loggers=('comet',)"), "teacher")
    assert "run.loggers is ('comet',): give some of ('tensorboard', 'wandb', 'mlflow') as a tuple, or ()" in refused


@needs("wandb")
def test_the_settings_are_shown_with_the_metrics(offline_wandb, tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 3, "model": {"depth": 2}}')
    writer = WandB(tmp_path, 0)
    assert (writer.run.config["seed"], writer.run.config["model"]) == (3, {"depth": 2})
    writer.close()
