"""One checkpoint of a training as a finished model, in a workdir of its own, for the stages that take such.

That workdir holds the model's folder with this checkpoint alone, as if the training had ended there, and the other
folders of the run by symbolic links. Files of the checkpoint are hard links: they cost nothing, and stay when the
training deletes its own.
"""

import contextlib
import logging
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import jax
import ml_collections
from jax.sharding import Mesh

from ard_jax.build import make_student, make_teacher
from ard_jax.convert.families.pixart import NULL_CAPTION_FILE
from ard_jax.curve import Line, require_best
from ard_jax.errors import UserError, first_line
from ard_jax.files import require_finite, tree_sha256, whole_folder, write_json
from ard_jax.hosts import wait_for_all
from ard_jax.models import network_shapes
from ard_jax.parallel import is_first, make_mesh, with_shardings
from ard_jax.training.checkpoints import check_sealed, checkpoint_sha256, load_parameters, steps_in
from ard_jax.workdir import recorded_config, teacher_folder

log = logging.getLogger("ard_jax")

# Folders of a run that a model is sampled, measured and exported with.
BESIDE = ("teacher", "captions", "vae")
# What lies beside a model's checkpoints and says what it is.
TOLD = ("config.json", "data.json", "labels.json", "source.json", NULL_CAPTION_FILE)


def model_folder(config: ml_collections.ConfigDict, workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Where a model is trained: "teacher", or a student's name."""
    return teacher_folder(config, workdir) if name == "teacher" else workdir / "distill" / name


def hash_there(folder: pathlib.Path, step: int) -> str | None:
    """`checkpoint_sha256` of a model's folder; None if there is no checkpoint of that step, or no more."""
    with contextlib.suppress(FileNotFoundError):
        if step in steps_in(folder / "checkpoints"):
            return checkpoint_sha256(folder / "checkpoints", step)
    return None


def take_snapshot(
    folder: pathlib.Path, workdir: pathlib.Path, step: int, target: pathlib.Path, mesh: Mesh, *parts: str
) -> None:
    """Makes the workdir `target`, or completes it where one of the same checkpoint was begun.

    Args:
        folder: of the model, as `model_folder` gives it.
        workdir: of the run.
        step: of the checkpoint.
        target: the folder that becomes the snapshot's workdir.
        mesh: that the weights are laid out on to be hashed.
        parts: of the weights that the snapshot is asked for; "ema" if none is given.

    Raises:
        UserError: there is no such checkpoint, its files are not as they were written, or its weights are not finite.
    """
    is_student, own = _place_of(folder, target)
    if is_first():
        _link_model(folder, step, own)
        link_folders(workdir, target, BESIDE)
    wait_for_all("a snapshot has its files")
    if step not in steps_in(own / "checkpoints"):
        there = ", ".join(map(str, steps_in(folder / "checkpoints"))) or "none"
        raise UserError(f"{folder} has no checkpoint {step}: it has {there}, and run.keep_checkpoints=0 keeps all.")
    try:
        check_sealed(own / "checkpoints", step)
    except ValueError as error:
        raise UserError(f"checkpoint {step} of {folder} is damaged ({first_line(error)}): choose another.") from None
    config = recorded_config(own)
    like = with_shardings(network_shapes(make_student(config) if is_student else make_teacher(config)), mesh)
    weights = {part: load_parameters(own / "checkpoints", part, like) for part in parts or ("ema",)}
    hashes = {part: tree_sha256(params, require_finite) for part, params in weights.items()}
    if is_first():
        write_json(own / "done.json", {"sha256": hashes, "seconds": 0.0, "step": step})
    wait_for_all("a snapshot is whole")


def _place_of(folder: pathlib.Path, target: pathlib.Path) -> tuple[bool, pathlib.Path]:
    """Whether a model's folder is a student's, and where it is in a snapshot."""
    is_student = folder.absolute().parent.name == "distill"
    return is_student, target / "distill" / folder.name if is_student else target / "teacher"


def put_back(folder: pathlib.Path, step: int, target: pathlib.Path) -> None:
    """Gives a model's folder the checkpoint of its snapshot again, where the training has deleted it meanwhile."""
    place, (_, own) = folder / "checkpoints" / str(step), _place_of(folder, target)
    if not place.exists():
        with whole_folder(place) as new:
            shutil.copytree(own / "checkpoints" / str(step), new, copy_function=_link, dirs_exist_ok=True)


@contextlib.contextmanager
def at_checkpoint(
    folder: pathlib.Path, workdir: pathlib.Path, checkpoint: str, metric: str, part: str
) -> Iterator[pathlib.Path]:
    """A workdir, for as long as it is wanted, in which a checkpoint is the model's last.

    Args:
        folder, workdir: as `take_snapshot` takes them.
        checkpoint: its step, or "best" by `metric` of those that `watch` measured and that are still there.
        metric: a name in `curve.BETTER`.
        part: of the weights that has to be there beside "ema".

    Raises:
        UserError: there is no such checkpoint, or none is known to be the best.
    """

    def is_there(line: Line) -> bool:
        return hash_there(folder, line["step"]) == line["checkpoint"]

    if checkpoint == "best":
        step = int(require_best(workdir, folder.name, metric, is_there)["step"])
    elif checkpoint.isdecimal():
        step = int(checkpoint)
    else:
        raise UserError(f"--checkpoint is {checkpoint!r}: give a step, or best.")
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=workdir) as view:
        take_snapshot(folder, workdir, step, pathlib.Path(view), make_mesh(devices=jax.local_devices()), "ema", part)
        log.info("%s at step %d.", folder.name, step)
        yield pathlib.Path(view)


def link_folders(workdir: pathlib.Path, target: pathlib.Path, names: Sequence[str]) -> None:
    """Symbolic links in `target` to those folders of a run that are there, but for what `target` has itself.

    Links within the run are relative, so that it can be moved; one that leads elsewhere, such as to where the run was
    before, is made anew.
    """
    run, place = workdir.resolve(), target.resolve()
    for name in names:
        folder, link = run / name, target / name
        is_own = link.exists() and not link.is_symlink()
        if is_own or not folder.exists() or (link.exists() and link.samefile(folder)):
            continue
        new = target / f".partial-{secrets.token_hex(8)}"
        try:
            new.symlink_to(os.path.relpath(folder, place) if place.is_relative_to(run) else folder)
            os.replace(new, link)  # another process may be at it too, and makes the same
        finally:
            new.unlink(missing_ok=True)


def _link_model(folder: pathlib.Path, step: int, own: pathlib.Path) -> None:
    """Makes a model's folder with one checkpoint; without it, where that is gone."""
    checkpoint, hashes = folder / "checkpoints" / str(step), folder / "checksums" / f"{step}.json"
    if own.exists():
        return
    with whole_folder(own) as new, contextlib.suppress(FileNotFoundError, shutil.Error):
        for path in (folder / name for name in TOLD):
            if path.exists():
                shutil.copy2(path, new)
        (new / "checkpoints").mkdir()
        partial = new / "checkpoints" / "partial"
        shutil.copytree(checkpoint, partial, copy_function=_link)
        if hashes.exists():
            (new / "checksums").mkdir()
            shutil.copy2(hashes, new / "checksums")
        partial.rename(new / "checkpoints" / str(step))


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)
