"""Weights of the steps' losses, and another distance, on digits

ARD with noisy points as configs/digits.py has it ("square"), with pseudo-Huber distances, and with the first or the
last steps weighing more. Their figures are in benchmarks/RESULTS.md.

Five students: about 6 minutes on two CPU cores with the teacher and the store.
"""

SWEEP = {
    "config": "configs/digits.py:student=ard_noisy",
    "entries": {
        "square": {},
        "huber_01": {"distill.ard.huber": 0.1},
        "huber_003": {"distill.ard.huber": 0.03},
        "early": {"distill.ard.step_weights": (4.0, 2.0, 1.0, 1.0)},
        "late": {"distill.ard.step_weights": (1.0, 1.0, 2.0, 4.0)},
    },
}
