"""python -m ard_jax STAGE --config FILE[:key=value,…] --workdir DIR [--config.key=value …]

Stages, in the order of a run:
    convert        turn weights that were trained elsewhere into a teacher, a student or a VAE
    encode         make latents of images, for a teacher of latents
    teacher        train the diffusion teacher on images
    trajectories   solve its ODE many times and store the trajectories
    distill        train a student of few steps on them (ARD, or step distillation)
    finetune       go on with one, so that a discriminator takes its images for real ones
    sample         draw images from the teacher and the students
    evaluate       measure them
    report         put it all on one page
    compare        train, measure and show many methods side by side, all stages in one command (--quick)
    export         write a model in a form that others can use
    plan           say what all of it will cost on a TPU slice, which it does not need (--topology, no --workdir)
`python -m ard_jax STAGE --help` explains a stage; configs/ has the configs.
"""

import sys

STAGES = (
    "convert", "encode", "teacher", "trajectories", "distill", "finetune", "sample", "evaluate", "report", "compare",
    "export", "plan",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Runs a stage; returns the exit status: 0 done, 2 a user's mistake, 130 interrupted."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    stage, *rest = arguments
    if stage not in STAGES:
        print(f"ard_jax: there is no stage {stage!r}: choose one of {', '.join(STAGES)}.", file=sys.stderr)
        return 2
    from ard_jax.command_line import run_stage

    return run_stage(stage, rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
