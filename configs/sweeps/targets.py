"""x0-predictions and noisy points as targets, with and without history, on digits

A noisy point (xt) carries what an x0-prediction drops, so that history matters less. The paper's ImageNet students
learn x0-predictions, its text-to-image student noisy points.

Four students: about 7 minutes on two CPU cores with the teacher and the store.
"""

SWEEP = {
    "config": "configs/digits.py",
    "entries": {
        f"{target}_{mask}": {"student.target": target, "student.mask": mask}
        for target in ("x0", "xt")
        for mask in ("causal", "diagonal")
    },
}
