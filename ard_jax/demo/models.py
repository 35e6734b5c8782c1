"""The models that a demo shows: those of a workdir, or folders that ARDPipeline opens; opened when first used."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import ml_collections

from ard_jax.build import example_shape
from ard_jax.demo.runner import Runner
from ard_jax.errors import UserError
from ard_jax.files import find_repository
from ard_jax.pipeline import ARDPipeline
from ard_jax.workdir import read_done, recorded_config, teacher_folder

FIRST = ("openmoji-teacher", "openmoji-ard")  # what is shown where nothing is named


@dataclasses.dataclass(frozen=True)
class Model:
    """One model, as far as it is known before its weights are read.

    Attributes:
        name: that no other of the demo has.
        folder: which `ARDPipeline.from_pretrained` opens.
        why_not: a sentence on why it cannot draw, "" if it can.
        steps: S of a student; 0 of a teacher.
        has_history: whether a student sees more of its trajectory than the newest point.
    """

    name: str
    folder: pathlib.Path
    why_not: str = ""
    steps: int = 0
    has_history: bool = False

    @property
    def title(self) -> str:
        return f"Student {self.name}" if self.steps else "Teacher" if self.name == "teacher" else f"Teacher {self.name}"


class Models:
    """All models of a demo, which are told the same things and start from the same noises.

    Attributes:
        every: in the order in which they are shown, teachers first.
    """

    def __init__(self, every: Sequence[Model], pipes: Mapping[str, ARDPipeline] = MappingProxyType({})):
        """Opens the first that can draw, which says what all of them are told.

        Args:
            every: the models.
            pipes: those that are open already, by name.

        Raises:
            UserError: none can, or one that is opened does not go with the first.
        """
        self.every = tuple(sorted(every, key=lambda model: model.steps > 0))
        self._open: dict[str, Runner] = {}
        if not self.usable:
            hint = "; ".join(f"{model.title}: {model.why_not.rstrip('.')}" for model in self.every[:3])
            raise UserError(f"there is no finished model to show{f' ({hint})' if hint else ''}: train one to its end.")
        for model in self.usable:
            if model.name in pipes:
                self._keep(model.name, pipes[model.name])
        self.first = self.open(self.usable[0].name)

    @property
    def usable(self) -> list[Model]:
        """Those that can draw."""
        return [model for model in self.every if not model.why_not]

    @property
    def editors(self) -> list[Model]:
        """The students that can edit a picture: those of two steps and more."""
        return [model for model in self.usable if model.steps > 1]

    def with_history(self, wanted: bool) -> list[str]:
        """Names of the students with history, or of those without, that can draw."""
        return [model.name for model in self.usable if model.steps > 1 and model.has_history == wanted]

    def find(self, name: str) -> Model:
        """A model that can draw, by its name; UserError if there is none."""
        found = [model for model in self.usable if model.name == name]
        if not found:
            raise UserError(f"there is no model {name!r} that can draw: choose one of those that are shown.")
        return found[0]

    def open(self, name: str) -> Runner:
        """A model with its weights.

        Raises:
            UserError: it cannot be opened, it makes latents that nothing decodes, or it does not fit the first one.
        """
        if name not in self._open:
            self._keep(name, ARDPipeline.from_pretrained(self.find(name).folder))
        return self._open[name]

    def _keep(self, name: str, pipe: ARDPipeline) -> None:
        if pipe.image_shape is None:
            raise UserError(f"{name} makes latents, and there is no VAE beside it to decode them: convert one first.")
        if self._open:
            _check_same(next(iter(self._open.values())).pipe, pipe, name)
        self._open[name] = Runner(pipe)


def _check_same(first: ARDPipeline, other: ARDPipeline, name: str) -> None:
    """Raises UserError unless two pipelines can be asked the same."""
    told = [pipe.config.data.num_classes for pipe in (first, other)]
    shapes = [example_shape(pipe.config) for pipe in (first, other)]
    if told[0] != told[1] or shapes[0] != shapes[1]:
        words = [
            f"{f'{classes} classes' if classes else 'captions'} and {'×'.join(map(str, shape))}"
            for classes, shape in zip(told, shapes, strict=True)
        ]
        raise UserError(
            f"{name} is of {words[1]}, but the first model is of {words[0]}: show the two in demos of their own."
        )


# ------------------------------------------------------------------------------------------------- finding them


def find_models(workdir: pathlib.Path | None, folders: Sequence[pathlib.Path] = ()) -> Models:
    """The models of a workdir, or of folders, or the shipped ones.

    Raises:
        UserError: both are given, there are none, or one of the folders cannot be opened.
    """
    if workdir is not None and folders:
        raise UserError("--workdir and --pipeline are both given: a demo shows either, so leave one out.")
    if workdir is not None:
        if not workdir.is_dir():
            raise UserError(f"there is no folder {workdir}: give the workdir of a run, or leave --workdir out.")
        return Models(_in_workdir(workdir))
    if not folders:
        shipped = find_repository() / "pipelines"
        folders = [shipped / name for name in FIRST]
        if not all(folder.is_dir() for folder in folders):
            raise UserError(
                f"the shipped models are not in {shipped}: start this in the folder of the repository, or give "
                f"--pipeline FOLDER or --workdir DIR, such as that of launch/quickstart.sh."
            )
    names = {folder: _name(folder, folders) for folder in folders}
    pipes = {name: ARDPipeline.from_pretrained(folder) for folder, name in names.items()}
    for pipe in pipes.values():  # so that a mistake on the command line is answered there
        if pipe.prompts is not None:
            pipe.prompts.encoder  # noqa: B018 (opens it)
    configs = {name: pipe.config if pipe.is_student else None for name, pipe in pipes.items()}
    return Models([_describe(name, folder, configs[name]) for folder, name in names.items()], pipes)


def _name(folder: pathlib.Path, among: Sequence[pathlib.Path]) -> str:
    """What a folder's model is called: its last word, or the whole path where others end in the same."""
    return folder.name if sum(other.name == folder.name for other in among) == 1 else str(folder)


def _describe(name: str, folder: pathlib.Path, config: ml_collections.ConfigDict | None) -> Model:
    """A model by the config of a student, None for a teacher."""
    if config is None:
        return Model(name, folder)
    steps = len(config.student.points)
    has_history = config.student.mask != "diagonal" and config.student.history_layers > 0
    return Model(name, folder, steps=steps, has_history=has_history)


def _in_workdir(workdir: pathlib.Path) -> list[Model]:
    """The teacher and all students, those that cannot draw with a sentence on why."""
    students = [path.parent for path in sorted((workdir / "distill").glob("*/config.json"))]
    found = [_student(folder) for folder in students]
    teachers = [workdir / "teacher"]
    for folder in students:
        try:
            teachers.append(teacher_folder(recorded_config(folder), workdir))
        except UserError:  # the student says so itself
            continue
    there = [folder for folder in teachers if (folder / "config.json").is_file()]
    return [*(Model("teacher", folder, _why_unfinished(folder, "teacher")) for folder in there[:1]), *found]


def _student(folder: pathlib.Path) -> Model:
    try:
        config = recorded_config(folder)
    except UserError as error:
        return Model(folder.name, folder, str(error), steps=1)
    model = _describe(folder.name, folder, config)
    why_not = _why_unfinished(folder, "distill")
    if config.student.kind != "history":
        why_not = f"it is a student of kind {config.student.kind!r}, which only the stages sample and evaluate run."
    return dataclasses.replace(model, why_not=why_not)


def _why_unfinished(folder: pathlib.Path, stage: str) -> str:
    """Why a folder's model cannot draw yet, "" if it can."""
    try:
        if read_done(folder) is not None:
            return ""
    except UserError as error:
        return str(error)
    steps = [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()]
    where = f"its newest checkpoint is of step {max(steps)}" if steps else "it has no checkpoint yet"
    return f"its training is not finished ({where}): run the stage '{stage}' to its end."
