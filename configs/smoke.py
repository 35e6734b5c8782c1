"""Every stage in seconds, on real digits with networks too small to be any good: for tests and for a first look.

--config configs/smoke.py[:student=NAME,mask=MASK,target=x0|xt,process=vp|flow]
"""

from ard_jax.config import config_arguments
from configs import digits


def get_config(argument: str = ""):
    given = config_arguments(argument, student="ard", mask="causal", target="x0", process="vp")
    config = digits.get_config()
    with config.unlocked():
        config.model.update(hidden_size=16, depth=2, num_heads=2)
        config.diffusion.update(process=given["process"], steps=5)
        config.teacher.update(steps=20, batch_size=16, checkpoint_every=5)
        config.trajectories.update(count=24, points=(3, 2, 1, 0), batch_size=4, shard_size=8, max_abs=0.0)
        config.student.update(
            name=given["student"], points=(3, 1, 0), history_layers=1, mask=given["mask"], target=given["target"]
        )
        config.distill.update(steps=20, batch_size=8, checkpoint_every=5)
        config.finetune.update(steps=20, batch_size=8, checkpoint_every=5, warmup=5)
        config.sample.update(models=("teacher", given["student"]), count=72, batch_size=24, grid=16)
        config.evaluate.update(paired=8, pictures=4, feature_steps=20)
        config.run.update(log_every=5, loggers=())
        config.report.title = "Smoke test"
    return config
