"""ImageNet 256×256 in the latents of Stable Diffusion's VAE, the paper's main experiment (docs/METHOD.md).

--config configs/imagenet256.py[:steps=4|2|1,mask=causal|diagonal|window|noise_and_own,recipe=paper|default]

Teacher: the published DiT-XL/2 (675 M parameters, 118.6 GMAC a call). The paper's numbers, which have not been
reproduced here: 2.56 M trajectories of 25 DDIM steps with guidance 1.5 (5931 GMAC each), then 300 k distillation steps,
nearly converged at 100 k, in two days on eight A100s; FID 4.32 for S = 4, N = 6 against the teacher's 2.89.
The store takes 105 GB at S = 4 in float16. On sixteen TPU v5e chips the training step takes 5.4 of a chip's 16.9 GB
(python -m ard_jax plan --config configs/imagenet256.py --topology v5e:4x4).

recipe=default is docs/RECIPES.md's, learned on small data and not measured on ImageNet: noisy points, whose store takes
twice as much, and a fine-tune whose discriminator has no momentum.
"""

from ard_jax.config import config_arguments, default_config

POINTS = {4: (15, 10, 5, 0), 2: (10, 0), 1: (0,)}
BATCH_SIZES = {4: 64, 2: 128, 1: 256}


def get_config(argument: str = ""):
    given = config_arguments(argument, steps=tuple(POINTS), mask="causal", recipe=("paper", "default"))
    steps = given["steps"]
    config = default_config()
    with config.unlocked():
        config.model.name = "DiT-XL/2"
        # fits chips of 16 GB; nearly nothing is computed twice but on v6e, whose memory is slow for its cores; the
        # optimiser's state is split over eight chips, and where there are as many chips as rows, two share a layer
        config.model.remat = "auto"
        config.mesh.update(data=1, fsdp=-1, tensor=-1)
        config.data.update(source="tfds", image_size=32, channels=4, num_classes=1000, space="latent")
        config.trajectories.points = POINTS[4]  # one store serves students of several S
        config.student.update(points=POINTS[steps], mask=given["mask"], history_layers=6)
        config.student.name = "step" if given["mask"] == "diagonal" else "ard"
        config.distill.update(steps=300_000, batch_size=BATCH_SIZES[steps])
        if given["recipe"] == "default":
            # a noisy point carries the noise that an x0 point drops: on digits ARD loses two fifths as much with it
            config.trajectories.keep_noisy = True
            config.student.update(name=f"{config.student.name}_noisy", target="xt")
            # outliers weigh less: nearer to the data and to the teacher
            config.distill.ard.huber = 0.03
            # more weight lowers FD at precision's cost; with momentum the two networks run away from the data; a
            # little noise hides what tells real latents by their digits rather than by what they show
            config.finetune.update(weight=0.6, feature_time=0.03)
            config.finetune.discriminator_optimizer.name = "rmsprop"
        config.report.title = "ImageNet 256×256"
    return config
