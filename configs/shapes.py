"""Drawn shapes with captions, large enough to be right: a small PixArt that heeds its captions, and students of it.

--config configs/shapes.py[:student=ard|step]

48 captions such as "a small red circle", 96 pictures of 16 pixels; velocity prediction, 24 steps, guidance 2.5. That
captions reach a student is what it shows; there is nothing in it to rank methods by.
"""

from ard_jax.config import config_arguments
from configs import smoke_captions


def get_config(argument: str = ""):
    given = config_arguments(argument, student="ard")
    config = smoke_captions.get_config("process=flow")
    with config.unlocked():
        config.model.update(hidden_size=128, depth=4, num_heads=4, patch_size=2)
        config.diffusion.update(steps=24, guidance_scale=2.5)
        config.teacher.update(steps=1500, batch_size=64, checkpoint_every=500)
        config.teacher.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=50, ema=0.995)
        config.trajectories.update(count=1024, points=(15, 10, 5, 0), batch_size=64, shard_size=512)
        config.student.update(name=given["student"], points=(15, 10, 5, 0), history_layers=2)
        config.student.mask = "diagonal" if given["student"] == "step" else "causal"
        config.distill.update(steps=600, batch_size=32, checkpoint_every=300)
        config.distill.optimizer.update(learning_rate=6e-4, schedule="cosine")
        # each caption twice, in the order of the drawn ones
        config.sample.update(models=("teacher", given["student"]), count=96, batch_size=48, grid=96)
        config.sample.labels = tuple(range(96))
        config.evaluate.update(paired=64, pictures=8, feature_steps=200)
        config.run.log_every = 100
        config.report.title = "Drawn shapes"
    return config
