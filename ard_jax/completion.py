"""Whether a stage has been run to its end, with these settings and from its inputs as they are now.

For `compare` and the sweeps, which run many stages and only what is missing.
"""

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from ard_jax.captions.conditions import inputs_of
from ard_jax.captions.store import open_captions
from ard_jax.config import config_differences, keys_that_change, plain, with_defaults
from ard_jax.methods import finetuned_config
from ard_jax.results import Measured, read_results
from ard_jax.sampled import are_drawn, drawn_otherwise
from ard_jax.trajectories.store import read_manifest, store_hash
from ard_jax.workdir import (
    SECTIONS,
    captions_folder,
    check_same_config,
    read_config,
    read_done,
    recorded_config,
    require_done,
    store_folder,
    teacher_folder,
    vae_folder,
)

# Settings by which the measurements of samples come out the same.
MEASURED = keys_that_change("evaluate")


def is_complete(
    stage: str, config: ml_collections.ConfigDict, workdir: pathlib.Path, models: Collection[str] = ()
) -> bool:
    """Whether what a stage makes is there.

    Args:
        stage: "captions", "teacher", "trajectories", "distill", "finetune", "sample" or "evaluate".
        config, workdir: that the stage would be given.
        models: that "evaluate" is to measure; () for all that have been sampled.

    Raises:
        UserError: what a stage that trains or solves makes is there, but made with other settings or from other inputs;
            or what it stands on is not there.
    """
    if stage == "sample":
        return all(_is_sampled(config, workdir, name) for name in config.sample.models)
    if stage == "evaluate":
        return _is_measured(config, workdir, models)
    directory = _folder(stage, config, workdir)
    if read_done(directory) is None:
        return False
    recorded, read = read_config(directory / "config.json"), _inputs(stage, config, workdir)
    if stage == "finetune":
        config = finetuned_config(config, recorded_config(workdir / "distill" / _start_of(stage, config)))
    unknown = {"max_abs": read.get("max_abs")}  # of students that were made before it was noted
    recorded["inputs"] = {name: (unknown | recorded.get("inputs", {})).get(name) for name in read}
    check_same_config(recorded, plain(config) | {"inputs": read}, (*SECTIONS[stage], "inputs"), directory)
    return True


def _folder(stage: str, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Where a stage that trains or solves puts what it makes."""
    student = {"distill": config.student.name, "finetune": config.finetune.name}
    return workdir / "distill" / student[stage] if stage in student else workdir / stage


def _inputs(stage: str, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, str]:
    """Hashes of what such a stage reads, by the names that it records them under; UserError if one is not there."""
    if stage == "captions":  # what it reads, it would have to open to know
        return {}
    if stage == "teacher":
        return _captions(config, workdir)
    found = {"teacher": _weights(config, workdir, "teacher")}
    if stage == "finetune" or stage == "distill" and not config.distill.online:
        found["store"] = store_hash(read_manifest(store_folder(config, workdir)))
    elif stage == "distill":  # a store's own bounds are part of its hash
        found["max_abs"] = str(config.trajectories.max_abs)
    start = _start_of(stage, config)
    return found | _captions(config, workdir) | ({"start": _weights(config, workdir, start)} if start else {})


def _captions(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, str]:
    """Hashes of the captions that networks are told, if they are."""
    if config.data.num_classes:
        return {}
    return inputs_of(open_captions(captions_folder(config, workdir)))


def _start_of(stage: str, config: ml_collections.ConfigDict) -> str:
    """Name of the student that a stage's own starts from; "" for none."""
    starts = {"distill": config.distill.start, "finetune": config.finetune.start or config.student.name}
    return starts.get(stage, "")


def _weights(config: ml_collections.ConfigDict, workdir: pathlib.Path, name: str) -> str:
    """SHA-256 of a model's averaged parameters; UserError if it is not there."""
    directory = teacher_folder(config, workdir) if name == "teacher" else workdir / "distill" / name
    return require_done(directory, "teacher" if name == "teacher" else "distill")["sha256"]["ema"]


def _is_sampled(config: ml_collections.ConfigDict, workdir: pathlib.Path, name: str) -> bool:
    """Whether a model's samples are there, drawn from its weights as they are now: the stage would leave them alone."""
    made = (read_done(workdir / "sample") or {"models": {}})["models"].get(name)
    directory = workdir / "sample" / name
    decodes = config.data.space == "latent" and vae_folder(config, workdir).exists()
    if not are_drawn(directory, made, _weights(config, workdir, name), decodes):
        return False
    return not drawn_otherwise(directory, config, _captions(config, workdir))


def _is_measured(config: ml_collections.ConfigDict, workdir: pathlib.Path, models: Collection[str]) -> bool:
    """Whether the samples of these models, as they are now, have been measured."""
    if read_done(workdir / "evaluate") is None:
        return False
    if config.evaluate.draw:
        weights = {name: _weights(config, workdir, name) for name in models or config.sample.models}
    else:
        sampled = require_done(workdir / "sample", "sample")["models"]
        weights = {name: facts["ema_sha256"] for name, facts in sampled.items()}
    results = read_results(workdir)
    return _same_settings(with_defaults(results.config or {}), config, MEASURED) and all(
        name in weights and results.models.get(name, Measured()).ema_sha256 == weights[name]
        for name in models or weights
    )


def _same_settings(recorded: Mapping[str, Any], config: ml_collections.ConfigDict, keys: tuple[str, ...]) -> bool:
    """Whether two configs have the same values under keys that begin so."""
    return not any(key.startswith(keys) for key in config_differences(recorded, plain(config)))
