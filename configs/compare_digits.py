"""Every method on scikit-learn's digits, 8×8, at one training budget: that of ARD in four steps (configs/digits.py).

Two cores took 14.5 minutes a seed, and 5.1 with --quick, before the last three came. Fréchet distances (classifier
features), means of seeds 0, 1 and 2, teacher 7.43, in four steps: step distillation 16.66, distribution matching 11.12,
progressive 10.08, consistency 9.08, ARD 8.73, with the adversarial fine-tune 7.08; in one: knowledge distillation 7.70.
Mean flow, trajectory matching and the discriminator of distribution matching came later: at seed 0, in four steps,
7.50, 5.80 and 6.60.

python -m ard_jax compare --config configs/compare_digits.py --workdir runs/compare [--quick]
"""

from configs import digits

# An eight-step student is told the time, and its points are read for their number alone; the store keeps them all.
EIGHT = (15, 13, 12, 10, 8, 5, 3, 0)

# Of a discriminator on every other block of the teacher; RMSprop and the little noise are the adversarial fine-tune's.
MATCHING = {
    "ratio": 2,
    "interval": (0.02, 0.5),
    "optimizer": {"learning_rate": 5e-4, "schedule": "cosine"},
    "weight": 3.0,
    "layers": (1, 3, 5),
    "feature_time": 0.03,
}

# Of trajectory matching, whose fake score must keep up as well.
TRACKING = {"optimizer": {"learning_rate": 5e-4, "schedule": "cosine"}}


def told_the_time(kind: str, objective: str, learning_rate: float, **own) -> dict:
    """What the rivals change, whose students are networks like the teacher; `own` are the objective's settings."""
    distill = {
        "objective": objective,
        "optimizer": {"learning_rate": learning_rate},
        **({objective: own} if own else {}),
    }
    return {"student": {"kind": kind}, "distill": distill}


def get_config(argument: str = ""):
    config = digits.get_config(argument)
    with config.unlocked():
        config.trajectories.points = EIGHT
        config.compare.points = ((0,), (10, 0), (15, 10, 5, 0), EIGHT)
        config.compare.methods = {
            "knowledge": {"title": "Knowledge distillation", "steps": (1,)},
            "step": {
                "title": "Step distillation",
                "steps": (2, 4),
                "settings": {"student": {"mask": "diagonal"}},
            },
            "ard": {"title": "ARD", "steps": (2, 4)},
            "adversarial": {"title": "ARD + adversarial", "stage": "finetune", "start": "ard", "steps": (4,)},
            "progressive": {
                "title": "Progressive distillation",
                "steps": (8, 4, 2, 1),
                "chain": True,
                "settings": told_the_time("deterministic", "progressive", 1.5e-3),
                "settings_at": {"8": {"distill": {"optimizer": {"learning_rate": 5e-4}}}},
            },
            "consistency": {
                "title": "Consistency distillation",
                "settings": told_the_time("stochastic", "consistency", 1.5e-3),
            },
            "matching": {  # from the teacher it reaches less, see configs/sweeps/rivals.py
                "title": "Distribution matching, from consistency",
                "start": "consistency",
                "settings": told_the_time("stochastic", "distribution_matching", 5e-5, **MATCHING),
                "settings_at": {
                    "4": told_the_time("stochastic", "distribution_matching", 1e-4, weight=10.0),
                },
            },
            "mean_flow": {  # at one step it runs away, see benchmarks/RESULTS.md
                "title": "Mean flow",
                "steps": (4,),
                "settings": told_the_time("deterministic", "mean_flow", 1.5e-3),
            },
            "trajectory": {
                "title": "Trajectory matching, from mean flow",
                "start": "mean_flow",
                "steps": (4,),
                "settings": told_the_time("deterministic", "trajectory_matching", 5e-5, **TRACKING),
            },
        }
        config.compare.quick = {
            "teacher": {"steps": 700},
            "trajectories": {"count": 1088},
            "distill": {"steps": 200},
            "finetune": {"steps": 60, "warmup": 10},
            "sample": {"count": 768},
            "evaluate": {"paired": 256, "feature_steps": 300},
        }
        config.report.title = "Handwritten digits, 8×8"
    return config
