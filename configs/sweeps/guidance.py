"""The teacher's guidance scale, on digits

One teacher; the trajectories, and with them the student and the teacher's own samples, are those of each scale. A scale
of 1 is no guidance.

Four stores and students: about 10 minutes on two CPU cores with the teacher.
"""

SWEEP = {
    "config": "configs/digits.py",
    "entries": {
        f"scale_{scale:g}".replace(".", "-"): {"diffusion.guidance_scale": scale} for scale in (1.0, 1.5, 2.0, 3.0)
    },
    "over": "diffusion.guidance_scale",
}
