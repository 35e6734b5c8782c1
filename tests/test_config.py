"""The rows of config.py against the lists that they stand for: what a change changes, and which values are refused."""

import dataclasses
import functools
import math
from operator import getitem

import pytest

from ard_jax import completion, sweep, workdir
from ard_jax.checks import check_values
from ard_jax.config import (
    CHANGES,
    NOTHING,
    OF_STUDENTS,
    ROWS,
    Setting,
    _rows,
    default_config,
    flatten,
    keys_that_change,
    one_of,
    plain,
)
from ard_jax.diffusion import FlowMatching, LinearVP
from ard_jax.errors import UserError
from ard_jax.sampled import SAMPLED
from ard_jax.trajectories.store import stored_settings

POSITIVE = {
    "data": ("image_size", "channels"),
    "model": ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "caption_width", "interpolation"),
    "diffusion": ("train_steps", "steps", "time_scale"),
    "vae": ("batch_size",),
    "captions": ("batch_size", "shard_size"),
    "encode": ("image_size", "batch_size", "shard_size"),
    "teacher": ("steps", "batch_size", "accumulate", "checkpoint_every"),
    "trajectories": ("count", "batch_size", "shard_size"),
    "distill": ("steps", "batch_size", "accumulate", "checkpoint_every"),
    "finetune": ("steps", "batch_size", "accumulate", "checkpoint_every", "spectral_rounds"),
    "sample": ("count", "batch_size", "grid"),
    "evaluate": ("paired", "pictures", "feature_steps", "judge_steps", "neighbours", "split"),
    "run": ("log_every", "join_timeout", "workers", "poll"),
}
OPTIMIZERS = (
    "teacher.optimizer", "distill.optimizer", "distill.distribution_matching.optimizer", "finetune.optimizer",
    "finetune.discriminator_optimizer", "distill.distribution_matching.discriminator_optimizer",
    "distill.trajectory_matching.optimizer",
)  # fmt: skip
RANGES = {
    "data.num_classes": (0, math.inf),
    "captions.length": (2, math.inf),
    "sample.held_out": (0, math.inf),
    "run.keep_checkpoints": (0, math.inf),
    "sample.per_prompt": (0, math.inf),
    "run.keep_every": (0, math.inf),
    "run.sample_every": (0, math.inf),
    "seed": (0, 2**31 - 1),
    "sample.seed": (0, 2**31 - 1),
    "model.label_init_std": (0, math.inf),
    "model.time_init_std": (0, math.inf),
    "model.frequency_shift": (0, 127),
    "model.mlp_norm_eps": (0, 1),
    "diffusion.beta_start": (0, 1),
    "diffusion.beta_end": (0, 1),
    "diffusion.guidance_scale": (0, 1000),
    "teacher.label_dropout": (0, 1),
    "trajectories.max_abs": (0, math.inf),
    "finetune.warmup": (0, math.inf),
    "finetune.weight": (0, math.inf),
    "finetune.feature_time": (0, 1),
    **{f"{optimizer}.learning_rate": (0, 1000) for optimizer in OPTIMIZERS},
    **{f"{optimizer}.weight_decay": (0, 1000) for optimizer in OPTIMIZERS},
    **{f"{stage}.optimizer.ema": (0, 1) for stage in ("teacher", "distill", "finetune")},
    "distill.ard.huber": (0, math.inf),
    "distill.consistency.grid": (0, math.inf),
    "distill.consistency.decay": (0, 1),
    "distill.consistency.huber": (0, math.inf),
    "distill.distribution_matching.ratio": (1, math.inf),
    "distill.distribution_matching.grid": (1, math.inf),
    "distill.distribution_matching.weight": (0, math.inf),
    "distill.distribution_matching.feature_time": (0, 1),
    "distill.trajectory_matching.ratio": (1, math.inf),
    "distill.trajectory_matching.grid": (1, math.inf),
    "distill.mean_flow.grid": (0, math.inf),
    "distill.mean_flow.huber": (0, math.inf),
    "run.in_memory": (0, math.inf),
}
CHOICES = {
    "captions.dtype": ("float16", "bfloat16", "float32"),
    "trajectories.dtype": ("float16", "bfloat16", "float32"),
    "encode.dtype": ("float16", "bfloat16", "float32"),
    "student.target": ("x0", "xt"),
    "evaluate.features": ("classifier", "inception"),
    "evaluate.distances": ("float16", "float32"),
    "evaluate.dtype": ("float32", "bfloat16"),
    "sample.labels": ("uniform", "balanced", (), (0, 3), [1], 2),
    "run.loggers": ((), ("wandb",), ("tensorboard", "wandb", "mlflow")),
}


def refusal(key, value):
    """The sentence that refuses a default config with that value; "" if it is not refused."""
    config = default_config()
    *path, last = key.split(".")
    functools.reduce(getitem, path, config)[last] = value
    try:
        check_values(config)
    except UserError as error:
        return str(error)
    return ""


def test_every_row_says_what_it_changes():
    assert all(row.changes and row.changes <= set(CHANGES) for row in ROWS.values())
    assert all(row.changes == NOTHING for row in ROWS.values() if "nothing" in row.changes)


def test_every_setting_has_a_row():
    settings = flatten(default_config().to_dict()).keys()
    assert ROWS.keys() - settings == {"compare.methods", "compare.quick"}  # empty dicts, which are not flattened
    assert not settings - ROWS.keys()
    with pytest.raises(TypeError, match="distill.warmth is 3: give it a row"):
        _rows({"distill": {"steps": Setting(1, NOTHING), "warmth": 3}})


@pytest.mark.parametrize("changes", [frozenset(), frozenset({"colour"}), frozenset({"teacher", "colour"})])
def test_a_row_that_changes_what_there_is_not_is_refused(changes):
    with pytest.raises(ValueError, match="a setting changes"):
        Setting(1, changes)


def test_a_choice_names_its_choices():
    assert one_of("a", "b", "c").remedy == "choose a, b or c"
    assert one_of("a", b="the other").remedy == "choose a or b (the other)"


# ------------------------------------------------------------------------------------------------ what a change changes


def test_free_on_restart():
    assert set(workdir.FREE) == {
        "run.", "mesh.", "data.dir", "encode.dir", "teacher.dir", "trajectories.dir", "report.",
        "captions.dir", "captions.path", "captions.encoder", "teacher.accumulate",
        "distill.accumulate", "model.remat", "model.attention", "teacher.checkpoint_every", "distill.checkpoint_every",
        "finetune.checkpoint_every", "trajectories.batch_size", "sample.prompts", "evaluate.draw",
    }  # fmt: skip


def test_sections_that_stages_depend_on():
    assert workdir.SECTIONS == {
        "captions": ("captions",),
        "encode": ("seed", "encode"),
        "teacher": ("seed", "data", "model", "diffusion", "teacher"),
        "trajectories": ("seed", "data", "model", "diffusion", "trajectories"),
        "distill": ("seed", "data", "model", "diffusion", "student", "distill"),
        "finetune": ("seed", "data", "model", "diffusion", "student", "finetune"),
    }


def test_sections_of_students_and_of_teachers():
    assert OF_STUDENTS == ("student", "distill", "finetune")
    assert set(sweep.OF_TEACHERS) == {"seed", "data", "model", "teacher"}


def test_what_samples_and_measurements_depend_on():
    def but_for_dir(*sections):
        return {key for key in ROWS if key.split(".")[0] in sections and not key.endswith(".dir")}

    sampled = but_for_dir("data") | {"vae.", "diffusion."}
    sampled |= {f"sample.{name}" for name in ("count", "seed", "labels", "held_out")}
    assert set(SAMPLED) == sampled
    measured = {key for key in ROWS if key.startswith("evaluate.")} - {"evaluate.draw"}  # the same either way
    assert set(completion.MEASURED) == sampled | but_for_dir("encode") | {"student."} | measured


def test_a_key_on_top_is_no_section():
    assert keys_that_change("encode")[0] == "seed"


def test_what_a_store_shares_with_whoever_trains_on_it():
    config = plain(default_config())
    stored = stored_settings(config)
    keys = [
        "data.image_size",
        "data.channels",
        "data.num_classes",
        *(f"diffusion.{key}" for key in config["diffusion"]),
    ]
    assert list(stored) == keys  # in this order they lie on disk
    assert (stored["data.channels"], stored["diffusion.guidance_interval"]) == (4, [0.0, 1.0])


@pytest.mark.parametrize("process", [LinearVP, FlowMatching])
def test_what_weights_mean(process):
    config = default_config()
    config.diffusion.process = {LinearVP: "vp", FlowMatching: "flow"}[process]
    network = workdir.network_settings(config)
    assert network["data"].keys() == {"image_size", "channels", "num_classes", "space"}
    assert network["model"].keys() == {
        "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "learn_sigma", "frequency_shift",
        "mlp_norm_eps",
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(process)} - {"spacing"}
    assert network["diffusion"].keys() == fields | {"process"}


# ------------------------------------------------------------------------------------------------------ what is allowed


def test_settings_that_have_a_range():
    positive = {f"{section}.{name}" for section, names in POSITIVE.items() for name in names}
    assert {key for key, row in ROWS.items() if row.allowed} == positive | RANGES.keys() | CHOICES.keys()
    check_values(default_config())


@pytest.mark.parametrize("key", [f"{section}.{name}" for section, names in POSITIVE.items() for name in names])
def test_positive_numbers(key):
    if isinstance(ROWS[key].default, int):
        assert not refusal(key, 1)
        assert refusal(key, 0) == f"{key} is 0: give a number of at least 1."
    else:
        assert not refusal(key, 1e-9)
        for value in (0.0, math.inf, math.nan):
            assert refusal(key, value) == f"{key} is {value}: give a number above 0."


@pytest.mark.parametrize("key", RANGES)
def test_ranges(key):
    low, high = RANGES[key]
    asked = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    number = type(ROWS[key].default)
    outside = [number(low - 1), *([] if high == math.inf else [number(high + 1)])]
    for value in outside + ([math.nan] if number is float else []):
        assert refusal(key, value) == f"{key} is {value}: give a number {asked}."
    for value in (low, 10**12 if number is int and high == math.inf else low if high == math.inf else high):
        assert not refusal(key, number(value))
    assert number is int or high < math.inf or not refusal(key, math.inf)


@pytest.mark.parametrize("key", CHOICES)
def test_choices(key):
    assert not any(refusal(key, value) for value in CHOICES[key])
    asked = {
        "student.target": "choose x0 (predicted x0) or xt (noisy points)",
        "evaluate.features": "choose classifier or inception (of `weights`, against `reference`)",
        "evaluate.distances": "choose float16 or float32",
        "evaluate.dtype": "choose float32 or bfloat16",
        "sample.labels": "give uniform, balanced, or numbers such as (0, 1)",
        "run.loggers": "give some of ('tensorboard', 'wandb', 'mlflow') as a tuple, or () for none",
    }.get(key, "choose float16, bfloat16 or float32")
    wrong = ("x",) if isinstance(ROWS[key].default, tuple) else "x"
    assert refusal(key, wrong) == f"{key} is {wrong!r}: {asked}."
