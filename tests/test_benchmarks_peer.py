"""The PyTorch peer is the student as published: the same numbers as ours, for as many operations as it says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit

from ard_jax.build import make_student
from ard_jax.convert import to_torch
from ard_jax.models.flops import student_macs
from ard_jax.objectives.ard import ard
from ard_jax.sampling import sample_student
from benchmarks import dense
from benchmarks.speed import Step, inputs

pytestmark = pytest.mark.oracle
SHAPE, ROWS = (8, 8, 1), 3


@pytest.fixture(scope="module")
def peer_torch():
    from benchmarks import peer_torch

    return peer_torch


@pytest.fixture(scope="module")
def pair(peer_torch):
    """The config, our student, its parameters, a batch, and the peer."""
    config = peer_torch.quick_config()
    student = make_student(config)
    params = peer_torch.random_params(student)
    return config, student, params, inputs(config, ROWS), peer_torch.make_peer(student, params, SHAPE[0])


def test_its_samples_are_ours(peer_torch, pair):
    import torch

    _, student, params, given, peer = pair
    noise, y = jnp.asarray(given["noise"], jnp.float32), jnp.asarray(given["condition"], jnp.int32)
    ours = quick_jit(lambda *args: sample_student(student, *args)[:, -1])(params, noise, y)
    theirs = peer_torch.sampler(
        peer, peer.step, peer_torch.channels_first(given["noise"]), torch.from_numpy(given["condition"])
    )()
    assert peer_torch.difference(np.moveaxis(np.asarray(ours), -1, -3), theirs) < 2e-5


def test_its_training_is_ours(peer_torch, pair):
    """Losses and average of several steps, by clipping, AdamW and the average alike."""
    config, student, params, given, _ = pair
    own = Step(ard(student, target="x0", columns=tuple(range(student.steps))), params, config, given)
    theirs = peer_torch.Training(peer_torch.make_peer(student, params, SHAPE[0]), config, given, False)
    losses = [(float(own()[1]["loss"]), float(theirs())) for _ in range(4)]
    assert losses[0][1] == pytest.approx(losses[0][0], rel=1e-6)
    # a gradient that is nothing but rounding, as that of the keys' bias, AdamW makes as large as any other
    assert losses[-1][1] == pytest.approx(losses[-1][0], rel=1e-4)
    assert losses[-1][0] < 0.99 * losses[0][0]  # the parameters have moved, or the steps would prove nothing
    start, average = (to_torch(student.with_backbone(image_size=SHAPE[0]), tree) for tree in (params, own.state.ema))
    names = [name for name, leaf in theirs.forward.named_parameters() if leaf.requires_grad]
    moved = sum(np.sum((average[name] - start[name]) ** 2) for name in names)
    apart = sum(np.sum((leaf.numpy() - average[name]) ** 2) for name, leaf in zip(names, theirs.ema, strict=True))
    assert apart < 0.05**2 * moved


def test_it_costs_what_the_published_code_does(pair):
    """Counted by PyTorch itself, with attention as products that it sees."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    _, student, _, given, peer = pair
    y = torch.from_numpy(given["condition"])
    points = torch.from_numpy(np.moveaxis(np.asarray(given["x0"], np.float32), -1, -3))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        peer(points[:1], y[:1])
    expected = dense.dense_macs(student, SHAPE, training=True)
    assert counter.get_total_flops() == 2 * expected
    assert expected > 1.2 * student_macs(student, SHAPE)


def test_the_command_measures_products(peer_torch, capsys):
    assert peer_torch.main(["--quick", "--seconds", "0", "--only", "products", "--batch", "1"]) == 0
    text = capsys.readouterr().out
    assert jax.__version__ in text and "torch" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == [*peer_torch.EQUATIONS, "attention as a whole"]
    # the ratio is of times in one turn, so that it lies between those of the extremes, whatever else runs here
    spreads = [re.fullmatch(r"\S+ \((.+)–(.+)\)", cell).groups() for cell in rows[0][1:]]
    (xla, xla_most), (pytorch, pytorch_most), (ratio, ratio_most) = (map(float, spread) for spread in spreads)
    rounded = 0.5  # GFLOP/s, and .005 of the ratio
    assert (xla - rounded) / (pytorch_most + rounded) - 0.005 <= ratio
    assert ratio_most <= (xla_most + rounded) / max(pytorch - rounded, 1e-9) + 0.005


@pytest.mark.slow
def test_the_command_compares_samplers(peer_torch, capsys):
    assert peer_torch.main(["--quick", "--seconds", "0", "--only", "sampler", "--batch", "1"]) == 0
    text = capsys.readouterr().out
    assert float(re.search(r"Samples differ by (\S+) of", text)[1]) < 2e-5
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| sampler")]
    assert [row[2] for row in rows] == ["ours", "ours, N = 0", "PyTorch", "PyTorch, compiled"]
    assert float(rows[1][4]) < 1 < 1.1 < float(rows[2][4])  # FLOPs


def test_bad_input_is_said_in_a_sentence(peer_torch, capsys):
    assert peer_torch.main(["--size", "DiT-Q/2"]) == 2
    assert "not a published size" in capsys.readouterr().err
