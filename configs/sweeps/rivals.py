"""Learning rates of the rival methods, on digits

What was tried for configs/compare_digits.py, at equal steps: consistency distillation, progressive distillation round
by round, distribution matching without a discriminator from the teacher and from a consistency student, mean flow, and
trajectory matching. configs/sweeps/matching.py has distribution matching with its discriminator.

Thirty-one students of 600 steps: about 38 minutes on two CPU cores with the teacher and the store.
"""

EIGHT = (15, 13, 12, 10, 8, 5, 3, 0)
POINTS = {8: EIGHT, 4: (15, 10, 5, 0), 2: (10, 0), 1: (0,)}


def student(kind: str, objective: str, steps: int, rate: float, **more) -> dict:
    return {
        "student.kind": kind,
        "student.points": POINTS[steps],
        "distill.objective": objective,
        "distill.optimizer.learning_rate": rate,
        **more,
    }


def consistency(steps: int, rate: float) -> dict:
    return student("stochastic", "consistency", steps, rate)


def progressive(steps: int, rate: float, start: str) -> dict:
    return student("deterministic", "progressive", steps, rate, **{"distill.start": start})


def matching(steps: int, rate: float, fake: float, start: str = "") -> dict:
    more = {"distill.distribution_matching.optimizer.learning_rate": fake, "distill.start": start}
    more |= {"distill.distribution_matching.weight": 0.0}
    return student("stochastic", "distribution_matching", steps, rate, **more)


def mean_flow(steps: int, rate: float) -> dict:
    return student("deterministic", "mean_flow", steps, rate)


def trajectory(steps: int, rate: float, fake: float, start: str) -> dict:
    more = {"distill.trajectory_matching.optimizer.learning_rate": fake, "distill.start": start}
    return student("deterministic", "trajectory_matching", steps, rate, **more)


SWEEP = {
    "config": "configs/digits.py",
    "settings": {"trajectories.points": EIGHT, "distill.steps": 600},
    "entries": {
        **{f"consistency_{s}_{rate:.4f}".replace(".", ""): consistency(s, rate)
           for s in (4, 1) for rate in (5e-4, 1.5e-3, 4e-3)},
        **{f"progressive_8_{rate:.4f}".replace(".", ""): progressive(8, rate, "") for rate in (5e-4, 1.5e-3, 4e-3)},
        **{f"progressive_4_{rate:.4f}".replace(".", ""): progressive(4, rate, "progressive_8_00005")
           for rate in (2e-4, 5e-4, 1.5e-3)},
        "progressive_2_00005": progressive(2, 5e-4, "progressive_4_00005"),
        **{f"progressive_1_{rate:.4f}".replace(".", ""): progressive(1, rate, "progressive_2_00005")
           for rate in (5e-4, 1.5e-3)},
        **{f"matching_{s}_{rate:.4f}".replace(".", ""): matching(s, rate, rate)
           for s in (4, 1) for rate in (1e-4, 3e-4, 1e-3)},
        **{f"matching_{s}_started_{rate:.4f}".replace(".", ""): matching(s, rate, fake, f"consistency_{s}_00015")
           for s in (4, 1) for rate, fake in ((3e-4, 3e-4), (1e-4, 1e-3))},
        **{f"mean_flow_{s}_{rate:.4f}".replace(".", ""): mean_flow(s, rate) for s in (4, 1) for rate in (5e-4, 1.5e-3)},
        **{f"trajectory_4_{rate:.5f}".replace(".", ""): trajectory(4, rate, 5e-4, "mean_flow_4_00015")
           for rate in (1e-5, 5e-5)},
    },
}  # fmt: skip
