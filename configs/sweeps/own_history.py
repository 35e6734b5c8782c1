"""The student's own history, on digits

ARD that learns from its own points of the moment, as it is sampled, where the paper's learns from the teacher's; with
x0 points and noisy ones. A step of it costs a third more, so that it has three quarters of the steps. Their figures are
in benchmarks/RESULTS.md.

Four students: about 5 minutes on two CPU cores with the teacher and the store.
"""

OWN = {"distill.ard.own_history": True, "distill.steps": 900}
NOISY = {"student.target": "xt"}

SWEEP = {
    "config": "configs/digits.py",
    "entries": {"teacher_s": {}, "own": OWN, "noisy_teacher_s": NOISY, "noisy_own": NOISY | OWN},
}
