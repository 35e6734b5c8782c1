"""Where the student's points lie, on digits, with noisy points

Two cheap measures of a jump from one of the teacher's 25 steps to another were summed over the student's four jumps,
and the least sum found by dynamic programming on 1,024 stored trajectories: the error of one DDIM step with the
teacher's own prediction ("ddim"), and that of the best linear guess ("linear"). "paper" has 15, 10, 5, 0. The store
keeps all points, of which the first, a guess at pure noise, is as large as the noise: bounds would drop every
trajectory, so there are none. What the students then reached is in benchmarks/RESULTS.md.

Four students: about 5 minutes on two CPU cores with the teacher and the store.
"""

SWEEP = {
    "config": "configs/digits.py:student=ard_noisy",
    "settings": {"trajectories.points": tuple(range(24, -1, -1)), "trajectories.max_abs": 0.0},
    "entries": {
        "paper": {},
        "even": {"student.points": (18, 12, 6, 0)},
        "ddim": {"student.points": (21, 14, 6, 0)},
        "linear": {"student.points": (13, 9, 6, 0)},
    },
}
