"""Every method on OpenMoji's captions, 32×32, at one training budget: that of ARD in four steps (configs/openmoji.py).

The teacher is the shipped one, which is put in a workdir of its own first:

python -m ard_jax convert --source pipelines/openmoji-teacher --workdir runs/openmoji_teacher
python -m ard_jax compare --config configs/compare_openmoji.py --workdir runs/compare_openmoji [--quick]

--config configs/compare_openmoji.py:budget=4 trains everything four times as long, for a workdir of its own. Wants the
extra `emoji`. Nothing has been measured with it yet.
"""

from ard_jax.config import config_arguments
from configs import compare_digits, openmoji

TEACHER = "runs/openmoji_teacher/teacher"
# Of 24 steps; an eight-step student is told the time, and its points are read for their number alone.
EIGHT = (21, 18, 15, 12, 10, 8, 5, 0)


def get_config(argument: str = ""):
    given = config_arguments(argument, budget=1, teacher=TEACHER)
    config = openmoji.get_config()
    with config.unlocked():
        config.teacher.dir = given["teacher"]
        config.trajectories.update(count=8192, points=EIGHT)
        # with x0 points, as the methods that it is compared with have; some 20 minutes a method and S on two cores
        config.distill.update(steps=1000 * given["budget"], batch_size=16, checkpoint_every=500)
        config.run.sample_every = 0  # its page shows no training
        config.sample.count = 1024 + 204
        config.compare.points = ((0,), (10, 0), (15, 10, 5, 0), EIGHT)
        config.compare.methods = compare_digits.get_config().compare.methods
        config.compare.methods.matching.settings.distill.distribution_matching.layers = (0, 2, 4)  # of five blocks
        config.compare.methods.noisy = {
            "title": "ARD, noisy points",
            "steps": (2, 4),
            "settings": {"student": {"target": "xt"}},
        }
        config.compare.quick = {
            "trajectories": {"count": 128},
            "distill": {"steps": 24, "optimizer": {"warmup_steps": 2}},
            "finetune": {"steps": 8, "warmup": 2},
            "sample": {"count": 128 + 32, "held_out": 32},
            "evaluate": {"paired": 64, "judge_steps": 200},
        }
        config.report.title = "OpenMoji, 32×32"
    return config
