"""A time for each block, or one for all, on digits

The paper gives the tokens of each block their own time, T·(S−b)/S. With a shared one, the time of noise or a middle
one, the network has to tell the blocks apart by what is in them.

Three students: about 6 minutes on two CPU cores with the teacher and the store.
"""

SWEEP = {
    "config": "configs/digits.py",
    "entries": {
        "own": {"student.block_times": ()},
        "shared_noise": {"student.block_times": (999.0,) * 4},
        "shared_middle": {"student.block_times": (499.5,) * 4},
    },
}
