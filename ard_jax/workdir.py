"""A workdir: one folder a stage, its config beside what it made, and `done.json` when it is finished.

teacher/                 config.json, checkpoints/, metrics.jsonl, done.json
trajectories/            config.json, the store (see trajectories/store.py), done.json
distill/ard/             as teacher/; one folder a student, fine-tuned ones too
distill/done.json        of every student that is finished
vae/                     an autoencoder in diffusers' format
captions/                as trajectories/, captions as a text encoder's vectors
latents/                 as trajectories/
sample/ard/              samples.npz, grid.png
evaluate/, report/       results
"""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, NotRequired, TypedDict, TypeVar

import ml_collections
from jax.sharding import Mesh

from ard_jax.build import make_process, make_student, make_teacher
from ard_jax.config import (
    ROWS,
    config_differences,
    default_config,
    flatten,
    keys_that_change,
    plain,
    sections_that_change,
    with_defaults,
)
from ard_jax.convert.vae import open_vae
from ard_jax.data import Identity
from ard_jax.errors import UserError
from ard_jax.files import AGAIN, locked, read_json, require_finite, tree_sha256, write_json
from ard_jax.hosts import check_same_inputs
from ard_jax.models import AutoencoderKL, Backbone, Network, network_shapes
from ard_jax.parallel import is_first, with_shardings
from ard_jax.training.checkpoints import load_parameters
from ard_jax.types import Params, PyTree

log = logging.getLogger("ard_jax")

# The keys on top of a config that what a stage makes depends on.
SECTIONS = {
    stage: sections_that_change(stage)
    for stage in ("captions", "encode", "teacher", "trajectories", "distill", "finetune")
}

# Settings that may differ between two starts of the same run: where things lie, how they are shown, and by which
# devices, in which order, the same numbers are computed.
FREE = keys_that_change("nothing")

# Settings that the meaning of a teacher's weights depends on: not where its data lay or how it is computed.
NETWORK = {key for key, row in ROWS.items() if "network" in row.changes}


def claim(directory: pathlib.Path, config: ml_collections.ConfigDict, stage: str, **inputs: str) -> None:
    """Writes the resolved config into a stage's folder, or compares it with the one that is there; all hosts do it.

    Args:
        directory: the stage's folder.
        config: the config.
        stage: whose folder it is, a key of `SECTIONS`.
        inputs: hashes of what else they depend on, such as the teacher's.

    Raises:
        UserError: the folder belongs to another config, whose first other keys are named; or the hosts' inputs differ.
    """
    check_same_inputs(inputs, directory)  # before there is anything to compare with, too
    path = directory / "config.json"
    now = plain(config) | {"inputs": inputs}
    occupy(directory)
    if path.exists():
        before = read_config(path)
        changed = _changed_later(before, now, stage, directory)
        check_same_config(flatten(before) | changed, now, (*SECTIONS[stage], "inputs"), directory)
        if changed and is_first():
            _note_change(directory, before, now, changed)
    elif is_first():
        write_json(path, now)
        shown = config_differences(plain(default_config()), now).items()
        lines = "".join(f"\n  {key}={value!r}" for key, (_, value) in shown if key.split(".")[0] in SECTIONS[stage])
        log.info("%s, besides the defaults (%s has all):%s", stage, path, lines)


_held = contextlib.ExitStack()
_occupied: set[pathlib.Path] = set()


def occupy(directory: pathlib.Path) -> None:
    """Keeps other processes from working in a folder until `leave_all`, or until this process ends.

    Raises:
        UserError: one is at work there.
    """
    if is_first() and directory not in _occupied:
        _held.enter_context(locked(directory / ".lock"))
        _occupied.add(directory)


def leave_all() -> None:
    """Lets go of all that was occupied."""
    _occupied.clear()
    _held.close()


def keep_identity(directory: pathlib.Path, found: Identity) -> None:
    """Notes in a stage's folder what data it is made of, or compares them with those it was begun with; all hosts do.

    Writes data.json, and labels.json, the names of the classes, where there are any.

    Raises:
        UserError: they are others, or another host's are; the sentence says in what.
    """
    check_same_inputs(found, directory)
    check_identity(directory, found)
    if is_first() and not (directory / "data.json").exists():
        if found["classes"]:
            write_json(directory / "labels.json", found["classes"])
        write_json(directory / "data.json", found)


def check_identity(directory: pathlib.Path, found: Identity) -> None:
    """Raises UserError unless data are those that a stage's folder was made of, as far as that is noted there."""
    data, labels = directory / "data.json", directory / "labels.json"
    before: dict[str, Any] = {"classes": read_json(labels, list[str])} if labels.exists() else {}
    before |= read_json(data, Identity) if data.exists() else {}
    words = {"classes": "classes {}", "records": "{} records", "sha256": "files of hash {:.8}"}
    other = [
        f"{words[key].format(value)} there, {words[key].format(now)} here"
        for key, value in before.items()
        if (now := dict(found)[key]) != value
    ]
    if other:
        raise UserError(
            f"{directory} was made of other data ({'; '.join(other)}): give it those, or choose another --workdir."
        )


def _changed_later(
    before: Mapping[str, Any], now: Mapping[str, Any], stage: str, directory: pathlib.Path
) -> dict[str, Any]:
    """Settings that have changed since a run was begun and may: dotted key → value now."""
    found: dict[str, Any] = {}
    there: Any
    here: Any
    for key, (there, here) in config_differences(before, now).items():
        later = ROWS[key].later if key in ROWS and key.split(".")[0] in SECTIONS[stage] else "never"
        if later == "unfinished" and not (directory / "done.json").exists():
            # with no clipping at all, the optimiser's state is another
            if not key.endswith(".clip") or there and here:
                found[key] = here
        elif later == "larger" and here > there:
            found[key] = here
    return found


def _note_change(
    directory: pathlib.Path, before: Mapping[str, Any], now: Mapping[str, Any], changed: Mapping[str, Any]
) -> None:
    """Says in the log and in config.json what a run goes on with; one that was finished is so no more."""
    steps = [int(path.name) for path in (directory / "checkpoints").glob("*") if path.name.isdecimal()]
    was, step = flatten(before), max(steps, default=0)
    entry = {"after_step": step} | {key: {"before": was[key], "now": value} for key, value in changed.items()}
    for key, value in changed.items():
        log.warning("%s is %s from here on%s; it was %s.", key, value, f" (step {step})" if step else "", was[key])
        schedule = flatten(now).get(f"{key.removesuffix('steps')}optimizer.schedule", "constant")
        if schedule != "constant":
            log.warning("as its rate is %s, this is not what so many steps from the start would be.", schedule)
    (directory / "done.json").unlink(missing_ok=True)
    write_json(directory / "config.json", {**now, "history": [*before.get("history", []), entry]})


def check_same_config(before: dict, now: dict, sections: tuple[str, ...], directory: pathlib.Path) -> None:
    """Raises UserError if two configs differ in some sections, naming the first keys that do."""
    objective = flatten(now).get("distill.objective", "")
    found = [
        f"{key} {there!r} there, {here!r} here"
        for key, (there, here) in config_differences(before, now).items()
        if key.split(".")[0] in sections and not key.startswith(FREE) and not _is_of_another_objective(key, objective)
    ]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{directory} belongs to another config ({'; '.join(found[:3])}{more}): "
            f"use that config, or another --workdir, or move the folder away."
        )


def _is_of_another_objective(key: str, objective: str) -> bool:
    """Whether a setting is an option of a method of distillation that is not the one that is trained."""
    section, *inner = key.split(".")
    return section == "distill" and len(inner) > 1 and inner[0] not in ("optimizer", objective.rpartition(".")[2])


def write_done(directory: pathlib.Path, sha256: dict[str, str], seconds: float, **made: object) -> None:
    """Ends a stage: `done.json` says what it made, with its SHA-256."""
    if is_first():
        write_json(directory / "done.json", {"sha256": sha256, "seconds": round(seconds, 2), **made})
        print(f"done: {directory}", flush=True)


class Made(TypedDict):
    """What a done.json says of one model."""

    sha256: dict[str, str]
    seconds: float
    ema_sha256: NotRequired[str]


class Done(TypedDict):
    """What is read of a done.json."""

    sha256: dict[str, str]
    seconds: NotRequired[float]
    models: NotRequired[dict[str, Made]]


def read_done(directory: pathlib.Path) -> dict[str, Any] | None:
    """A stage's `done.json`, None if it has not been run to its end.

    Raises:
        UserError: the file is damaged.
    """
    path = directory / "done.json"
    return read_json(path, Done) if path.exists() else None


def merge_done(directory: pathlib.Path, made: dict[str, dict[str, Any]]) -> None:
    """Adds to the `done.json` of a stage that makes one thing a model, such as distill.

    Args:
        directory: the stage's folder.
        made: by the model's name, what `write_done` takes: "sha256", "seconds" and more.
    """
    with locked(directory / ".done.lock", wait=True):  # two stages may end at once
        models = (read_done(directory) or {}).get("models", {}) | made
        hashes = {f"{name}/{file}": sha for name in sorted(models) for file, sha in models[name]["sha256"].items()}
        write_done(directory, hashes, sum(model["seconds"] for model in models.values()), models=models)


def teacher_folder(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.teacher.dir) if config.teacher.dir else workdir / "teacher"


def store_folder(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.trajectories.dir) if config.trajectories.dir else workdir / "trajectories"


def captions_folder(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.captions.dir) if config.captions.dir else workdir / "captions"


def vae_folder(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.vae.dir) if config.vae.dir else workdir / "vae"


def require_done(directory: pathlib.Path, stage: str) -> dict[str, Any]:
    """`done.json` of a stage that this one stands on.

    Raises:
        UserError: it has not been run to its end.
    """
    done = read_done(directory)
    if done is None:
        raise UserError(f"{directory} has no done.json: run the stage '{stage}' to its end first, with this config.")
    return done


Model = TypeVar("Model", bound=Network)


class Loaded(NamedTuple, Generic[Model]):
    """A finished model.

    Attributes:
        model: its network.
        params: its averaged parameters, as the mesh has them.
        sha256: of these.
        config: that it was trained with.
    """

    model: Model
    params: Params
    sha256: str
    config: ml_collections.ConfigDict


def load_teacher(config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> Loaded[Backbone]:
    """The trained teacher, its network as this config computes it.

    Raises:
        UserError: it is not there, or the config describes another model.
    """
    directory = teacher_folder(config, workdir)
    hashes = require_done(directory, "teacher")["sha256"]
    before = recorded_config(directory)
    check_same_config(network_settings(before), network_settings(config), ("data", "model", "diffusion"), directory)
    model = make_teacher(config)
    like = with_shardings(network_shapes(model), mesh)
    return Loaded(model, load_weights(directory, like, hashes["ema"]), hashes["ema"], before)


def recorded_config(directory: pathlib.Path) -> ml_collections.ConfigDict:
    """The config that a stage's folder was made with; settings that came later have their defaults."""
    config = default_config()
    config.unlock()
    with config.ignore_type():
        config.update(read_config(directory / "config.json"))
    config.model.attention = "auto"  # that of the device where it was made may not be here
    return config


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """A config.json, `with_defaults`; UserError if it is damaged, or a value is of another kind than this version's."""
    recorded, like = read_json(path, dict[str, Any]), flatten(default_config().to_dict())
    for key, value in flatten(recorded).items():
        of = like.get(key, value)
        number, sequence = isinstance(of, (int, float)), isinstance(of, (tuple, list))
        fits = isinstance(value, (int, float) if number else (tuple, list) if sequence else type(of))
        fits = fits or key in ROWS and ROWS[key].any_type
        if not fits or any(other.startswith(f"{key}.") for other in like):
            raise UserError(f"{path} is damaged ({key} is {value!r}): {AGAIN}.")
    return with_defaults(recorded)


def network_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a config says by `NETWORK`, by section: of the model that its name stands for and of the process it has."""
    process = {"process": config.diffusion.process, **dataclasses.asdict(make_process(config))}
    teacher = make_teacher(config)
    model = {key: getattr(teacher, key) for key in config.model if key != "name" and hasattr(teacher, key)}
    every = {"data": config.data, "model": model, "diffusion": process}
    return {
        section: {key: value for key, value in values.items() if f"{section}.{key}" in NETWORK}
        for section, values in every.items()
    }


def load_student(directory: pathlib.Path, mesh: Mesh) -> Loaded[Network]:
    """A trained student.

    Raises:
        UserError: it is not there.
    """
    hashes = require_done(directory, "distill")["sha256"]
    config = recorded_config(directory)
    model = make_student(config)
    params = load_weights(directory, with_shardings(network_shapes(model), mesh), hashes["ema"])
    return Loaded(model, params, hashes["ema"], config)


def load_vae(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> tuple[AutoencoderKL, Params]:
    """The autoencoder that lies in `vae_folder` in diffusers' format, its parameters as float32.

    Raises:
        UserError: it is not there, cannot be read, or is no autoencoder that can be used.
    """
    directory = vae_folder(config, workdir)
    if not (directory / "config.json").is_file():
        raise UserError(
            f"there is no autoencoder in {directory} (no config.json): put one there with the stage 'convert', or set "
            f"vae.dir to the folder of one in diffusers' format."
        )
    return open_vae(directory)


def find_vae(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> tuple[AutoencoderKL, Params] | None:
    """`load_vae` for networks of latents; None for those of pixels, and where there is none and none is asked for.

    Raises:
        UserError: `vae.dir` has none, there is one that cannot be used, or its latents are not the networks'.
    """
    if config.data.space != "latent" or not (config.vae.dir or vae_folder(config, workdir).exists()):
        return None
    vae, params = load_vae(config, workdir)
    if vae.latent_channels != config.data.channels:
        raise UserError(
            f"the VAE in {vae_folder(config, workdir)} has latents of {vae.latent_channels} channels, but "
            f"data.channels is {config.data.channels}: set vae.dir to the one that the teacher was trained with."
        )
    return vae, params


def load_weights(directory: pathlib.Path, like: PyTree, sha256: str, part: str = "ema") -> Params:
    """A finished training's averaged parameters, or the last step's (part "params"), laid out as `like` says.

    Raises:
        UserError: they cannot be read, or are not those of `done.json`: Orbax does not see a flipped bit.
    """
    params = load_parameters(directory / "checkpoints", part, like)
    if tree_sha256(params, require_finite) != sha256:
        raise UserError(
            f"the weights in {directory} are not those that its done.json names, since files there were altered or "
            f"lost: restore that folder, or move it away and run its stage again."
        )
    return params
