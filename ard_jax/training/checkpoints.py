"""Orbax checkpoints of a training state and its place in the data."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any, TypedDict

import jax
import orbax.checkpoint as ocp

from ard_jax.errors import UserError, first_line
from ard_jax.files import file_sha256, read_json, write_json
from ard_jax.hosts import gather_json, of_first, wait_for_all
from ard_jax.parallel import is_first
from ard_jax.training.state import TrainState
from ard_jax.types import PyTree

log = logging.getLogger("ard_jax")

# The parts of a checkpoint; `params` and `ema` are apart so that other stages read just what they need.
PARTS = ("params", "ema", "optimizer", "position")


class Wanted(TypedDict):
    """What a wanted.json says, beside the folder of checkpoints: steps that whoever measures them needs."""

    steps: list[int]


class _Preserved:
    """Which checkpoints stay: Orbax asks after each that is saved.

    Attributes:
        directory: of the checkpoints.
        keep: how many of the newest; 0 for all.
        every: those whose step is a multiple of this; 0 for none.
    """

    def __init__(self, directory: pathlib.Path, keep: int, every: int):
        self.directory, self.keep, self.every = directory, keep, every

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        steps = [int(checkpoint.step) for checkpoint in checkpoints]
        kept = set(kept_steps(steps, self.keep, self.every)) | self._wanted()
        return [step in kept for step in steps]

    def _wanted(self) -> set[int]:
        """The same on all hosts: the file may change between two looks at it."""
        steps = read_wanted(self.directory.parent) if is_first() else []
        return set(of_first(steps))


def kept_steps(steps: Sequence[int], keep: int, every: int) -> list[int]:
    """Those of rising steps whose checkpoints stay: the newest `keep` (0 for all), and the multiples of `every`."""
    newest = set(steps[-keep:])
    return [step for step in steps if step in newest or every and step % every == 0]


def read_wanted(directory: pathlib.Path) -> list[int]:
    """Steps of a run's folder that somebody needs, who looks on (`write_wanted`); none if the file is damaged."""
    path = directory / "wanted.json"
    with contextlib.suppress(UserError, FileNotFoundError):  # it is another process's, and no reason to stop a training
        return read_json(path, Wanted)["steps"]
    return []


def write_wanted(directory: pathlib.Path, steps: Sequence[int]) -> None:
    """Asks the training in a run's folder not to delete the checkpoints of these steps."""
    wanted = sorted(set(steps))
    if wanted != read_wanted(directory):
        write_json(directory / "wanted.json", {"steps": wanted})


def make_manager(directory: pathlib.Path, keep: int, every: int = 0) -> ocp.CheckpointManager:
    """Keeps the newest `keep` checkpoints in `directory` (0 for all), those of each `every`-th step, and the wanted.

    Saving runs beside the training.
    """
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_Preserved(directory, keep, every),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(directory.absolute(), options=options, item_names=PARTS)


def save(manager: ocp.CheckpointManager, state: TrainState, position: dict[str, Any]) -> None:
    """Saves the state and, as JSON, the position: of the data iterator, and the seconds spent."""
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            ema=ocp.args.StandardSave(state.ema),
            optimizer=ocp.args.StandardSave(_other_state(state)),
            position=ocp.args.JsonSave(position),
        ),
    )


def _other_state(state: TrainState) -> dict[str, Any]:
    """What is kept beside the parameters and their average; of a plain objective no other networks, no memory."""
    rest = state._asdict()
    return {name: rest[name] for name in rest if name not in ("params", "ema") and rest[name] is not None}


def restore(manager: ocp.CheckpointManager, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest checkpoint that can be read, laid out as `like` is, arrays or shapes; None if there is none.

    A checkpoint that cannot be read is reported and set aside, and the one before it is tried.

    Raises:
        UserError: there are checkpoints, and none can be read; or memory ran out.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        try:
            check_sealed(pathlib.Path(manager.directory), step)
            state, position = _restore_together(manager, step, like)
        except UserError:  # which says nothing of the checkpoint
            raise
        except Exception as error:  # of whatever kind, and on all hosts
            log.warning("checkpoint %d cannot be read (%s): going back to the one before.", step, first_line(error))
            continue
        for broken in (other for other in steps if other > step):
            _set_aside(manager, broken)
        return state, position
    if steps:
        raise UserError(
            f"none of the checkpoints in {manager.directory} can be read (steps {steps}): "
            f"restore them from a copy, or start again in another --workdir."
        )
    return None


def _restore_together(manager: ocp.CheckpointManager, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """`restore_step`, which raises on all hosts if it does on one, so that none goes on from another step.

    Raises:
        UserError: memory ran out, on this host maybe alone, which then ends.
        Exception: the checkpoint cannot be read.
    """
    restored, met = None, None
    try:
        restored = restore_step(manager, step, like)
    except Exception as error:  # Orbax, TensorStore and JSON each raise their own
        _check_memory(error, step)
        met = error
    said = _said_by_any(first_line(met) if met else None)
    if met is not None:
        raise met
    if restored is None or said:
        raise ValueError(said)
    return restored


def _said_by_any(said: str | None) -> str | None:
    """What is said on the first host that says anything, on all of them; all of them call it."""
    if jax.process_count() == 1:
        return said
    return next((f"{other} on host {host}" for host, other in enumerate(gather_json(said)) if other), None)


def _check_memory(error: Exception, step: int) -> None:
    """Raises UserError if what ended the reading of a checkpoint says nothing of it: there was no memory for it."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        raise UserError(
            f"memory ran out while checkpoint {step} was read ({first_line(error)}): end what else runs on the "
            f"devices, or split the state over all of them with mesh.data=1 and mesh.fsdp=-1, and run the same again."
        ) from error


def steps_in(directory: pathlib.Path) -> list[int]:
    """Steps of the checkpoints in a folder, rising; none if there is no folder."""
    there = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(path.name) for path in there if path.name.isdecimal())


def sealed_steps(directory: pathlib.Path) -> list[int]:
    """Those of `steps_in` that are known to be whole."""
    return [step for step in steps_in(directory) if _checksums(directory, step).exists()]


def checkpoint_sha256(directory: pathlib.Path, step: int) -> str:
    """Which checkpoint that of a step is: the same step of a run that was begun anew is another.

    Raises:
        UserError: the hashes of its files are damaged.
        FileNotFoundError: it has just been deleted.
    """
    path = _checksums(directory, step)
    hashes = read_json(path, dict[str, str]) if path.exists() else _file_hashes(directory / str(step))
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def seal(directory: pathlib.Path, last: int | None = None) -> None:
    """Notes the hashes of the checkpoints' files, which `restore` compares: Orbax does not see a flipped bit.

    Args:
        directory: of the checkpoints; the hashes go to checksums/ beside it, a file a checkpoint.
        last: the newest step whose checkpoint is whole; None for the newest of all.
    """
    steps = steps_in(directory)
    for path in (directory.parent / "checksums").glob("*.json"):
        if path.stem not in map(str, steps):
            path.unlink(missing_ok=True)
    for step in steps if last is None else [step for step in steps if step <= last]:
        path = _checksums(directory, step)
        if not path.exists():
            with contextlib.suppress(FileNotFoundError):  # it has just been deleted to make room
                write_json(path, _file_hashes(directory / str(step)))


def _checksums(directory: pathlib.Path, step: int | str) -> pathlib.Path:
    return directory.parent / "checksums" / f"{step}.json"


def _file_hashes(folder: pathlib.Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def check_sealed(directory: pathlib.Path, step: int) -> None:
    """Raises ValueError, on all hosts, if files of a checkpoint are not as they were written, or one cannot open them.

    What one host alone met within Orbax, the others would wait for there.
    """
    said: str | None
    try:
        said = _find_altered(directory, step) if is_first() else ""
        if jax.process_count() > 1:
            _open_all(directory / str(step))
    except Exception as error:  # of a disk or of a network
        said = first_line(error)
    if said := _said_by_any(said):
        raise ValueError(said)


def _find_altered(directory: pathlib.Path, step: int) -> str:
    """Which files of a checkpoint have other hashes than are noted of them, in words; "" if none has."""
    path = _checksums(directory, step)
    if not path.exists():
        return ""
    try:
        before = read_json(path, dict[str, str])
    except UserError:  # hashes that are damaged say nothing of the checkpoint
        return ""
    now = _file_hashes(directory / str(step))
    altered = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    return f"{len(altered)} of its files were altered or lost, such as {altered[0]}" if altered else ""


def _open_all(folder: pathlib.Path) -> None:
    """Reads the start of every file under a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                file.read(1)


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    """Takes a checkpoint out of the manager's sight and keeps it: what cannot be read now may be tomorrow."""
    folder = pathlib.Path(manager.directory)
    if is_first():
        target = folder / f"{step}.unreadable"
        while target.exists():
            target = target.with_name(f"{target.name}+")
        os.replace(folder / str(step), target)
        _checksums(folder, step).unlink(missing_ok=True)  # or they would be held against the next one of this step
        log.warning("checkpoint %d is kept as %s.", step, target)
    wait_for_all("checkpoints are set aside")
    manager.reload()


def restore_step(manager: ocp.CheckpointManager, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            ema=ocp.args.StandardRestore(abstract.ema),
            optimizer=ocp.args.StandardRestore(_other_state(abstract)),
            position=ocp.args.JsonRestore(),
        ),
    )
    return TrainState(params=restored.params, ema=restored.ema, **restored.optimizer), restored.position


def load_parameters(directory: pathlib.Path, part: str, like: PyTree) -> PyTree:
    """Reads "params" or "ema" of the newest checkpoint in a folder of checkpoints.

    Args:
        directory: a run's `checkpoints` folder.
        part: "params" or "ema".
        like: pytree of arrays or `jax.ShapeDtypeStruct`s with shardings, giving shapes, types and placement.

    Raises:
        UserError: there is no checkpoint, it does not fit, or memory ran out.
    """
    if not directory.is_dir():
        raise UserError(f"there are no checkpoints in {directory}: run the stage that makes them first.")
    with ocp.CheckpointManager(os.fspath(directory.absolute()), item_names=PARTS) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"there is no whole checkpoint in {directory}: run the stage that makes it first.")
        try:
            return manager.restore(step, args=ocp.args.Composite(**{part: ocp.args.StandardRestore(like)}))[part]
        except Exception as error:
            _check_memory(error, step)
            raise UserError(
                f"checkpoint {step} in {directory} cannot be read as this config's model ({first_line(error)}): "
                f"use the config that it was made with, or make it again."
            ) from None
