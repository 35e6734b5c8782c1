"""Every setting of every stage in one visible block: its default, its meaning, what it changes and what it may be.

A file in `configs/` starts from `default_config()` and changes what its experiment needs; the command line overrides
single keys (`--config.student.history_layers=2`).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from ard_jax.errors import UserError

# ------------------------------------------------------------------------------------------------ what a row is made of

CHANGES = (
    "captions", "encode", "teacher", "trajectories", "distill", "finetune", "sample", "evaluate",  # what a stage makes
    "network",  # what a teacher's trained weights mean
    "store",  # what trajectories mean: whoever trains on them must have the same
    "request",  # what is asked for, such as the number of pictures: what is there stays good
    "nothing",  # it may differ between two starts of the same run
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The values that a setting may have.

    Attributes:
        holds: whether it may have a value.
        remedy: the end of the sentence that refuses another, such as "give a number of at least 1".
    """

    holds: Callable[[Any], bool]
    remedy: str


@dataclasses.dataclass(frozen=True)
class Setting:
    """A row: one setting.

    Attributes:
        default: its value where a config says nothing, which also gives its type.
        changes: what a change of it changes, out of `CHANGES`.
        allowed: its values; None where the module that reads it, or `checks`, says which.
        later: whether it may be another when a run that is begun goes on: "never"; "unfinished", until its end; or
            "larger".
        any_type: whether its values may have other types than the default; `allowed` then says which.
    """

    default: Any
    changes: frozenset[str]
    allowed: Allowed | None = None
    later: str = "never"
    any_type: bool = False

    def __post_init__(self):
        if not self.changes or not self.changes <= set(CHANGES):
            raise ValueError(f"a setting changes {set(self.changes)}: choose out of {', '.join(CHANGES)}.")


def at_least(low: float) -> Allowed:
    return Allowed(lambda value: value >= low, f"give a number of at least {low}")


def above(low: float) -> Allowed:
    """Greater and finite."""
    return Allowed(lambda value: low < value < math.inf, f"give a number above {low}")


def between(low: float, high: float) -> Allowed:
    """Both ends included."""
    return Allowed(lambda value: low <= value <= high, f"give a number from {low} to {high}")


def one_of(*names: str, **meanings: str) -> Allowed:
    """Names, those given by keyword with what they mean."""
    *first, last = (*names, *(f"{name} ({meaning})" for name, meaning in meanings.items()))
    return Allowed(lambda value: value in (*names, *meanings), f"choose {', '.join(first)} or {last}")


def some_of(*names: str) -> Allowed:
    """A tuple of names, or none of them."""
    remedy = f"give some of {names} as a tuple, or () for none"
    return Allowed(lambda value: set(value) <= set(names), remedy)


def _are_labels(value: Any) -> bool:
    numbers = value if isinstance(value, (tuple, list)) else (value,)
    return value in LABELS or all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)


SOME_LABELS = Allowed(_are_labels, "give uniform, balanced, or numbers such as (0, 1)")
LABELS = ("uniform", "balanced")  # of all conditions, each drawn on its own; or all in turn, each as often
WORDLLAMA = "wordllama"  # the text encoder that a package of that name ships

# Values of several settings.
SEEDS = between(0, 2**31 - 1)
STORED_TYPES = one_of("float16", "bfloat16", "float32")

# What the settings change.
NOTHING, REQUEST, STORE = (frozenset({name}) for name in ("nothing", "request", "store"))
CAPTIONS, ENCODED, TEACHER, TRAJECTORIES = (
    frozenset({name}) for name in ("captions", "encode", "teacher", "trajectories")
)
DISTILLED, FINETUNED, RESULTS = (frozenset({name}) for name in ("distill", "finetune", "evaluate"))
LATENTS = ENCODED | RESULTS
SAMPLES = RESULTS | {"sample"}
STUDENTS = DISTILLED | FINETUNED
TRAINED = TEACHER | TRAJECTORIES | STUDENTS
NETWORK = TRAINED | {"network"}
IMAGES = TEACHER | FINETUNED | SAMPLES  # what is trained on real images, and what is compared with them
PROCESS = NETWORK | STORE | SAMPLES
SOLVER = TRAJECTORIES | STUDENTS | STORE | SAMPLES


def _optimizer(
    changes: frozenset[str], learning_rate: float = 1e-4, clip: float = 1.0, name: str = "adamw"
) -> dict[str, Setting]:
    """Rows of an optimiser of a network that is not averaged."""
    return {
        "name": Setting(name, changes),  # one of training.state.OPTIMIZERS
        # after the warm-up; more learns faster, too much diverges
        "learning_rate": Setting(learning_rate, changes, between(0, 1000), later="unfinished"),
        "schedule": Setting("constant", changes),  # or "cosine", falling to 0 at the last step
        "warmup_steps": Setting(0, changes),  # first steps, in which the learning rate rises from 0; more is calmer
        # pull of weights to 0; takes an optimiser that has it, such as adamw
        "weight_decay": Setting(0.0, changes, between(0, 1000)),
        "clip": Setting(clip, changes, later="unfinished"),  # global gradient norm; 0 for none
    }


def _averaged_optimizer(changes: frozenset[str]) -> dict[str, Setting]:
    return {
        **_optimizer(changes),
        # decay of the averaged parameters, ramped up as (1 + step) / (10 + step)
        "ema": Setting(0.9999, changes, between(0, 1)),
    }


# --------------------------------------------------------------------------------------------------------- the settings

SETTINGS: dict[str, Any] = {
    # of weights, shuffling, latents and trajectories; another gives another run as good
    "seed": Setting(0, ENCODED | TRAINED, SEEDS),
    "data": {
        "source": Setting("tfds", IMAGES),  # "digits", "tfds", "folder", "openmoji"; "imagefolder", "shapes"
        "name": Setting("", IMAGES),  # TFDS name
        "dir": Setting("", NOTHING),  # TFDS data_dir, or the folder of images; what lies there is told by data.json
        "split": Setting("train", IMAGES),  # of TFDS or OpenMoji; other sources have train alone
        "image_size": Setting(32, PROCESS, at_least(1)),  # side of the network's input: pixels, or latents
        "channels": Setting(4, PROCESS, at_least(1)),  # of the network's input: 1 grey, 3 colour, 4 or more of latents
        "num_classes": Setting(1000, PROCESS, at_least(0)),  # 0 for images with captions
        "caption_key": Setting("text", IMAGES),  # of metadata.jsonl, or a feature of TFDS
        "space": Setting("latent", NETWORK | SAMPLES),  # or "pixel"
        # mirror half of the images in training; not for what has a left and a right
        "horizontal_flip": Setting(False, IMAGES),
    },
    "vae": {
        "dir": Setting("", SAMPLES),  # folder of an autoencoder in diffusers' format; "" for the workdir's vae/
        "batch_size": Setting(8, SAMPLES, at_least(1)),  # images a device decodes at a time
    },
    "captions": {  # encodes captions for networks that are told them
        "dir": Setting("", NOTHING),  # a store made elsewhere: the `captions` folder of its workdir
        # "data": of the images that `data` or `encode` names; "file": path; "tfds": path, name, split; or "prompts"
        "source": Setting("data", CAPTIONS),
        "path": Setting("", NOTHING),  # text file, .jsonl, or TFDS data_dir; what is in it is told by its captions
        "name": Setting("", CAPTIONS),  # TFDS name
        "split": Setting("train", CAPTIONS),  # TFDS split
        "prompts": Setting((), CAPTIONS),  # the captions themselves, for the source "prompts"
        "encoder": Setting("", NOTHING),  # folder of a pipeline or of a T5 v1.1, or "wordllama"; known by its hash
        "length": Setting(300, CAPTIONS, at_least(2)),  # tokens of a caption at most
        "cleaning": Setting("none", CAPTIONS),  # or "lower", "clean" as PixArt-α's
        # of stored vectors; float32 keeps all bits in twice the space
        "dtype": Setting("bfloat16", CAPTIONS, STORED_TYPES),
        "batch_size": Setting(64, CAPTIONS, at_least(1)),  # captions a device encodes at a time
        "shard_size": Setting(512, CAPTIONS, at_least(1)),  # captions a file
    },
    "encode": {  # makes latents of images, which `data` then describes
        "source": Setting("folder", LATENTS),  # as in `data`, but of the images: "digits", "tfds" or "folder"
        "name": Setting("", LATENTS),  # TFDS name
        "dir": Setting("", NOTHING),  # TFDS data_dir, or the folder of images
        "split": Setting("train", LATENTS),  # TFDS split
        "image_size": Setting(256, LATENTS, at_least(1)),  # side in pixels; twice it is four times the latents
        "horizontal_flip": Setting(True, LATENTS),  # two records an image: itself, then its mirror image
        "sample": Setting(True, LATENTS),  # latents drawn from the encoder's distribution; or its mean
        "dtype": Setting("float16", LATENTS, STORED_TYPES),  # of stored latents; float32 takes twice the space
        "batch_size": Setting(64, LATENTS, at_least(1)),  # records a device encodes at a time
        "shard_size": Setting(4096, LATENTS, at_least(1)),  # records a file
    },
    "model": {
        "name": Setting("", NETWORK),  # a published size such as "DiT-XL/2", which sets the next four
        # side of a token, in input pixels; twice it is a quarter of the tokens, and coarser
        "patch_size": Setting(2, NETWORK, at_least(1)),
        "hidden_size": Setting(1152, NETWORK, at_least(1)),  # width of a token; time and memory grow with its square
        "depth": Setting(28, NETWORK, at_least(1)),  # layers; time and memory grow with it
        "num_heads": Setting(16, NETWORK, at_least(1)),  # attention heads of a layer, which share its width
        "mlp_ratio": Setting(4.0, NETWORK, above(0)),  # width of a layer's MLP over that of a token
        # twice the output channels, as published weights have; the second half is not used
        "learn_sigma": Setting(True, NETWORK),
        # spread of the label table at the start; more tells classes apart sooner
        "label_init_std": Setting(0.02, TEACHER, at_least(0)),
        "time_init_std": Setting(0.02, TEACHER, at_least(0)),  # the same of the network that takes the time
        # of the time's sinusoids: 0 as published, 1 in diffusers' DiT
        "frequency_shift": Setting(0.0, NETWORK, between(0, 127)),
        "mlp_norm_eps": Setting(1e-6, NETWORK, between(0, 1)),  # 1e-6 as published, 1e-5 in diffusers' DiT
        "caption_width": Setting(4096, NETWORK, at_least(1)),  # of a PixArt alone: channels of a caption's vectors
        "interpolation": Setting(1.0, NETWORK, above(0)),  # of a PixArt alone: what positions are divided by
        "size_conditioning": Setting(False, NETWORK),  # of a PixArt alone: the network is told the images' size
        # of a PixArt alone: the mask of the empty caption, its "own" or that of the "caption" in whose place it is
        "null_mask": Setting("own", NETWORK),
        "dtype": Setting("auto", TRAINED),  # compute type: bfloat16 on accelerators, float32 on CPU; or either by name
        # or "dots", "full"; "auto" is full on chips that compute much faster than they fetch, else dots
        "remat": Setting("none", NOTHING),
        # the device's fused kernel where it applies; or "xla", "cudnn", "splash"
        "attention": Setting("auto", NOTHING),
    },
    "diffusion": {
        "process": Setting("vp", PROCESS),  # the network predicts noise; or "flow": velocity
        # vp only: noise levels of the training; more make the steps between finer
        "train_steps": Setting(1000, PROCESS, at_least(1)),
        # vp only: noise added at the first level; more blurs the finest detail
        "beta_start": Setting(1e-4, PROCESS, between(0, 1)),
        # vp only: at the last level; too little leaves the image visible there
        "beta_end": Setting(0.02, PROCESS, between(0, 1)),
        # vp only: respaced timesteps; or "leading", "trailing" in diffusers' words, "dpm" as its DPM-Solver has them
        "spacing": Setting("linspace", SOLVER),
        "time_scale": Setting(1000.0, PROCESS, above(0)),  # flow only: length of the network's time
        # flow only: network time 0 is noise and the velocity is x_0 − ε, as in SiT
        "reversed": Setting(False, PROCESS),
        "solver": Setting("ddim", SOLVER),  # or "heun", "dpm++2m"
        # of the teacher's ODE; more are closer to its solution, and slower in proportion
        "steps": Setting(25, SOLVER, at_least(1)),
        # 1 for none; more heeds the condition, at less variety
        "guidance_scale": Setting(1.5, SOLVER, between(0, 1000)),
        "guided_channels": Setting(3, SOLVER),  # 0 for all
        # share of the way from data to noise that is guided; less is faster
        "guidance_interval": Setting((0.0, 1.0), SOLVER),
    },
    "teacher": {
        "dir": Setting("", NOTHING),  # a teacher trained elsewhere: the `teacher` folder of its workdir
        # training steps; more take longer and draw better
        "steps": Setting(400_000, TEACHER, at_least(1), later="larger"),
        "batch_size": Setting(256, TEACHER, at_least(1)),  # images a step, on all devices together
        "accumulate": Setting(1, NOTHING, at_least(1)),  # microbatches a step: less memory for the same batch
        # share of conditions left out, from which guidance learns; 0 for none
        "label_dropout": Setting(0.1, TEACHER, between(0, 1)),
        "checkpoint_every": Setting(5000, NOTHING, at_least(1)),  # steps; with fewer, less is lost by a crash
        "optimizer": _averaged_optimizer(TEACHER),
    },
    "trajectories": {
        "dir": Setting("", NOTHING),  # a store made elsewhere: the `trajectories` folder of its workdir
        # more are less repeated in training, and take disk in proportion
        "count": Setting(2_560_000, TRAJECTORIES, at_least(1), later="larger"),
        "points": Setting((15, 10, 5, 0), TRAJECTORIES),  # respaced indices that are kept, counted down to the data
        "keep_noisy": Setting(False, TRAJECTORIES),  # keep the noisy points beside the x0-predictions
        "dtype": Setting("float16", TRAJECTORIES, STORED_TYPES),  # of stored tensors; float32 takes twice the space
        "batch_size": Setting(64, NOTHING, at_least(1)),  # that a device solves at a time; another rounds otherwise
        "shard_size": Setting(4096, TRAJECTORIES, at_least(1)),  # trajectories a file
        # trajectories that leave [-max_abs, max_abs] are dropped; 0 keeps all
        "max_abs": Setting(0.0, TRAJECTORIES, at_least(0)),
    },
    "student": {
        "name": Setting("ard", STUDENTS | RESULTS),  # its folder under distill/
        # an ARDStudent; or a network that is told the time, sampled "deterministic"ally by DDIM or "stochastic"ally
        # with fresh noise after each step
        "kind": Setting("history", STUDENTS | RESULTS),
        "points": Setting((15, 10, 5, 0), STUDENTS | RESULTS),  # S respaced indices out of the store's
        "target": Setting("x0", STUDENTS | RESULTS, one_of(x0="predicted x0", xt="noisy points")),  # at each point
        "history_layers": Setting(6, STUDENTS | RESULTS),  # N: the lowest layers, which see earlier blocks
        "mask": Setting("causal", STUDENTS | RESULTS),  # which of them: or "diagonal", "window", "noise_and_own"
        "heads": Setting("separate", STUDENTS | RESULTS),  # or "shared"
        "block_times": Setting((), STUDENTS | RESULTS),  # network time of each block; () for T·(S−b)/S
    },
    "distill": {
        # or "progressive", "consistency", "distribution_matching", "trajectory_matching", "mean_flow", or
        # your.own.module
        "objective": Setting("ard", DISTILLED),
        # name of a student to start from, and in progressive distillation to learn from
        "start": Setting("", DISTILLED),
        "online": Setting(False, DISTILLED),  # solve the teacher inside the training step; no store is read
        # training steps; more bring the student closer to its teacher
        "steps": Setting(300_000, DISTILLED, at_least(1), later="larger"),
        "batch_size": Setting(64, DISTILLED, at_least(1)),  # trajectories a step, on all devices together
        "accumulate": Setting(1, NOTHING, at_least(1)),  # microbatches a step: less memory for the same batch
        "checkpoint_every": Setting(5000, NOTHING, at_least(1)),  # steps; with fewer, less is lost by a crash
        "optimizer": _averaged_optimizer(DISTILLED),
        "ard": {
            # of the steps' losses, in the order of `student.points`; () for equal ones
            "step_weights": Setting((), DISTILLED),
            # constant of a pseudo-Huber distance; 0 for the mean square, as in the paper and in the fine-tune
            "huber": Setting(0.0, DISTILLED, at_least(0)),
            # the student's own points of the moment are its history, as in sampling, instead of the teacher's: a third
            # more FLOPs a step
            "own_history": Setting(False, DISTILLED),
        },
        "consistency": {
            # steps of the teacher's that a trajectory has; 0 for the teacher's own number, made a multiple of the
            # student's
            "grid": Setting(0, DISTILLED, at_least(0)),
            "decay": Setting(0.95, DISTILLED, between(0, 1)),  # of the target, the running average of the student
            # constant of the pseudo-Huber distance; 0 for the mean square
            "huber": Setting(0.00054, DISTILLED, at_least(0)),
        },
        "distribution_matching": {
            "ratio": Setting(5, DISTILLED, at_least(1)),  # steps of the fake score to one of the student
            # times at which scores are compared, spread over the teacher's
            "grid": Setting(100, DISTILLED, at_least(1)),
            "interval": Setting((0.02, 0.98), DISTILLED),  # of these, those on this part of the way from data to noise
            "optimizer": _optimizer(DISTILLED),  # of the fake score
            # of the discriminator's gradient over that of the scores, at the samples; 0 for no discriminator
            "weight": Setting(1.0, DISTILLED, at_least(0)),
            # as in `finetune`: blocks of the teacher that have a head, and where it sees images on the way to noise
            "layers": Setting((), DISTILLED),
            "feature_time": Setting(0.0, DISTILLED, between(0, 1)),  # share of the way at which it sees images
            # with momentum the two run away from each other, see benchmarks/RESULTS.md
            "discriminator_optimizer": _optimizer(DISTILLED, learning_rate=2e-3, clip=0.0, name="rmsprop"),
        },
        "trajectory_matching": {  # as in `distribution_matching`
            "ratio": Setting(1, DISTILLED, at_least(1)),  # steps of the fake score to one of the student
            "grid": Setting(100, DISTILLED, at_least(1)),  # times at which scores are compared
            "interval": Setting((0.02, 0.98), DISTILLED),  # of these, those on this part of the way from data to noise
            "optimizer": _optimizer(DISTILLED),  # of the fake score
        },
        "mean_flow": {  # as in `consistency`
            "grid": Setting(0, DISTILLED, at_least(0)),  # steps of the teacher's that a trajectory has; 0 for its own
            "huber": Setting(0.00054, DISTILLED, at_least(0)),  # constant of the distance; 0 for the mean square
        },
    },
    "finetune": {  # a trained student goes on, with a discriminator beside it
        "name": Setting("ard_adversarial", FINETUNED),  # its folder under distill/
        "start": Setting("", FINETUNED),  # name of the student that it starts from; "" for student.name
        "steps": Setting(40_000, FINETUNED, at_least(1)),  # training steps, warm-up and all
        # trajectories and real images a step, each, on all devices together
        "batch_size": Setting(48, FINETUNED, at_least(1)),
        # no more: the discriminator's norm and the adaptive weight are of the whole batch
        "accumulate": Setting(1, FINETUNED, at_least(1)),
        "checkpoint_every": Setting(5000, NOTHING, at_least(1)),  # steps; with fewer, less is lost by a crash
        # first steps, in which the discriminator learns and the student only regresses
        "warmup": Setting(3000, FINETUNED, at_least(0)),
        # of the adversarial gradient over the regression's, at the last head
        "weight": Setting(10.0, FINETUNED, at_least(0)),
        "layers": Setting((), FINETUNED),  # blocks of the teacher that have a head, counted from 0; () for all
        # share of the way from data to noise at which the teacher sees images, noised so
        "feature_time": Setting(0.0, FINETUNED, between(0, 1)),
        # power iterations of the discriminator's kernels before the first step
        "spectral_rounds": Setting(30, FINETUNED, at_least(1)),
        "optimizer": _averaged_optimizer(FINETUNED),
        "discriminator_optimizer": _optimizer(FINETUNED, learning_rate=1e-3, clip=0.0),
    },
    "sample": {
        "models": Setting(("teacher", "ard"), REQUEST),  # "teacher", or names of students
        "count": Setting(50_000, SAMPLES, at_least(1)),  # images of each model; distances of more are surer
        "batch_size": Setting(64, REQUEST, at_least(1)),  # a device
        "seed": Setting(1, SAMPLES, SEEDS),  # of the noise, the same for all models
        # "uniform" or (): drawn uniformly, as papers have them; "balanced": each equally often, which scores a little
        # better; or numbers, in turn
        "labels": Setting((), SAMPLES, SOME_LABELS, any_type=True),
        # of `count`, the last so many are of captions that are held out of training, in turn
        "held_out": Setting(0, SAMPLES, at_least(0)),
        "grid": Setting(64, REQUEST, at_least(1)),  # pictures in the PNG
        # a benchmark's list of prompts (a file, or a folder of such) to draw in place of the run's own captions
        "prompts": Setting("", NOTHING),
        "layout": Setting("folder", REQUEST),  # of their images: or "compbench", "geneval", "dpg", "coco"
        "per_prompt": Setting(0, REQUEST, at_least(0)),  # images of each; 0 for as many as the layout's benchmark has
    },
    "evaluate": {
        "paired": Setting(512, RESULTS, at_least(1)),  # trajectories for the errors that are paired with the teacher
        "pictures": Setting(16, RESULTS, at_least(1)),  # trajectories, edits and neighbours that the report shows
        "feature_steps": Setting(600, RESULTS, at_least(1)),  # training steps of the small classifier
        "judge_steps": Setting(1000, RESULTS, at_least(1)),  # of the judge of captions, where there are such
        "neighbours": Setting(3, RESULTS, at_least(1)),  # of precision and recall
        # draw the samples of sample.models while they are measured, and keep none; or read what `sample` wrote
        "draw": Setting(False, NOTHING),
        # what distances are measured in: a small network that is trained here on the same images; or FID's Inception
        "features": Setting("classifier", RESULTS, one_of("classifier", inception="of `weights`, against `reference`")),
        "weights": Setting("", RESULTS),  # of Inception: its file
        "reference": Setting("", RESULTS),  # for Inception: ADM's file, or one of evaluate --make-reference
        "split": Setting(5000, RESULTS, at_least(1)),  # images of a split of the Inception score
        # that Inception computes in; bfloat16 is faster on accelerators, and its numbers compare with no published ones
        "dtype": Setting("float32", RESULTS, one_of("float32", "bfloat16")),
        # of precision and recall in Inception's features, the type
        "distances": Setting("float16", RESULTS, one_of("float16", "float32")),
        "clip": Setting("", RESULTS),  # folder of a CLIP that judges the images of sample.prompts
        # each by its own definition: or "clip_score", "pick_score", "hps_v2", "compbench_non_spatial"
        "clip_scores": Setting(("clip_similarity",), RESULTS),
    },
    "report": {"title": Setting("ard_jax", NOTHING)},  # what stands above the page
    "compare": {
        # by name, each as `method_defaults` says; all of them get the training FLOPs that the config's own student
        # would take, but for a fine-tune, which has its own number of steps
        "methods": Setting({}, REQUEST),
        "steps": Setting((1, 2, 4), REQUEST),  # S that are compared
        "points": Setting(((0,), (10, 0), (15, 10, 5, 0)), REQUEST),  # student.points of every S
        "seeds": Setting((0,), REQUEST),  # each with its own teacher, trajectories and students
        "quick": Setting({}, REQUEST),  # what --quick changes, nested as the config is
    },
    "mesh": {  # how many devices lie along each axis; one may be -1, for what the others leave
        "data": Setting(-1, NOTHING),  # share the batch
        # share the batch and keep a part of the parameters and the optimiser's state each; of more devices than divide
        # the network's width, or if it is -1, than leave each a part of 128, the others join `data`
        "fsdp": Setting(1, NOTHING),
        # share each layer's heads and MLP, within a host; -1 for 1, or more where the batch is small for the devices
        "tensor": Setting(1, NOTHING),
    },
    "run": {  # how a run shows itself; may change between restarts
        "log_every": Setting(100, NOTHING, at_least(1)),  # steps from one line of metrics to the next
        # steps after which a training draws the same few noises and conditions with what it has learned so far, as
        # progress/STEP.png in its folder, for `loggers` and for the report; 0 for never
        "sample_every": Setting(0, NOTHING, at_least(0)),
        "keep_checkpoints": Setting(2, NOTHING, at_least(0)),  # the newest of each training; 0 for all
        "keep_every": Setting(0, NOTHING, at_least(0)),  # and those whose step is a multiple of this; 0 for none
        # and, while `watch` looks on, the best by this metric; "frechet" is fid where that is measured, else fd
        "keep_best": Setting("frechet", NOTHING),
        "poll": Setting(30.0, NOTHING, above(0)),  # seconds after which `watch` looks for checkpoints again
        # where metrics are shown beside metrics.jsonl: "tensorboard", "wandb" (extra wandb), "mlflow" (extra mlflow)
        "loggers": Setting(("tensorboard",), NOTHING, some_of("tensorboard", "wandb", "mlflow")),
        "join_timeout": Setting(300.0, NOTHING, above(0)),  # seconds that a host waits for the others at the start
        # threads that read data; many wait for a bucket at once, and cost little where a disk is fast
        "workers": Setting(64, NOTHING, at_least(1)),
        "in_memory": Setting(2**30, NOTHING, at_least(0)),  # bytes of data that may be held decoded in memory
    },
}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict → dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _rows(tree: dict[str, Any]) -> dict[str, Setting]:
    """Nested rows → dotted keys; TypeError for a setting that has no row."""
    rows = flatten(tree)
    for key, row in rows.items():
        if not isinstance(row, Setting):
            raise TypeError(f"{key} is {row!r}: give it a row, a Setting that says what a change of it changes.")
    return rows


ROWS = _rows(SETTINGS)  # by dotted key


def keys_that_change(what: str) -> tuple[str, ...]:
    """How the keys of the settings begin that change `what`, one of `CHANGES`: "data." if all of that section do."""
    found: list[str] = []
    for section, tree in SETTINGS.items():
        keys = [key for key in ROWS if key.split(".")[0] == section]
        changing = [key for key in keys if what in ROWS[key].changes]
        found += [f"{section}."] if isinstance(tree, dict) and changing == keys else changing
    return tuple(found)


def sections_that_change(*what: str) -> tuple[str, ...]:
    """Keys on top of a config that hold a setting that changes any of `what`, out of `CHANGES`."""
    return tuple(dict.fromkeys(key.split(".")[0] for key, row in ROWS.items() if row.changes & set(what)))


# Sections in which students of the same teacher and trajectories may differ.
OF_STUDENTS = tuple(
    section
    for section in sections_that_change("distill", "finetune")
    if section not in sections_that_change("teacher", "trajectories")
)


def _defaults(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: _defaults(row) if isinstance(row, dict) else _default(row) for key, row in tree.items()}


def _default(row: Setting) -> Any:
    return ml_collections.FieldReference(row.default, field_type=object) if row.any_type else row.default


def default_config() -> ml_collections.ConfigDict:
    """The paper's ImageNet-256 settings wherever docs/METHOD.md section 5 gives a number."""
    return ml_collections.ConfigDict(_defaults(SETTINGS))


def method_defaults() -> dict[str, Any]:
    """What an entry of `compare.methods` may say."""
    return {
        "title": "",  # its name on the page; "" for its key
        "stage": "distill",  # the stage that trains it; or "finetune"
        "steps": (),  # S that it has; () for those of compare.steps
        "chain": False,  # each S starts from the one before in `steps`, and all of them share one budget
        "start": "",  # method whose student of the same S it starts from
        "settings": {},  # what it changes in the sections student, distill and finetune, nested as they are
        "settings_at": {},  # more of that by S, such as {"1": {"distill": {"batch_size": 128}}}
    }


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON gives it back: tuples have become lists."""
    return json.loads(json.dumps(config.to_dict()))


def with_defaults(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A config that was written down, with the defaults, which do as before, of settings that came later."""

    def fill(there: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
        both = {key: fill(there[key], value) for key, value in usual.items() if isinstance(there.get(key), dict)}
        return {**usual, **there, **both}

    return fill(recorded, plain(default_config()))


def config_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[object, object]]:
    """Keys of two configs whose values differ, sorted: both values, None for a key that one has not."""
    one, other = flatten(before), flatten(now)
    every = {key: (one.get(key), other.get(key)) for key in sorted(one.keys() | other.keys())}
    return {key: values for key, values in every.items() if values[0] != values[1]}


def other_settings(recorded: Mapping[str, Any], config: ml_collections.ConfigDict, keys: tuple[str, ...]) -> list[str]:
    """In words, where a recorded config has other values under keys that begin so; folders may have moved."""
    return [
        f"{key} {there!r} there, {here!r} here"
        for key, (there, here) in config_differences(recorded, plain(config)).items()
        if key.startswith(keys) and not key.endswith(".dir")
    ]


def config_arguments(text: str | None, **defaults: Any) -> dict[str, Any]:
    """Parses what follows the colon of `--config FILE:key=value,key=value`, typed as the defaults are.

    A tuple in place of a default has all values that may be given, the default first.

    Raises:
        UserError: a key that the file does not have, or a value of the wrong type or that is none of the choices.
    """
    choices = {key: default for key, default in defaults.items() if isinstance(default, tuple)}
    defaults |= {key: allowed[0] for key, allowed in choices.items()}
    values = dict(defaults)
    for part in filter(None, (text or "").split(",")):
        key, _, value = part.partition("=")
        if key not in defaults:
            raise UserError(f"config argument {key!r} does not exist: this config has {', '.join(defaults)}.")
        try:
            values[key] = type(defaults[key])(value)
        except ValueError:
            expected = type(defaults[key]).__name__
            raise UserError(f"config argument {key} is {value!r}, which is no {expected}: give one.") from None
        if key in choices and values[key] not in choices[key]:
            allowed = ", ".join(map(str, choices[key]))
            raise UserError(f"config argument {key} is {values[key]!r}: choose one of {allowed}.")
    return values
