"""A `DiTPipeline` of diffusers (transformer, vae, scheduler), or its transformer alone."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from ard_jax.convert import diffusers
from ard_jax.convert.families.base import STUDENT_HINTS, Hints, Source, config_of_model, first_known
from ard_jax.convert.families.folders import (
    PART,
    PIPELINE,
    class_names,
    folder_class,
    folder_license,
    holds_transformer,
    part_files,
    read_description,
)
from ard_jax.errors import UserError
from ard_jax.weights.tensors import open_tensors, to_float32

log = logging.getLogger("ard_jax")

# Settings of diffusers' schedulers that say what the network means, and all that they may be here.
SCHEDULER_ONLY = {
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
# Those that change the sampling alone: what DDIM takes where they are left out, and what ours does.
SCHEDULER_SAMPLING = {
    "clip_sample": (True, False),
    "thresholding": (False, False),
    "steps_offset": (0, 0),
    "set_alpha_to_one": (True, True),
}
# Those of its DPM-Solver that ours has.
DPM_SOLVER = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "timestep_spacing": "linspace",
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "use_lu_lambdas": False,
    "final_sigmas_type": "zero",
    "euler_at_final": False,
}


def recognise(path: pathlib.Path, hints: Hints) -> Source | None:
    """A pipeline's folder, or a transformer's.

    Raises:
        UserError: it is not whole, describes a network or a scheduler that we do not have, or contradicts `hints`.
    """
    if folder_class(path, PIPELINE) == "DiTPipeline":
        return _open_pipeline(path, hints)
    if holds_transformer(path, diffusers.CLASS):
        return _open_transformer(path, hints)
    return None


def _open_pipeline(folder: pathlib.Path, hints: Hints) -> Source:
    source = _open_transformer(folder / "transformer", hints)
    assert source.model is not None and source.config is not None
    index, scheduler, vae = folder / PIPELINE, folder / "scheduler" / "scheduler_config.json", folder / "vae"
    source.config.diffusion.update(scheduler_settings(read_description(scheduler), scheduler))
    read_description(vae / PART)
    source.config.data.space = "latent"
    id2label = read_description(index).get("id2label")
    return dataclasses.replace(
        source,
        what="a DiTPipeline of diffusers",
        files=(index, scheduler, *source.files),
        vae=vae,
        labels=class_names(id2label, source.model.backbone.num_classes, index),
        license=hints.license or folder_license(folder),
    )


def _open_transformer(folder: pathlib.Path, hints: Hints) -> Source:
    model = diffusers.dit_model(
        read_description(folder / PART), frequency_shift=first_known(hints.frequency_shift, 1.0)
    )
    hints.check_agreement(folder, num_heads=model.backbone.num_heads, objective="noise")
    hints.check_absent(f"{folder} holds a teacher of diffusers", "weights", *STUDENT_HINTS)
    config = config_of_model(model, hints)
    config.diffusion.guided_channels = 0  # diffusers guides them all
    return Source(
        what="a DiT transformer of diffusers",
        files=part_files(folder),
        config=config,
        model=model,
        tensors=diffusers.published_names(to_float32(open_tensors(folder), folder), model),
        license=hints.license or folder_license(folder),
    )


def scheduler_settings(
    described: Mapping[str, Any], path: pathlib.Path, keeps_dpm_solver: bool = False
) -> dict[str, Any]:
    """What a scheduler's config says, as settings of `config.diffusion`.

    Without `keeps_dpm_solver`, the teacher is sampled by DDIM whatever the scheduler is, as trajectories are.

    Raises:
        UserError: the network's output or its times mean something else than our noise-predicting process.
    """
    scheduler = described.get("_class_name", "")
    if "FlowMatch" in scheduler or "Scheduler" not in scheduler:
        raise UserError(
            f"{path} describes a {scheduler}, which is no scheduler of a noise-predicting DiT: give its own one."
        )
    for key, only in SCHEDULER_ONLY.items():
        if described.get(key, only) != only:
            raise UserError(f"{path} has {key} {described[key]!r}, but only {only!r} can be converted.")
    differing = [
        f"{key} {described.get(key, default)!r}"
        for key, (default, ours) in SCHEDULER_SAMPLING.items()
        if described.get(key, default) != ours
    ]
    if keeps_dpm_solver and scheduler == "DPMSolverMultistepScheduler":
        return _dpm_solver_settings(described, path) | _process_settings(described)
    if scheduler != "DDIMScheduler":
        differing.insert(0, scheduler)
    if differing:
        log.warning("%s samples with %s; here it is DDIM without that.", path, ", ".join(differing))
    return _process_settings(described) | {"solver": "ddim", "spacing": described.get("timestep_spacing", "leading")}


def _process_settings(described: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "train_steps": described.get("num_train_timesteps", 1000),
        "beta_start": described.get("beta_start", 1e-4),
        "beta_end": described.get("beta_end", 0.02),
    }


def _dpm_solver_settings(described: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Of a `DPMSolverMultistepScheduler`; the log says what ours does otherwise."""
    differing = [
        f"{key} {described.get(key, ours)!r}" for key, ours in DPM_SOLVER.items() if described.get(key, ours) != ours
    ]
    if differing:
        log.warning("%s samples with %s; here it is DPM-Solver++(2M) without that.", path, ", ".join(differing))
    return {"solver": "dpm++2m", "spacing": "dpm"}
