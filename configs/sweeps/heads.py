"""A final layer for each step, or one for all, on digits

Separate heads start as copies of the teacher's final layer, a shared one is that layer.

Two students: about 4 minutes on two CPU cores with the teacher and the store.
"""

SWEEP = {
    "config": "configs/digits.py",
    "entries": {heads: {"student.heads": heads} for heads in ("separate", "shared")},
}
