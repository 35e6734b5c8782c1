"""OpenMoji, 32×32 in colour: a teacher that draws what a caption says, and students of it.

--config configs/openmoji.py[:student=ard|step,budget=full|quick]

With budget=quick, what launch/emoji.sh makes in some ten minutes, in the folder of a shipped teacher.

3,953 pictures with captions; a tenth of the compositions of a figure and skin tones is held out of training
(ard_jax/data/openmoji_held_out.txt). Wants the extra `emoji`.
"""

from ard_jax.config import config_arguments, default_config


def get_config(argument: str = ""):
    given = config_arguments(argument, student="ard", budget="full")
    student, is_quick = given["student"], given["budget"] == "quick"
    config = default_config()
    with config.unlocked():
        config.data.update(source="openmoji", image_size=32, channels=3, num_classes=0, space="pixel")
        config.captions.update(encoder="wordllama", cleaning="lower", length=32, batch_size=256, shard_size=1024)
        config.model.update(
            name="PixArt", patch_size=4, hidden_size=192, depth=6, num_heads=6, learn_sigma=False, caption_width=256
        )
        config.diffusion.update(process="flow", steps=24, guidance_scale=2.5, guided_channels=0)
        config.teacher.update(steps=5000, batch_size=64, checkpoint_every=500)
        config.teacher.optimizer.update(name="muon", learning_rate=3e-3, schedule="cosine", warmup_steps=100, ema=0.999)
        config.trajectories.update(count=4096, points=(15, 10, 5, 0), batch_size=64, shard_size=1024)
        config.student.update(name=student, points=(15, 10, 5, 0), history_layers=2)
        config.student.mask = "diagonal" if student == "step" else "causal"
        config.distill.update(steps=3000, batch_size=32, checkpoint_every=500)
        config.distill.optimizer.update(learning_rate=6e-4, schedule="cosine", ema=0.995)
        # all of the held-out captions among them, once each
        config.sample.update(models=("teacher", student), count=2252, held_out=204, batch_size=64, grid=100)
        config.evaluate.update(paired=256, pictures=10, judge_steps=1000)
        if is_quick:
            config.trajectories.count = 1536
            config.distill.update(steps=280, checkpoint_every=140)
            config.sample.update(count=460)
            config.evaluate.update(paired=128, judge_steps=500)
        config.report.title = "OpenMoji, 32×32"
    return config
