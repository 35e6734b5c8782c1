"""How fast FID's Inception is, of `evaluate`, and what it costs on TPUs.

    python -m benchmarks.inception speed [--seconds 120]       # beside torch-fidelity's, in turns, on this machine
    python -m benchmarks.inception compile [--topology v5e:4x4]  # ahead of time, by libtpu, on no TPU

Weights are random, images 256×256. `speed` needs what the extra `oracles` says (requirements/oracles.txt).
"""

import argparse
import importlib
import importlib.util
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.evaluation import InceptionFeatures
from ard_jax.evaluation.inception import BATCH_SIZE, forward, parameter_shapes, published_shapes, shardings_over
from ard_jax.models import jaxprs
from ard_jax.parallel import make_mesh
from ard_jax.plan.cost import Cost, measure
from ard_jax.plan.programs import Work
from ard_jax.plan.topology import Slice, find_slice
from ard_jax.types import Params
from ard_jax.weights.tensors import write_tensors
from benchmarks.measure import in_turns, spread

SIDE = 256


def random_state_dict(seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict with the published names, of a scale that neither dies out nor grows from layer to layer."""
    rng = np.random.RandomState(seed)  # its numbers never change, and tests/golden has what comes of them

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("conv.weight"):
            return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        if name.startswith("fc."):
            return rng.normal(size=shape) * (0.05 if name == "fc.weight" else 1)
        if name.endswith(("bn.weight", "running_var")):
            return rng.uniform(0.7, 1.3, shape)
        return rng.normal(size=shape) * 0.2  # biases and running means

    return {name: draw(name, shape).astype(np.float32) for name, shape in sorted(published_shapes().items())}


def torch_fidelity(weights: dict[str, np.ndarray], folder: pathlib.Path) -> Callable[[np.ndarray], tuple]:
    """torch-fidelity's network; its package imports torchvision, which this part does without."""
    import torch

    spec = importlib.util.find_spec("torch_fidelity")
    assert spec is not None, "needs torch-fidelity: requirements/oracles.txt says how"
    sys.modules["torch_fidelity"] = importlib.util.module_from_spec(spec)
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    path = folder / "weights.pth"
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, path)
    net = module.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )

    def features(images: np.ndarray) -> tuple:
        with torch.no_grad():
            return tuple(part.numpy() for part in net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())))

    return features


def speed(seconds: float) -> None:
    """Prints images a second of both, in turns of a batch each."""
    weights = random_state_dict()
    images = np.random.default_rng(1).integers(0, 256, (BATCH_SIZE, SIDE, SIDE, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # random weights are nothing to keep
        path = pathlib.Path(folder) / "weights.safetensors"
        write_tensors(path, weights)
        ours, theirs = InceptionFeatures.from_file(path), torch_fidelity(weights, pathlib.Path(folder))
        (found,) = ours.stream([images], BATCH_SIZE)
        expected = theirs(images)[0]
        print(f"largest difference of pool features: {np.abs(found.pool - expected).max():.1e} of {expected.max():.2f}")
        runs = {
            "ours": lambda: next(ours.stream([images], BATCH_SIZE)).pool,
            "theirs": lambda: theirs(images)[0],
        }
        turns = in_turns(runs, jnp.float32, seconds)
    for name in runs:
        print(f"{name}: {spread(BATCH_SIZE / turns.seconds[name])} images a second, {len(turns.rates)} batches")
    print(f"ours to theirs: {spread(turns.ratio('theirs', 'ours'))}")


def program_for(topology: str) -> tuple[Slice, Params, jax.ShapeDtypeStruct]:
    """A slice, and what `forward` is given on all chips of one of its hosts, each of which does the same."""
    where = find_slice(topology)
    whole, split = shardings_over(where.host)
    rows = BATCH_SIZE * len(where.host)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), parameter_shapes())
    return where, params, jax.ShapeDtypeStruct((rows, SIDE, SIDE, 3), jnp.uint8, sharding=split)


def compiled_for(topology: str) -> Cost:
    """The program of a batch, compiled; statistics are the host's business."""
    where, params, images = program_for(topology)
    flops = 2.0 * convolution_macs(params, images)
    mesh = make_mesh(devices=where.host)
    return measure(Work("evaluator", forward, (params, images), mesh, images.shape[0], flops), where.chip)


def convolution_macs(params: Params, images: jax.ShapeDtypeStruct) -> int:
    """Multiply-accumulates of the network's convolutions on a batch."""
    found = [equation for equation, _ in jaxprs.equations(jax.make_jaxpr(forward)(params, images).jaxpr)]
    found = [equation for equation in found if equation.primitive.name == "conv_general_dilated"]
    shapes = [(equation.outvars[0].aval.shape, equation.invars[1].aval.shape) for equation in found]
    return sum(math.prod(result) * math.prod(kernel[:-1]) for result, kernel in shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "compile"))
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--topology", default="v5e:4x4")
    args = parser.parse_args()
    if args.what == "speed":
        return speed(args.seconds)
    cost = compiled_for(args.topology)
    size = cost.work.mesh.size
    assert cost.memory is not None, f"it does not fit: {cost.needed / 1e9:.2f} GB"
    print(
        f"{args.topology}: {cost.work.rows} images on the {size} chips of a host; a chip holds "
        f"{cost.memory.arguments / 1e9:.3f} GB of arguments and {cost.memory.temporaries / 1e9:.3f} GB of temporaries, "
        f"moves {cost.bytes / 1e9:.2f} GB and computes {cost.work.flops / size / 1e12:.3f} TFLOP a batch; "
        f"traffic between chips {', '.join(cost.traffic) or 'none'}; compiled in {cost.compile_seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
