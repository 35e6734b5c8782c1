"""The adversarial fine-tune's settings, on digits

What was tried for configs/digits.py around what is there now ("chosen"): weights, the discriminator with momentum and
without, the noise that hides the 17 grey levels of real digits, heads on every other block. "weight_0" is the control:
the regression alone, for as many steps. Their figures are in benchmarks/RESULTS.md.

Nine fine-tunes: about 10 minutes on two CPU cores with the teacher, the store and the student that they start from.
"""

ADAM = {"finetune.discriminator_optimizer.name": "adamw", "finetune.discriminator_optimizer.learning_rate": 4e-3}

SWEEP = {
    "config": "configs/digits.py",
    "stages": ("teacher", "trajectories", "distill", "finetune", "sample", "evaluate"),
    "entries": {
        "chosen": {},
        "weight_0": {"finetune.weight": 0.0},
        "weight_1": {"finetune.weight": 1.0},
        "weight_10": {"finetune.weight": 10.0},
        "momentum": ADAM,
        "momentum_weight_1": {**ADAM, "finetune.weight": 1.0},
        "no_noise": {"finetune.feature_time": 0.0},
        "more_noise": {"finetune.feature_time": 0.1},
        "half_of_blocks": {"finetune.layers": (1, 3, 5)},
    },
}
