"""The default recipe's adversarial fine-tune, on digits

ARD with noisy points and a pseudo-Huber distance, then a fine-tune of some weight, around what the recipe has (0.6).
"weight_0" is the control: the regression alone, for as many steps. Their figures are in benchmarks/RESULTS.md.

Six fine-tunes: about 7 minutes on two CPU cores with the teacher, the store and the student that they start from.
"""

SWEEP = {
    "config": "configs/digits.py:recipe=default",
    "stages": ("teacher", "trajectories", "distill", "finetune", "sample", "evaluate"),
    "entries": {
        "weight_3": {"finetune.weight": 3.0},
        "weight_0": {"finetune.weight": 0.0},
        "weight_03": {"finetune.weight": 0.3},
        "weight_06": {},
        "weight_1": {"finetune.weight": 1.0},
        "half_of_blocks": {"finetune.layers": (1, 3, 5)},
    },
}
