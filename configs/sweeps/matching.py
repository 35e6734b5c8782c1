"""Distribution matching with its discriminator, on digits

What was tried for configs/compare_digits.py around what is there now, from the consistency students of the same budget:
weights of the discriminator and learning rates. The figures are in benchmarks/RESULTS.md.

Five students: about 8 minutes on two CPU cores with the teacher and the store.
"""

from configs import compare_digits

POINTS = {4: (15, 10, 5, 0), 1: (0,)}
SECTION = "distill.distribution_matching"


def matching(steps: int, rate: float, weight: float) -> dict:
    """From the consistency student of so many steps, at its budget."""
    own = {f"{SECTION}.{key}": value for key, value in compare_digits.MATCHING.items() if key != "optimizer"}
    own |= {f"{SECTION}.optimizer.{key}": value for key, value in compare_digits.MATCHING["optimizer"].items()}
    return {
        **told_the_time("distribution_matching", steps, rate, {4: 1088, 1: 1224}[steps]),
        **own,
        f"{SECTION}.weight": weight,
        "distill.start": f"consistency_{steps}",
    }


def told_the_time(objective: str, steps: int, rate: float, count: int) -> dict:
    return {
        "student.kind": "stochastic",
        "student.points": POINTS[steps],
        "distill.objective": objective,
        "distill.optimizer.learning_rate": rate,
        "distill.steps": count,
    }


SWEEP = {
    "config": "configs/digits.py",
    "entries": {
        **{f"consistency_{s}": told_the_time("consistency", s, 1.5e-3, 2446) for s in (4, 1)},
        **{f"matching_{s}_{weight:.0f}_{rate:.5f}".replace("0.", ""): matching(s, rate, weight)
           for s, weight, rate in ((4, 10.0, 1e-4), (1, 10.0, 1e-4), (1, 3.0, 5e-5))},
    },
}  # fmt: skip
