"""Steps, S = 1 … 5, with and without history, on digits

The points divide the teacher's lowest 20 of 25 steps evenly, as the paper's 15, 10, 5, 0 do; one store has them all.
S = 1 is knowledge distillation, which has no history to see.

Nine students of 1 to 5 blocks: about 12 minutes on two CPU cores with the teacher and the store.
"""

POINTS = {1: (0,), 2: (10, 0), 3: (13, 7, 0), 4: (15, 10, 5, 0), 5: (16, 12, 8, 4, 0)}

SWEEP = {
    "config": "configs/digits.py",
    "settings": {"trajectories.points": tuple(sorted({*sum(POINTS.values(), ())}, reverse=True))},
    "entries": {
        f"{mask}_{steps}": {"student.points": points, "student.mask": mask}
        for mask in ("causal", "diagonal")
        for steps, points in POINTS.items()
        if (mask, steps) != ("diagonal", 1)
    },
    "over": "student.points",
}
