"""The masks M1–M4, on digits

What a block sees in the history layers: itself (diagonal, which is step distillation), the block before as well
(window), the noise as well (noise_and_own), or every earlier block (causal). On ImageNet the paper has FID 10.25, 4.75,
4.45 and 4.32.

Four students: about 7 minutes on two CPU cores with the teacher and the store.
"""

SWEEP = {
    "config": "configs/digits.py",
    "entries": {mask: {"student.mask": mask} for mask in ("diagonal", "window", "noise_and_own", "causal")},
}
