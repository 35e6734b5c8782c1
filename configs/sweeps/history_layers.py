"""History layers, N = 0 … 6 of 6, on digits

How many of the lowest layers see earlier blocks; N = 0 is step distillation. On ImageNet the paper finds N = 6 of 28
best and N = 28 worse; here N = 1 to 6 are alike (benchmarks/RESULTS.md).

Seven students: about 10 minutes on two CPU cores with the teacher and the store.
"""

SWEEP = {
    "config": "configs/digits.py",
    "entries": {f"layers_{count}": {"student.history_layers": count} for count in range(7)},
    "over": "student.history_layers",
}
