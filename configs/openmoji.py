"""OpenMoji, 32×32 in colour: a teacher that draws what a caption says, and students of it.

--config configs/openmoji.py[:student=NAME,steps=4|2|1,target=x0|xt,told=captions|groups|subgroups,
budget=full|cpu|quick]

The student is called NAME; one whose name begins with "step" is step distillation, any other ARD. It draws in `steps`
calls; one of fewer is trained for more updates, at the same FLOPs.

3,953 pictures with captions; a tenth of the compositions of a figure and skin tones is held out of training
(ard_jax/data/openmoji_held_out.txt). With told=groups or subgroups, a DiT is told one of Unicode's 10 groups or 101
sub-groups. With budget=cpu, students of a third as many pictures, an hour and a half each on a core of its own, after
40 minutes of trajectories on two; with budget=quick, what launch/emoji.sh makes in some twenty minutes. Both want the
shipped teacher in the workdir. Wants the extra `emoji`.
"""

from ard_jax.config import config_arguments, default_config

# The pipelines that are shipped, and the SHA-256 of the weights in them.
SHIPPED = {
    "pipelines/openmoji-teacher/teacher": "a467bca033a9ed53651b5776e1d6835abf21f6f6dc43823804be4d773aea9880",
    "pipelines/openmoji-ard/student": "61cabf15ebf9d3bcda76db6d30088a53dd74636c6195fd8db5b37d0413c85821",
}
CLASSES = {"captions": 0, "groups": 10, "subgroups": 101}
POINTS = {4: (15, 10, 5, 0), 2: (10, 0), 1: (0,)}


def get_config(argument: str = ""):
    given = config_arguments(
        argument,
        student="ard",
        steps=tuple(POINTS),
        target=("x0", "xt"),
        told=tuple(CLASSES),
        budget=("full", "cpu", "quick"),
    )
    student, classes, points = given["student"], CLASSES[given["told"]], POINTS[given["steps"]]
    config = default_config()
    with config.unlocked():
        config.data.update(source="openmoji", image_size=32, channels=3, num_classes=classes, space="pixel")
        config.captions.update(encoder="wordllama", cleaning="lower", length=32, batch_size=256, shard_size=1024)
        config.model.update(patch_size=4, hidden_size=256, depth=5, num_heads=8, learn_sigma=False)
        if not classes:
            config.model.update(name="PixArt", caption_width=256)
        config.model.remat = "auto"  # on a CPU a fifth faster than to keep all
        config.diffusion.update(process="flow", steps=24, guidance_scale=2.5, guided_channels=0)
        # 4 minutes on an H200, 28 hours on two cores; 5,000 steps of batch 64 take an hour and draw people, not things
        config.teacher.update(steps=13000, batch_size=512, checkpoint_every=2000)
        # by its loss, four steps of muon do what five of adamw do at its best rate; each costs a seventh more
        config.teacher.optimizer.update(name="muon", learning_rate=2e-3, schedule="cosine", warmup_steps=200, ema=0.999)
        config.trajectories.update(count=8192, points=POINTS[4], batch_size=256, shard_size=1024, keep_noisy=True)
        config.student.update(name=student, points=points, history_layers=2)
        config.student.target = given["target"]
        config.student.mask = "diagonal" if student.startswith("step") else "causal"
        config.distill.update(steps=1000, batch_size=128, checkpoint_every=500)
        config.distill.optimizer.update(name="muon", learning_rate=1e-3, schedule="cosine", warmup_steps=20, ema=0.995)
        config.run.sample_every = 500
        config.sample.update(models=("teacher", student), count=2048, batch_size=64, grid=100)
        if not classes:  # and each of the held-out captions once
            config.sample.update(count=2048 + 204, held_out=204)
        config.evaluate.update(paired=256, pictures=10)
        if given["budget"] == "cpu":
            # 4,096 were learnt by heart: two steps had 26 to 27 dB after 38,400 examples, and have 28.4 of these
            config.trajectories.update(count=12288)
            config.distill.update(steps=2400, batch_size=16, checkpoint_every=500)
            config.run.sample_every = 0
        if given["budget"] == "quick":
            config.trajectories.update(count=1024, batch_size=64)
            config.distill.update(steps=340, batch_size=16, checkpoint_every=170)
            config.sample.count = 460
            config.run.sample_every = 0  # a sampler takes longer to compile than a hundredth of the training
            config.evaluate.update(paired=128, judge_steps=500)
        config.distill.steps = config.distill.steps * len(POINTS[4]) // len(points)
        config.report.title = "OpenMoji, 32×32"
    return config
