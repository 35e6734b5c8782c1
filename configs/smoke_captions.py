"""Every stage in seconds on drawn shapes with captions, with networks too small to be any good.

--config configs/smoke_captions.py[:student=NAME,mask=MASK,target=x0|xt,process=vp|flow]

Captions are encoded by the word vectors that the package wordllama ships (the extra `text`).
"""

from configs import smoke


def get_config(argument: str = ""):
    config = smoke.get_config(argument)
    with config.unlocked():
        config.data.update(source="shapes", image_size=16, channels=3, num_classes=0)
        config.captions.update(encoder="wordllama", source="data", length=16, batch_size=16, shard_size=32)
        config.model.update(
            name="PixArt", patch_size=4, hidden_size=24, depth=2, num_heads=2, learn_sigma=False, caption_width=256
        )
        config.diffusion.update(guidance_scale=2.5, guided_channels=0)
        config.evaluate.judge_steps = 20
        config.report.title = "Smoke test with captions"
    return config
