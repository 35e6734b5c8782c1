"""PixArt-α at 512 px into a student of three calls: configs/pixart_sigma_1024.py's recipe for the smaller teacher.

--config configs/pixart_alpha_512.py[:steps=3,history_layers=1,mask=causal]

α cleans its captions as it was trained with, and has every public student of few steps as a rival.
"""

from configs.pixart_sigma_1024 import recipe


def get_config(argument: str = ""):
    config = recipe(argument, "PixArt-XL-2-512x512", side=512, length=120, cleaning="clean")
    with config.unlocked():
        config.distill.batch_size = 64
        config.trajectories.batch_size = 4
        config.sample.batch_size = 4
    return config
