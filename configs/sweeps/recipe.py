"""The default recipe's adversarial fine-tune, on digits

ARD with noisy points, then a fine-tune of some weight, around what the recipe has (1). "weight_0" is the control: the
regression alone, for as many steps. Their figures are in benchmarks/RESULTS.md.

Five fine-tunes: about 6 minutes on two CPU cores with the teacher, the store and the student that they start from.
"""

SWEEP = {
    "config": "configs/digits.py:student=ard_noisy",
    "stages": ("teacher", "trajectories", "distill", "finetune", "sample", "evaluate"),
    "entries": {
        "weight_3": {"finetune.weight": 3.0},
        "weight_0": {"finetune.weight": 0.0},
        "weight_03": {"finetune.weight": 0.3},
        "weight_1": {},
        "half_of_blocks": {"finetune.layers": (1, 3, 5)},
    },
}
