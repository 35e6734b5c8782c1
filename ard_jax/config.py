"""Every setting of every stage, its default and its meaning, in one visible block.

A file in `configs/` starts from `default_config()` and changes what its experiment needs; the command line overrides
single keys (`--config.student.history_layers=2`).
"""

import json
from typing import Any

import ml_collections

from ard_jax.errors import UserError


def optimizer_defaults() -> dict[str, Any]:
    return {
        "name": "adamw",  # any optimiser of optax, by its name there
        "learning_rate": 1e-4,
        "schedule": "constant",  # or "cosine", falling to 0 at the last step
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "clip": 1.0,  # global gradient norm; 0 for none
        "ema": 0.9999,  # decay of the averaged parameters, ramped up as (1 + step) / (10 + step)
    }


def network_optimizer_defaults(**changes: Any) -> dict[str, Any]:
    """The same for a network that is not averaged."""
    return {name: value for name, value in optimizer_defaults().items() if name != "ema"} | changes


def default_config() -> ml_collections.ConfigDict:
    """The paper's ImageNet-256 settings wherever docs/METHOD.md section 5 gives a number."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "data": {
                "source": "tfds",  # "digits", "tfds" or "folder"
                "name": "",  # TFDS name
                "dir": "",  # TFDS data_dir, or the folder of images
                "split": "train",
                "image_size": 32,  # side of the network's input: pixels, or latents
                "channels": 4,
                "num_classes": 1000,
                "space": "latent",  # or "pixel"
                "horizontal_flip": False,
            },
            "vae": {
                "dir": "",  # folder of an autoencoder in diffusers' format; "" for the workdir's vae/
                "batch_size": 8,  # images a device decodes at a time
            },
            "encode": {  # makes latents of images, which `data` then describes
                "source": "folder",  # as in `data`, but of the images: "digits", "tfds" or "folder"
                "name": "",
                "dir": "",
                "split": "train",
                "image_size": 256,  # pixels
                "horizontal_flip": True,  # two records an image: itself, then its mirror image
                "sample": True,  # latents drawn from the encoder's distribution; or its mean
                "dtype": "float16",  # or "bfloat16", "float32"
                "batch_size": 64,  # records a device encodes at a time
                "shard_size": 4096,  # records a file
            },
            "model": {
                "name": "",  # a published size such as "DiT-XL/2", which sets the next four
                "patch_size": 2,
                "hidden_size": 1152,
                "depth": 28,
                "num_heads": 16,
                "mlp_ratio": 4.0,
                "learn_sigma": True,
                "label_init_std": 0.02,
                "time_init_std": 0.02,
                "frequency_shift": 0.0,  # of the time's sinusoids: 0 as published, 1 in diffusers' DiT
                "mlp_norm_eps": 1e-6,  # 1e-6 as published, 1e-5 in diffusers' DiT
                "dtype": "auto",  # compute type: bfloat16 on accelerators, float32 on CPU; or either by name
                "remat": "none",  # or "dots", "full"
                "attention": "auto",  # the device's fused kernel where it applies; or "xla", "cudnn", "splash"
            },
            "diffusion": {
                "process": "vp",  # the network predicts noise; or "flow": velocity
                "train_steps": 1000,
                "beta_start": 1e-4,
                "beta_end": 0.02,
                "spacing": "linspace",  # vp only: respaced timesteps; or "leading", "trailing", in diffusers' words
                "time_scale": 1000.0,  # flow only: length of the network's time
                "reversed": False,  # flow only: network time 0 is noise and the velocity is x_0 − ε, as in SiT
                "solver": "ddim",  # or "heun", "dpm++2m"
                "steps": 25,
                "guidance_scale": 1.5,
                "guided_channels": 3,  # 0 for all
                "guidance_interval": (0.0, 1.0),
            },
            "teacher": {
                "dir": "",  # a teacher trained elsewhere: the `teacher` folder of its workdir
                "steps": 400_000,
                "batch_size": 256,
                "accumulate": 1,  # microbatches a step: less memory for the same batch
                "label_dropout": 0.1,
                "checkpoint_every": 5000,
                "optimizer": optimizer_defaults(),
            },
            "trajectories": {
                "dir": "",  # a store made elsewhere: the `trajectories` folder of its workdir
                "count": 2_560_000,
                "points": (15, 10, 5, 0),  # respaced indices that are kept, counted down to the data
                "keep_noisy": False,  # keep the noisy points beside the x0-predictions
                "dtype": "float16",  # or "bfloat16", "float32"
                "batch_size": 64,  # trajectories a device solves at a time
                "shard_size": 4096,  # trajectories a file
                "max_abs": 0.0,  # trajectories that leave [-max_abs, max_abs] are dropped; 0 keeps all
            },
            "student": {
                "name": "ard",  # its folder under distill/
                "kind": "history",  # an ARDStudent; or a network that is told the time, sampled "deterministic"ally by
                # DDIM or "stochastic"ally with fresh noise after each step
                "points": (15, 10, 5, 0),  # S respaced indices out of the store's
                "target": "x0",  # predicted x0 at each point, or "xt": the noisy point itself
                "history_layers": 6,
                "mask": "causal",
                "heads": "separate",  # or "shared"
                "block_times": (),  # network time of each block; () for T·(S−b)/S
            },
            "distill": {
                "objective": "ard",  # or "progressive", "consistency", "distribution_matching", or your.own.module
                "start": "",  # name of a student to start from, and in progressive distillation to learn from
                "online": False,  # solve the teacher inside the training step; no store is read
                "steps": 300_000,
                "batch_size": 64,
                "accumulate": 1,
                "checkpoint_every": 5000,
                "optimizer": optimizer_defaults(),
                "consistency": {
                    "grid": 0,  # steps of the teacher's that a trajectory has; 0 for the teacher's own number, made a
                    # multiple of the student's
                    "decay": 0.95,  # of the target, the running average of the student
                    "huber": 0.00054,  # constant of the pseudo-Huber distance; 0 for the mean square
                },
                "distribution_matching": {
                    "ratio": 5,  # steps of the fake score to one of the student
                    "grid": 100,  # times at which scores are compared, spread over the teacher's
                    "interval": (0.02, 0.98),  # of these, those on this part of the way from data to noise
                    "optimizer": network_optimizer_defaults(),  # of the fake score
                },
            },
            "finetune": {  # a trained student goes on, with a discriminator beside it
                "name": "ard_adversarial",  # its folder under distill/
                "start": "",  # name of the student that it starts from; "" for student.name
                "steps": 40_000,
                "batch_size": 48,
                "accumulate": 1,  # no more: the discriminator's norm and the adaptive weight are of the whole batch
                "checkpoint_every": 5000,
                "warmup": 3000,  # first steps, in which the discriminator learns and the student only regresses
                "weight": 10.0,  # of the adversarial gradient over the regression's, at the last head
                "layers": (),  # blocks of the teacher that have a head, counted from 0; () for all
                "feature_time": 0.0,  # share of the way from data to noise at which the teacher sees images, noised so
                "spectral_rounds": 30,  # power iterations of the discriminator's kernels before the first step
                "optimizer": optimizer_defaults(),
                "discriminator_optimizer": network_optimizer_defaults(learning_rate=1e-3, clip=0.0),
            },
            "sample": {
                "models": ("teacher", "ard"),  # "teacher", or names of students
                "count": 50_000,
                "batch_size": 64,  # a device
                "seed": 1,
                "labels": (),  # classes to draw, in turn; () for labels drawn uniformly
                "grid": 64,  # pictures in the PNG
            },
            "evaluate": {
                "paired": 512,  # trajectories for the errors that are paired with the teacher
                "pictures": 16,
                "feature_steps": 600,  # training steps of the small classifier
                "neighbours": 3,
            },
            "report": {"title": "ard_jax"},
            "compare": {
                "methods": {},  # by name, each as `method_defaults` says; all of them get the training FLOPs that the
                # config's own student would take, but for a fine-tune, which has its own number of steps
                "steps": (1, 2, 4),  # S that are compared
                "points": ((0,), (10, 0), (15, 10, 5, 0)),  # student.points of every S
                "seeds": (0,),  # each with its own teacher, trajectories and students
                "quick": {},  # what --quick changes, nested as the config is
            },
            "mesh": {  # how many devices lie along each axis; one may be -1, for what the others leave
                "data": -1,  # share the batch
                "fsdp": 1,  # share the batch and keep a part of the parameters and the optimiser's state each
                "tensor": 1,  # share each layer's heads and MLP; within a host
            },
            "run": {  # how a run shows itself; may change between restarts
                "log_every": 100,
                "keep_checkpoints": 2,
                "tensorboard": True,
                "join_timeout": 300.0,  # seconds that a host waits for the others at the start
                "workers": 2,  # threads that read data
                "in_memory": 2**30,  # bytes of data that may be held decoded in memory
            },
        }
    )


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


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict → dotted keys."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON gives it back: tuples have become lists."""
    return json.loads(json.dumps(config.to_dict()))


def config_arguments(text: str | None, **defaults: Any) -> dict[str, Any]:
    """Parses what follows the colon of `--config FILE:key=value,key=value`, typed as the defaults are.

    Raises:
        UserError: a key that the file does not have, or a value of the wrong type.
    """
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
    return values
