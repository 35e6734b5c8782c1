"""PixArt-Σ at 1024 px into a student of three calls, by the paper's text-to-image recipe (docs/METHOD.md, section 8).

--config configs/pixart_sigma_1024.py[:steps=3,history_layers=1,mask=causal]

Teacher: PixArt-Sigma-XL-2-1024-MS (611 M parameters), converted from its diffusers folder or the authors' file. The
paper's own teacher is closed; what is known of its recipe is kept: 48 teacher steps, computed inside the training step
from captions alone, S = 3, N = 1, noisy points, regression only, 15 k iterations. Captions are any text file's.

    python -m ard_jax convert --source hf:PixArt-alpha/PixArt-Sigma-XL-2-1024-MS --workdir runs/sigma
    C="--config configs/pixart_sigma_1024.py --workdir runs/sigma"
    python -m ard_jax captions $C --config.captions.path=prompts.txt --config.captions.encoder=FOLDER
    python -m ard_jax distill $C
"""

from ard_jax.config import config_arguments, default_config

POINTS = {3: (32, 16, 0), 4: (36, 24, 12, 0), 2: (24, 0), 1: (0,)}  # of 48 steps; the first is the recipe's
NAME, SIDE, LENGTH, CLEANING = "PixArt-Sigma-XL-2-1024-MS", 1024, 300, "none"


def get_config(argument: str = ""):
    return recipe(argument, NAME, SIDE, LENGTH, CLEANING)


def recipe(argument: str, name: str, side: int, length: int, cleaning: str):
    given = config_arguments(argument, steps=tuple(POINTS), history_layers=1, mask="causal")
    points = POINTS[given["steps"]]
    config = default_config()
    with config.unlocked():
        config.model.name = name
        config.model.remat = "full"
        config.mesh.update(data=1, fsdp=-1)
        config.data.update(source="tfds", image_size=side // 8, channels=4, num_classes=0, space="latent")
        config.captions.update(source="file", length=length, cleaning=cleaning)
        config.diffusion.update(steps=48, guidance_scale=4.5, guided_channels=0)
        config.trajectories.update(points=points, keep_noisy=True, count=43_000, batch_size=1)
        config.student.update(
            name="step" if given["mask"] == "diagonal" else "ard",
            points=points,
            target="xt",
            history_layers=given["history_layers"],
            mask=given["mask"],
        )
        config.distill.update(online=True, steps=15_000, batch_size=16, checkpoint_every=1000)
        config.sample.update(count=5000, batch_size=1)
        config.vae.batch_size = 1
        config.report.title = name
    return config
