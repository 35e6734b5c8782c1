"""The one runner of many configs: what has to be run for many students, what of it is there, and what came out.

`compare` and the sweeps say which students there are, run a stage each in their way, and show the results.
"""

import contextlib
import difflib
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import getitem
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from ard_jax.completion import is_complete
from ard_jax.config import ROWS, flatten
from ard_jax.errors import UserError
from ard_jax.files import atomic_write, read_npz, write_json

TEACHER = "teacher"


class Place(NamedTuple):
    """A workdir, and what its stages are given.

    Attributes:
        workdir: a path, or gs://… of what is only printed.
        config: resolved.
        settings: by dotted key, those that were given on the command line for it.
    """

    workdir: str
    config: ml_collections.ConfigDict
    settings: Mapping[str, Any] = {}

    @property
    def path(self) -> pathlib.Path:
        """The workdir, where it can be read here."""
        return pathlib.Path(self.workdir)

    def with_settings(self, settings: Mapping[str, Any]) -> "Place":
        """The same with other values of some settings, by dotted key."""
        return self._replace(config=with_settings(self.config, settings), settings={**self.settings, **settings})


class Entry(NamedTuple):
    """One student among many.

    Attributes:
        name: of its folder under distill/, such as "ard_4".
        stage: the stage that trains it.
        trained: where that is run, and with what; samples and results lie in the same workdir.
        home, captions, teacher, store: where it is sampled and measured, and where its captions, its teacher and its
            trajectories are made.
        method: that `compare` has it of; its key in `compare.methods`.
        title: of the method, on the page.
        shown: whether it is measured; others are only started from.
    """

    name: str
    stage: str
    trained: Place
    home: Place
    captions: Place
    teacher: Place
    store: Place
    method: str = ""
    title: str = ""
    shown: bool = True

    @property
    def config(self) -> ml_collections.ConfigDict:
        """What the stage that trains it is given."""
        return self.trained.config

    @property
    def steps(self) -> int:
        """S."""
        return len(self.config.student.points)

    @property
    def start(self) -> str:
        """Name of the student that it starts from; "" for what its stage starts from by itself."""
        return self.config[self.stage].start


class Job(NamedTuple):
    """A stage to be run.

    Attributes:
        stage: its name.
        place: where, and with what.
        models: that are made, drawn or measured by it.
    """

    stage: str
    place: Place
    models: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------------- running


def jobs_of(entries: Iterable[Entry]) -> list[Job]:
    """All that the entries need, in an order in which it can be run, none twice. What has a `dir` is not made."""
    jobs: list[Job] = []
    measured: dict[str, tuple[Place, list[str]]] = {}
    for entry in entries:
        if not entry.captions.config.data.num_classes and not entry.captions.config.captions.dir:
            jobs.append(Job("captions", entry.captions, ()))
        if not entry.teacher.config.teacher.dir:
            jobs.append(Job("teacher", entry.teacher, (TEACHER,)))
        if not entry.store.config.trajectories.dir:
            jobs.append(Job("trajectories", entry.store, ()))
        jobs.append(Job(entry.stage, entry.trained, (entry.name,)))
        if entry.shown:
            drawn = () if entry.home.config.evaluate.draw else (TEACHER, entry.name)
            for name in drawn:  # one by one, or what is drawn would be drawn again with what is not
                jobs.append(Job("sample", entry.home.with_settings({"sample.models": (name,)}), (name,)))
            measured.setdefault(entry.home.workdir, (entry.home, [TEACHER]))[1].append(entry.name)
    for home, names in measured.values():
        drawing = home.config.evaluate.draw  # then it has no samples to tell it which models there are
        place = home.with_settings({"sample.models": tuple(names)}) if drawing else home
        jobs.append(Job("evaluate", place, tuple(names)))
    unique: dict[tuple, Job] = {}
    for job in jobs:
        unique.setdefault((job.stage, job.place.workdir, job.models), job)
    return list(unique.values())


def is_finished(job: Job) -> bool:
    """Whether what a stage would make is there; UserError if it was made otherwise."""
    models = job.models if job.stage == "evaluate" else ()
    return is_complete(job.stage, job.place.config, job.place.path, models)


def run_missing(jobs: Iterable[Job], run: Callable[[Job], None], finished: Callable[[Job], bool] = is_finished) -> None:
    """Runs, in their order, the stages whose work is not there; `finished` says whether it is."""
    for job in jobs:
        if not finished(job):
            run(job)


# ------------------------------------------------------------------------------------------------------------- results


def pictures_of(place: Place) -> dict[str, np.ndarray]:
    """What the models of a workdir make, as `report.page.build_report` takes it."""
    return read_npz(place.path / "evaluate" / "pictures.npz")


def write_page(folder: pathlib.Path, name: str, results: Mapping[str, Any], table: str, page: str) -> tuple[str, ...]:
    """Writes the results as JSON under a name, table.md and index.html; returns the three names."""
    write_json(folder / name, results)
    texts = {"table.md": table, "index.html": page}
    for file, text in texts.items():
        atomic_write(folder / file, functools.partial(pathlib.Path.write_text, data=text, encoding="utf-8"))
    return name, *texts


# ------------------------------------------------------------------------------------------------------------- configs


@contextlib.contextmanager
def prefix_errors(what: str) -> Iterator[None]:
    """Puts the name of what is wrong before a UserError's sentence."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def with_settings(config: ml_collections.ConfigDict, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A copy of a config with some settings changed.

    Args:
        config: the config.
        changes: new values, nested as the config is, or by dotted keys.

    Raises:
        UserError: there is no such setting, or it has another type.
    """
    copy = config.copy_and_resolve_references()
    known = flatten(copy.to_dict())
    for key, value in flatten(changes).items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}" if close else "ard_jax/config.py lists the settings"
            raise UserError(f"there is no setting {key!r}: {hint}.")
        *path, last = key.split(".")
        section = functools.reduce(getitem, path, copy)
        try:
            # what a config names itself, such as a method's steps, has no row
            with copy.ignore_type() if key in ROWS and ROWS[key].any_type else contextlib.nullcontext():
                section[last] = value
        except TypeError:
            raise UserError(f"{key} is {value!r}, which is no {type(known[key]).__name__}: give one.") from None
    return copy
