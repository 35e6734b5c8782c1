"""What a pipeline's folder of diffusers says beside its weights, and where it samples otherwise than we do."""

from typing import Any

from ml_collections import ConfigDict

from ard_jax.build import make_teacher
from ard_jax.convert.families.diffusers_folder import DPM_SOLVER
from ard_jax.convert.families.pixart import PIPELINES, TEXT
from ard_jax.errors import UserError


def pipeline_class(config: ConfigDict) -> str:
    """The pipeline of diffusers that runs a teacher: of PixArt's, α's if it is told sizes or its captions are short."""
    if config.data.num_classes:
        return "DiTPipeline"
    model = make_teacher(config)
    is_alpha = model.size_conditioning or config.captions.length <= TEXT[False]["length"]
    return PIPELINES[1] if is_alpha else PIPELINES[0]


def check_diffusers(config: ConfigDict, is_student: bool) -> None:
    """Raises UserError for a model that `DiTPipeline` cannot run."""
    if is_student:
        raise UserError("diffusers has no ARD students: choose --format pipeline, safetensors or stablehlo.")
    if config.data.space == "pixel":
        raise UserError(
            "diffusers' DiTPipeline decodes latents with a VAE, but this teacher makes pixels: choose another --format."
        )
    if config.diffusion.process != "vp":
        raise UserError(
            "diffusers' DiTPipeline wants a network that predicts noise, but this teacher predicts velocities "
            "(diffusion.process is 'flow'): choose another --format."
        )


def scheduler_config(config: ConfigDict) -> dict[str, Any]:
    """Of diffusers' DPM-Solver, or of its DDIM, which walks in strides of ⌊T/steps⌋ whatever its timesteps are."""
    diffusion = config.diffusion
    if diffusion.solver == "dpm++2m" and not config.data.num_classes:
        process = {"num_train_timesteps": diffusion.train_steps, "prediction_type": "epsilon"}
        betas = {"beta_schedule": "linear", "beta_start": diffusion.beta_start, "beta_end": diffusion.beta_end}
        return {"_class_name": "DPMSolverMultistepScheduler"} | process | betas | DPM_SOLVER
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": diffusion.train_steps,
        "beta_schedule": "linear",
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "prediction_type": "epsilon",
        "timestep_spacing": "trailing" if diffusion.spacing == "trailing" else "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": False,
    }


def sampling_differences(config: ConfigDict) -> list[str]:
    """Where the pipeline of diffusers samples otherwise than this teacher's settings say; a sentence each."""
    diffusion, classes = config.diffusion, config.data.num_classes
    found = []
    is_dpm = diffusion.solver == "dpm++2m" and not classes
    if diffusion.spacing in ("linspace", "dpm") and not (is_dpm and diffusion.spacing == "dpm"):
        found.append(
            f"diffusers' DDIM cannot walk the teacher's timesteps (spacing {diffusion.spacing}), and takes others "
            f"there (leading): images differ from those of ard_jax."
        )
    if diffusion.spacing == "trailing" and diffusion.train_steps % diffusion.steps:
        found.append(
            f"diffusers' DDIM steps wrongly through trailing timesteps unless the steps divide "
            f"{diffusion.train_steps}, which the teacher's {diffusion.steps} do not."
        )
    if diffusion.solver != "ddim" and not is_dpm:
        found.append(f"The teacher's solver is {diffusion.solver}; diffusers' folder has DDIM.")
    if classes not in (0, 1000):
        found.append(
            f"DiTPipeline takes class 1000 for the null class, and this teacher has {classes} classes: guidance does "
            f"not work there, so use guidance_scale=1."
        )
    elif diffusion.guidance_scale != 1:
        found += _guided_otherwise(config)
    return found


def _guided_otherwise(config: ConfigDict) -> list[str]:
    """Where a pipeline of diffusers guides otherwise; a sentence each."""
    diffusion, channels, kind = config.diffusion, config.data.channels, pipeline_class(config)
    found = []
    if diffusion.guided_channels not in (0, channels):
        found.append(f"{kind} guides all {channels} channels, the teacher's settings {diffusion.guided_channels}.")
    if tuple(diffusion.guidance_interval) != (0.0, 1.0):
        low, high = diffusion.guidance_interval
        found.append(
            f"{kind} guides at every step, the teacher's settings from {low:g} to {high:g} of the way from data to "
            f"noise (diffusion.guidance_interval)."
        )
    if not config.data.num_classes and config.model.null_mask == "caption":
        found.append(
            f"{kind} reads the empty caption under a mask of its own, this teacher under that of the caption in whose "
            f"place it stands (model.null_mask is 'caption')."
        )
    return found
