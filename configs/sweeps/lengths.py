"""Training steps, with and without history, on digits

Each entry is a training of its own with its learning rate falling to 0 at its end, so that a point on the line is what
a training of that length gives. Checkpoints on the way of one long training would score worse than that.

Ten students, as much training as four of the longest: about 9 minutes on two CPU cores with the teacher and the store.
"""

SWEEP = {
    "config": "configs/digits.py",
    "entries": {
        f"{mask}_{steps}": {"distill.steps": steps, "student.mask": mask}
        for mask in ("causal", "diagonal")
        for steps in (75, 150, 300, 600, 1200)
    },
    "over": "distill.steps",
}
