"""How arrays lie on several devices; in a process of its own, since a process has as many as it started with."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from pipeline_fixtures import in_process

from ard_jax import parallel
from ard_jax.build import make_run_mesh
from ard_jax.errors import UserError
from ard_jax.parallel import AXES, make_mesh, sharding_of, whole_matrices
from configs import imagenet256

TURNS = """
import json

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.parallel import in_turns, make_mesh, put_batch

mesh = make_mesh()
rows = np.arange(48, dtype=np.float32).reshape(24, 2)
made = []


def double(part):
    made.append(part.shape)
    return jnp.stack([part, 2 * part], axis=-1)


for limit in (1, 4, 5, 100):  # of the six rows that each of four devices has
    run = jax.jit(lambda batch, limit=limit: in_turns(double, batch, mesh, limit))
    batch = put_batch(rows, mesh)
    results = run(batch)
    np.testing.assert_array_equal(results, np.stack([rows, 2 * rows], axis=-1))
    assert results.sharding.is_equivalent_to(batch.sharding, results.ndim), results.sharding
    program = run.lower(batch).compile().as_text()
    assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
print(json.dumps(made))
"""


SHARDED = """
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ard_jax.models import ARDStudent, DiT
from ard_jax.objectives.ard import ard
from ard_jax.parallel import AXES, make_mesh, put_batch
from ard_jax.training.state import init_state, make_step

teacher = DiT(channels=2, hidden_size=32, depth=3, num_heads=4, num_classes=10, remat="full")
student = ARDStudent(teacher, steps=2, history_layers=1)
rng = np.random.default_rng(0)
batch = {
    "noise": rng.standard_normal((16, 8, 8, 2), np.float32),
    "x0": rng.standard_normal((16, 2, 8, 8, 2), np.float32),
    "condition": np.arange(16) % 10,
}
params = student.init(jax.random.key(0), batch["x0"][:1], jnp.zeros(1, jnp.int32))["params"]
leaves, tree = jax.tree.flatten(params)
params = jax.tree.unflatten(tree, [leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])
optimizer = optax.adamw(1e-2)
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
found = []
for sizes, accumulate in MESHES:
    mesh = make_mesh(dict(zip(AXES, sizes)))
    state = init_state(params, optimizer, 0, mesh)
    step = make_step(ard(student, target="x0", columns=(0, 1)), optimizer, 0.9, mesh, state, None, accumulate)
    rows = put_batch(batch, mesh)
    program = step.lower(state, None, rows).compile().as_text()
    losses = []
    for _ in range(5):
        state, metrics = step(state, None, rows)
        losses.append([float(metrics[name]) for name in ("loss", "loss_step_2", "gradient_norm", "parameter_norm")])
    kept = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)]
    found.append(
        {
            "sizes": sizes,
            "losses": losses,
            "kernel": state.opt_state[0].mu["blocks"]["mlp_in"]["kernel"].addressable_shards[0].data.shape,
            "bytes": sum(kept),
            "kinds": sorted(set(re.findall(rf" ({KINDS})\\(", program))),
        }
    )
print(json.dumps(found))
"""


@pytest.mark.slow
def test_meshes_change_where_a_step_is_computed_and_not_what():
    """Data parallel, microbatches, parameters over fsdp, and all axes at once: the same five steps."""
    meshes = [((8, 1, 1), 1), ((8, 1, 1), 2), ((1, 8, 1), 1), ((2, 2, 2), 2)]
    plain, turns, fsdp, every = in_process(f"MESHES = {meshes}\n{SHARDED}", devices=8)
    for other in (turns, fsdp, every):
        np.testing.assert_allclose(other["losses"], plain["losses"], rtol=1e-5)
    assert plain["kernel"] == [3, 32, 128] and fsdp["kernel"] == [3, 4, 128] and every["kernel"] == [3, 16, 64]
    assert fsdp["bytes"] < plain["bytes"] / 6  # the biases of heads and MLP, and the time's, stay whole
    assert plain["kinds"] == ["all-reduce"]
    # the activations stay where they are: a layer's parameters come to them
    assert set(fsdp["kinds"]) <= {"all-gather", "all-reduce", "reduce-scatter"} and "all-gather" in fsdp["kinds"]


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks for."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((-1, 4, 1), (2, 4, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 8, 1), (1, 8, 1)),
        ((-1, 1, 4), (2, 1, 4)),
    ],
)
def test_one_axis_takes_what_the_others_leave(sizes, shape):
    devices = [Device(number, number // 4) for number in range(8)]
    assert tuple(make_mesh(dict(zip(AXES, sizes, strict=True)), devices).shape.values()) == shape


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((3, 1, 1), "the mesh data=3, fsdp=1, tensor=1 does not fit 8 devices: the product"),
        ((-1, 3, 1), "the mesh data=-1, fsdp=3, tensor=1 does not fit 8 devices"),
        ((4, 1, 1), "does not fit 8 devices"),
        ((-1, 1, 8), "mesh.tensor is 8, but a host has 4 devices: choose a divisor of that"),
    ],
)
def test_meshes_that_do_not_fit(sizes, said):
    devices = [Device(number, number // 4) for number in range(8)]
    with pytest.raises(UserError, match=re.escape(said)):
        make_mesh(dict(zip(AXES, sizes, strict=True)), devices)


@pytest.mark.parametrize(
    ("sizes", "shape", "said"),
    [
        ((1, -1, 1), (32, 8, 1), True),  # parts of 144; of 18 they would be padded
        ((1, -1, 4), (8, 8, 4), True),
        ((1, 256, 1), (2, 128, 1), True),  # the largest share of 256 that divides 1152
        ((4, 64, 1), (4, 64, 1), False),
        ((-1, 1, 1), (256, 1, 1), False),
    ],
)
def test_a_width_is_split_though_fsdp_does_not_divide_it(sizes, shape, said, caplog):
    """XL/2 on v5e:16x16."""
    devices, settings = [Device(number, number // 4) for number in range(256)], dict(zip(AXES, sizes, strict=True))
    parallel._say_once.cache_clear()
    with caplog.at_level("INFO", "ard_jax"):
        meshes = [make_mesh(settings, devices, 1152) for _ in range(2)]
    assert [tuple(mesh.shape.values()) for mesh in meshes] == [shape] * 2
    lines = [line for line in caplog.messages if f"width 1152 is split over {shape[1]} of the" in line]
    assert len(lines) == said  # once


def test_a_width_that_nothing_divides_leaves_the_parameters_whole():
    devices = [Device(number, 0) for number in range(7)]
    assert tuple(make_mesh({"data": -1, "fsdp": 7, "tensor": 1}, devices, 27).shape.values()) == (7, 1, 1)


@pytest.mark.parametrize(
    ("devices", "stage", "batch", "shape"),
    [
        (4, "distill", 64, (1, 4, 1)),
        (16, "distill", 64, (2, 8, 1)),  # compute is the bound
        (64, "distill", 64, (16, 2, 2)),  # a row a chip: weights are sent for longer than they are used
        (256, "distill", 256, (64, 2, 2)),
        (256, "distill", 64, (64, 1, 4)),  # fewer rows than chips
        (64, "distill", 256, (8, 8, 1)),
        (64, "teacher", 256, (16, 2, 2)),  # whose rows are a quarter of a student's
        (16, "finetune", 48, (2, 8, 1)),
        (16, "", 0, (2, 8, 1)),
        (1, "distill", 1, (1, 1, 1)),
    ],
)
def test_the_recipe_s_mesh_fits_its_batch(devices, stage, batch, shape):
    config = imagenet256.get_config()
    if stage:
        config[stage].batch_size = batch
    mesh = make_run_mesh(config, stage, [Device(number, number // 4) for number in range(devices)])
    assert tuple(mesh.shape.values()) == shape
    config.mesh.tensor = 1
    assert make_run_mesh(config, stage, list(mesh.devices.flat)).shape["tensor"] == 1
    config.mesh.update(data=devices, fsdp=1, tensor=-1)
    assert tuple(make_run_mesh(config, stage, list(mesh.devices.flat)).shape.values()) == (devices, 1, 1)


def test_what_lies_whole_is_named():
    params = {
        "qkv": {"kernel": np.zeros((1152, 8), np.float32), "bias": np.zeros(8)},
        "mlp_in": {"kernel": np.zeros((27, 20_000), np.float32)},
        "label_embed": np.zeros((1000, 300), np.float32),
        "linear": {"kernel": np.zeros((27, 8), np.float32)},
    }
    devices = [Device(number, 0) for number in range(4)]
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 1}, devices)
    assert whole_matrices(params, mesh) == {"mlp_in/kernel": 27 * 20_000 * 4, "label_embed": 1_200_000}
    assert whole_matrices(params, make_mesh({"data": 4, "fsdp": 1, "tensor": 1}, devices)) == {}


def test_a_tensor_axis_stays_within_a_host_whatever_the_order_of_devices():
    devices = [Device(number, number % 2) for number in range(8)]
    grid = make_mesh({"data": -1, "fsdp": 1, "tensor": 4}, devices).devices
    assert [[device.process_index for device in row] for row in grid[:, 0]] == [[0] * 4, [1] * 4]


def test_a_batch_in_turns_stays_on_its_devices():
    assert in_process(TURNS, devices=4) == [[4, 2], [12, 2], [12, 2], [24, 2]]


def test_a_matrix_that_nobody_named_is_refused_and_a_vector_lies_whole():
    mesh = make_mesh(dict(zip(AXES, (1, 1, 1), strict=True)), jax.devices()[:1])
    known = {"qkv": {"kernel": np.zeros((4, 6)), "bias": np.zeros(6)}, "norm": {"scale": np.zeros(4)}}
    specs = jax.tree.map(lambda sharding: tuple(sharding.spec), sharding_of(known, mesh))
    assert specs["qkv"]["kernel"] == ("fsdp", "tensor") and specs["norm"]["scale"] == (None,)
    for unknown in ({"blocks": {"novel": {"kernel": np.zeros((2, 4, 6))}}}, {"table": np.zeros((4, 6))}):
        with pytest.raises(UserError, match="nothing says what the . axes of the parameter .* stand for"):
            sharding_of(unknown, mesh)
