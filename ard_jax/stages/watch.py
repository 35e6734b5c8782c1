"""Measures the checkpoints of a run as they appear, beside the training, in a process or on a pod of its own.

Samples every checkpoint of the models of `sample.models` with the stage `sample` and measures it with the stage
`evaluate`, each once (with `evaluate.draw` in that stage alone, which keeps no samples), and writes in `evaluate/`:
`curve.jsonl`, a line a checkpoint and model; `curve.html`, their Fréchet distances over the steps of the training,
which `report` shows too; and TensorBoard's files, in `tensorboard/`, if `run.loggers` has it. Looks for new checkpoints
every `run.poll` seconds and takes those that are whole, the oldest first; ends when the trainings have ended and all
their checkpoints are measured, or with --once when all that are there are. Killed and started again, it goes on where
it was.

While it looks on, a training keeps the checkpoints that are still to be measured, and the best by `run.keep_best`,
whatever `run.keep_checkpoints` says. `export --checkpoint best` takes that one.
"""

import contextlib
import importlib
import io
import logging
import pathlib
import shutil
import time
from collections.abc import Iterable
from typing import NamedTuple

import ml_collections

from ard_jax.build import make_run_mesh
from ard_jax.config import other_settings, plain
from ard_jax.curve import BETTER, Line, add_line, best_line, curve_path, line_of, read_curve
from ard_jax.errors import UserError
from ard_jax.files import write_json, write_text
from ard_jax.hosts import of_first, wait_for_all
from ard_jax.parallel import is_first
from ard_jax.report import build_curve
from ard_jax.results import read_results
from ard_jax.runner import TEACHER, Job, Place, run_missing, with_settings
from ard_jax.sampled import SAMPLED
from ard_jax.snapshots import hash_there, model_folder, put_back, take_snapshot
from ard_jax.training.checkpoints import read_wanted, sealed_steps, steps_in, write_wanted
from ard_jax.training.loggers import Logger, check_loggers, tensorboard
from ard_jax.workdir import leave_all, occupy, read_config, read_done

log = logging.getLogger("ard_jax")


class Checkpoint(NamedTuple):
    """A checkpoint of a model: its step, and the hash of its files' hashes."""

    model: str
    step: int
    sha256: str


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path, once: bool) -> None:
    """Looks on.

    Raises:
        UserError: the curve was measured with other settings, or what `sample` and `evaluate` raise; with `once`, there
            is no checkpoint at all.
    """
    check_loggers([name for name in config.run.loggers if name == "tensorboard"])  # the one that a curve is given to
    home = workdir / "evaluate" / "watch"
    occupy(home)
    _claim_settings(home, config)
    watcher = Watcher(config, workdir, home)
    try:
        while True:
            ended, todo = watcher.look()
            if todo:
                watcher.measure(todo[0])
            elif ended or once:
                break
            else:
                time.sleep(config.run.poll)
    finally:
        watcher.close()
    if is_first():
        if not read_curve(workdir):
            names = " or ".join(config.sample.models)
            raise UserError(f"there is no whole checkpoint of {names} in {workdir}: train first, or leave --once out.")
        print(f"done: {curve_path(workdir)}", flush=True)


def _claim_settings(home: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Notes the settings that a curve is measured with; UserError if it was begun with others."""
    path = home / "config.json"
    other = other_settings(read_config(path), config, (*SAMPLED, "evaluate.")) if path.exists() else []
    if other:
        raise UserError(
            f"{home} holds what was measured with other settings ({'; '.join(other[:3])}): use those, or move it and "
            f"{curve_path(home.parent.parent)} away."
        )
    if is_first():
        write_json(path, plain(config))


class Watcher:
    """What has been measured of a run's checkpoints, and what is to be.

    Attributes:
        config, workdir: of the run.
        home: folder of the snapshots that are measured.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path, home: pathlib.Path):
        self.config, self.workdir, self.home = config, workdir, home
        self.mesh = make_run_mesh(config)
        self.lines = read_curve(workdir)
        self.hashes: dict[tuple[pathlib.Path, int], str] = {}  # of checkpoints that have no hashes on the disk
        self.passed_over: set[Checkpoint] = set()
        boards = "tensorboard" in config.run.loggers and is_first()
        self.boards = TensorBoards(workdir / "evaluate" / "tensorboard") if boards else None
        self._show(self.lines)

    def look(self) -> tuple[bool, list[Checkpoint]]:
        """Whether all trainings have ended, and the whole checkpoints that are to be measured; the same on all hosts.

        Asks the trainings to keep these, and the best.
        """
        found = [self._look_at(name) for name in self.config.sample.models] if is_first() else []
        looked = of_first(found)
        todo = [Checkpoint(*checkpoint) for _, own in looked for checkpoint in own]
        return all(ended for ended, _ in looked), todo

    def _look_at(self, name: str) -> tuple[bool, list[Checkpoint]]:
        folder = model_folder(self.config, self.workdir, name)
        ended = read_done(folder) is not None  # before its checkpoints are listed, since no more come then
        steps = (steps_in if ended else sealed_steps)(folder / "checkpoints")
        there = [Checkpoint(name, step, sha) for step in steps if (sha := self._hash(folder, step))]
        measured = {Checkpoint(line["model"], line["step"], line["checkpoint"]) for line in self.lines}
        todo = [checkpoint for checkpoint in there if checkpoint not in measured | self.passed_over]
        if self._is_ours(folder):
            write_wanted(folder, [checkpoint.step for checkpoint in todo] + self._best(name))
        return ended, todo

    def _hash(self, folder: pathlib.Path, step: int) -> str | None:
        """`hash_there`, which of a checkpoint that has no hashes on the disk reads all files, and that just once."""
        checkpoints = folder / "checkpoints"
        if step in sealed_steps(checkpoints) or step not in steps_in(checkpoints):
            return hash_there(folder, step)
        if (folder, step) not in self.hashes and (found := hash_there(folder, step)):
            self.hashes[folder, step] = found
        return self.hashes.get((folder, step))

    def measure(self, checkpoint: Checkpoint) -> None:
        """Samples and evaluates one, and adds its line to the curve; one that cannot be read is passed over."""
        name, step, sha256 = checkpoint
        log.info("%s at step %d:", name, step)
        view = self.home / f"{name}-{step}-{sha256[:12]}"
        try:
            take_snapshot(model_folder(self.config, self.workdir, name), self.workdir, step, view, self.mesh)
        except UserError as error:
            log.warning("%s at step %d is passed over: %s", name, step, error)
            self.passed_over.add(checkpoint)
        else:
            changes = {"sample.models": (name,)} | ({"teacher.dir": ""} if name == TEACHER else {})
            place = Place(str(view), with_settings(self.config, changes))
            stages = ("evaluate",) if self.config.evaluate.draw else ("sample", "evaluate")
            run_missing([Job(stage, place, (name,)) for stage in stages], _run_stage)
            if is_first():
                self.lines = add_line(self.workdir, line_of(read_results(view), name, step, sha256))
                self._show(line for line in self.lines if (line["model"], line["step"]) == (name, step))
                self._keep_best(checkpoint, view)
        leave_all()  # the snapshot, but not this run
        occupy(self.home)
        if is_first():
            shutil.rmtree(view, ignore_errors=True)

    def _keep_best(self, checkpoint: Checkpoint, view: pathlib.Path) -> None:
        """Sees that the best is there: the training may have chosen to delete it just before it was asked not to."""
        name, step, _ = checkpoint
        folder, best = model_folder(self.config, self.workdir, name), self._best(name, checkpoint)
        if best == [step] and self._is_ours(folder):
            write_wanted(folder, [*read_wanted(folder), step])
            put_back(folder, step, view)

    def _best(self, name: str, at_hand: Checkpoint | None = None) -> list[int]:
        """The step of a model's best checkpoint, of those measured that are still there, or `at_hand`; if any is."""
        folder = model_folder(self.config, self.workdir, name)

        def is_there(line: Line) -> bool:
            measured = Checkpoint(line["model"], line["step"], line["checkpoint"])
            return measured == at_hand or self._hash(folder, measured.step) == measured.sha256

        best = best_line(self.lines, name, self.config.run.keep_best, is_there)
        return [best["step"]] if best else []

    def _is_ours(self, folder: pathlib.Path) -> bool:
        """Whether a model's folder is one of this run's."""
        return (folder / "config.json").exists() and self.workdir in folder.parents

    def _show(self, new: Iterable[Line]) -> None:
        """Writes the page, and to TensorBoard what is new."""
        if self.lines and is_first():
            title = f"{self.config.report.title}: checkpoints"
            write_text(self.workdir / "evaluate" / "curve.html", build_curve(title, self.lines))
        if self.boards:
            for line in new:
                self.boards.write(line)

    def close(self) -> None:
        if self.boards:
            self.boards.close()


def _run_stage(job: Job) -> None:
    """Runs a stage on a snapshot, as the command line does, but for saying where its results lie: they are moved."""
    more = [job.models] if job.stage == "evaluate" else []
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(f"ard_jax.stages.{job.stage}").run(job.place.config, job.place.path, *more)
    wait_for_all("a stage has written what it made")  # which the next one reads


class TensorBoards:
    """TensorBoard's files of a curve, a folder a model; written anew by each start, so that nothing is there twice."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.writers: dict[str, Logger] = {}
        shutil.rmtree(folder, ignore_errors=True)

    def write(self, line: Line) -> None:
        name = line["model"]
        if name not in self.writers:
            self.writers[name] = tensorboard(self.folder / name)
        self.writers[name].write(line["step"], {key: line[key] for key in BETTER if line.get(key) is not None})

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
