"""Makes a reference file for `evaluate.features=inception` of the real images of a config.

    python -m ard_jax evaluate --config FILE --workdir DIR --make-reference OUT.npz

OUT.npz has what ADM's reference files have: `mu`, `sigma`, `mu_s`, `sigma_s` of all images that `data` names (for
models of latents, those that `encode` names) and `arr_0`, 10,000 of them; and `about`, JSON: the images' hash and
number, the weights' hash, and the distances of two halves of the images. `evaluate.weights` names the weights, which
compute in float32 whatever `evaluate.dtype` is: a reference is kept. Stopped and started again, it goes on with the
images that it has not looked at.
"""

import pathlib

import ml_collections

from ard_jax.data import identify, image_source
from ard_jax.drawing import images_of_encode, open_images
from ard_jax.errors import UserError
from ard_jax.evaluation.inception import CHANNELS
from ard_jax.measuring.inception import load_network
from ard_jax.measuring.parts import forget_parts
from ard_jax.measuring.reference import make_reference
from ard_jax.parallel import is_first
from ard_jax.workdir import occupy


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path, path: pathlib.Path) -> None:
    """Writes the file.

    Raises:
        UserError: a setting names no weights or no images, or the path is not that of an npz file.
    """
    if path.suffix != ".npz":
        raise UserError(f"--make-reference is {path}: give the name of an .npz file.")
    folder = workdir / "reference"
    network = load_network(config)
    is_latent = config.data.space == "latent"
    data = images_of_encode(config, CHANNELS) if is_latent else config.data
    source = open_images(config, CHANNELS) if is_latent else image_source(data)
    occupy(folder)
    make_reference(network, source, identify(data, source), path, folder / "parts")
    forget_parts(folder)
    if is_first():
        print(f"written to {path}", flush=True)
