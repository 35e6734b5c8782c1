"""Stored trajectories, or the teacher inside the training step, on digits

Online, every example is a new trajectory: 38,400 of them in 1200 steps, where the store has 4352. Each costs 50 calls
of the teacher.

Two students: about 8 minutes on two CPU cores with the teacher and the store.
"""

SWEEP = {
    "config": "configs/digits.py",
    "entries": {name: {"distill.online": name == "online"} for name in ("stored", "online")},
}
