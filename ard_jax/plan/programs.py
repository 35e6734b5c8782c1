"""The programs of a run as the stages make them, with shapes in place of arrays."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from ard_jax.build import (
    example_shape,
    make_rollout,
    make_run_mesh,
    make_solve,
    make_student,
    make_teacher,
    remat_policy,
)
from ard_jax.chips import Chip
from ard_jax.config import WORDLLAMA
from ard_jax.convert.families.folders import PART, read_description
from ard_jax.convert.t5 import t5_model
from ard_jax.drawing import make_drawing, rollout_macs, student_sampler
from ard_jax.methods import columns_of, finetuned_config, make_finetune_method, make_method
from ard_jax.models import network_shapes, parameter_shapes
from ard_jax.models.backbone import Backbone, Condition, condition_like
from ard_jax.models.flops import teacher_macs
from ard_jax.models.jaxprs import macs
from ard_jax.objectives import Method
from ard_jax.parallel import batch_sharding, batch_shards, local_mesh, make_mesh, on_mesh, with_shardings
from ard_jax.plan.topology import Slice
from ard_jax.sampling import network_calls
from ard_jax.text import T5Encoder
from ard_jax.text_encoders import ENCODER_MESH
from ard_jax.training.state import make_step, optimizer_of, start_state
from ard_jax.trajectories import store
from ard_jax.trajectories.generate import make_solver
from ard_jax.types import Batch, PyTree


class Work(NamedTuple):
    """A program to plan for.

    Attributes:
        name: in words.
        function: jitted.
        arguments: their shapes, and where they lie if the function does not say.
        mesh: of the devices that it runs on.
        rows: examples, trajectories or images of one run.
        flops: of one run by the formulas of `models.flops`, on all devices.
    """

    name: str
    function: Any
    arguments: tuple[PyTree, ...]
    mesh: Mesh
    rows: int
    flops: float


def for_platform(
    config: ml_collections.ConfigDict, platform: str, chip: Chip | None = None
) -> ml_collections.ConfigDict:
    """A copy of the config in which "auto" is what it means on that platform and chip, whatever this machine has."""
    config = config.copy_and_resolve_references()
    if config.model.dtype == "auto":
        config.model.dtype = "float32" if platform == "cpu" else "bfloat16"
    config.model.remat = remat_policy(config.model.remat, chip)
    return config


def training_step(config: ml_collections.ConfigDict, where: Slice) -> Work:
    """The step of the stage `distill`; from a store, or with the teacher inside (`distill.online`)."""
    settings, teacher, params = config.distill, make_teacher(config), network_shapes(make_student(config))
    columns: tuple[int, ...] | None
    record, columns = _stored_record(config, settings.batch_size)
    if settings.online:
        record, columns = {name: record[name] for name in ("label", "position", "condition")}, None
    # of the methods, progressive distillation alone asks of how many steps its start is, and wants twice its own
    start_steps = 2 * len(config.student.points) if settings.start else None
    method = make_method(config, make_student(config), teacher, columns, start_steps)
    frozen = {"": None, "teacher": network_shapes(teacher), "start": params}[method.reads]
    if method.real:
        record = _beside_real(record, config, settings.batch_size)
    return _step_of("distill", method, config, frozen, record, where)


def finetune_step(config: ml_collections.ConfigDict, where: Slice) -> Work:
    """The step of the stage `finetune`.

    Raises:
        UserError: the config's student is none that it could start from.
    """
    settings, teacher = config.finetune, make_teacher(config)
    trajectory, columns = _stored_record(config, settings.batch_size)
    method = make_finetune_method(finetuned_config(config, config), teacher, columns)
    batch = _beside_real(trajectory, config, settings.batch_size)
    return _step_of("finetune", method, config, network_shapes(teacher), batch, where)


def _beside_real(trajectory: Batch, config: ml_collections.ConfigDict, rows: int) -> Batch:
    """A batch of trajectories and as many real images."""
    labels = {name: trajectory[name] for name in ("label", "position", "condition")}
    return {"trajectory": trajectory, "real": {"image": _rows_of(rows, example_shape(config), "float32"), **labels}}


def _stored_record(config: ml_collections.ConfigDict, rows: int) -> tuple[Batch, tuple[int, ...]]:
    """A batch from the trajectory store, and where the student's points stand in it."""
    points, dtype, shape = (
        tuple(config.trajectories.points),
        store.DTYPES[config.trajectories.dtype],
        example_shape(config),
    )
    record = {"label": _rows_of(rows, (), "int32"), "position": _rows_of(rows, (), "int32")}
    record["condition"] = _condition_rows(make_teacher(config), rows)
    record |= {"noise": _rows_of(rows, shape, dtype), "x0": _rows_of(rows, (len(points), *shape), dtype)}
    record |= {"xt": record["x0"]} if config.trajectories.keep_noisy else {}
    return record, columns_of(points, config)


def _step_of(
    stage: str,
    method: Method,
    config: ml_collections.ConfigDict,
    frozen: PyTree,
    batch: Batch,
    where: Slice,
) -> Work:
    """A training stage's step; its first argument is the state."""
    settings, name = config[stage], {"distill": "training step", "finetune": "fine-tune step"}[stage]
    mesh, optimizer = make_run_mesh(config, stage, where.devices), optimizer_of(method, settings)
    start = functools.partial(start_state, optimizer=optimizer, seed=config.seed, begin=method.begin)
    params = network_shapes(make_student(config))
    state = jax.eval_shape(lambda params, frozen: start(params, frozen=frozen), params, frozen)
    step = make_step(method.objective, optimizer, settings.optimizer.ema, mesh, state, frozen, settings.accumulate)
    return Work(name, step, (state, frozen, batch), mesh, settings.batch_size, method.flops * settings.batch_size)


def sampler(config: ml_collections.ConfigDict, where: Slice) -> Work:
    """The student's sampler as the stage `sample` runs it, without decoding."""
    mesh, student = make_run_mesh(config, devices=where.devices), make_student(config)
    rows = config.sample.batch_size * batch_shards(mesh)
    arguments = with_shardings(network_shapes(make_student(config)), mesh), _drawn_rows(config, rows, mesh)
    draw = make_drawing(student_sampler(make_rollout(config, student)), config, mesh)
    macs = rollout_macs(config, student)
    return Work("sampler", draw, arguments, mesh, rows, 2 * macs * rows)


def trajectory_step(config: ml_collections.ConfigDict, where: Slice) -> Work:
    """A batch of the trajectory job, which every host does alone on its own devices."""
    mesh, teacher = local_mesh(config.mesh, where.host), make_teacher(config)
    rows = config.trajectories.batch_size * batch_shards(mesh)
    arguments = with_shardings(network_shapes(teacher), mesh), _drawn_rows(config, rows, mesh)
    macs = network_calls(make_solve(config)) * teacher_macs(teacher, example_shape(config))
    return Work("trajectory step", make_solver(teacher, config, mesh), arguments, mesh, rows, 2 * macs * rows)


def caption_step(config: ml_collections.ConfigDict, where: Slice) -> Work | None:
    """A batch of the stage `captions`, which every host does alone; None where no text encoder of size is run.

    Without a folder in `captions.encoder`, T5 v1.1 XXL, which both PixArts have; in bfloat16, as its weights are kept.
    """
    if config.data.num_classes or config.captions.encoder == WORDLLAMA:
        return None
    folder = pathlib.Path(config.captions.encoder)
    part = next((place for place in (folder / "text_encoder", folder) if (place / PART).is_file()), None)
    model = t5_model(read_description(part / PART)) if part and config.captions.encoder else T5Encoder()
    model = model.clone(dtype=jnp.dtype(config.model.dtype))
    mesh = make_mesh(ENCODER_MESH, where.host)
    rows, length = config.captions.batch_size * batch_shards(mesh), config.captions.length
    ids = _rows_of(rows, (length,), "int32", mesh)
    shapes = parameter_shapes(model, ids, ids)
    params = with_shardings(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes), mesh)
    encode = jax.jit(on_mesh(mesh)(lambda params, ids, mask: model.apply({"params": params}, ids, mask)))
    one = jax.ShapeDtypeStruct((1, length), "int32")
    flops = 2 * macs(jax.make_jaxpr(lambda p, i: model.apply({"params": p}, i, i))(shapes, one).jaxpr)
    return Work("caption step", encode, (params, ids, ids), mesh, rows, flops * rows)


def _drawn_rows(config: ml_collections.ConfigDict, rows: int, mesh: Mesh) -> Batch:
    """The shapes of a batch that is to be drawn: indices, the numbers of the conditions, and what they say."""
    numbers = _rows_of(rows, (), "int32", mesh)
    return {"index": numbers, "label": numbers, "condition": _condition_rows(make_teacher(config), rows, mesh)}


def _condition_rows(model: Backbone, rows: int, mesh: Mesh | None = None) -> Condition:
    """The shapes of a batch of conditions."""
    return condition_like(model, rows, lambda shape, dtype: _rows_of(shape[0], shape[1:], dtype, mesh))


def _rows_of(
    rows: int, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, mesh: Mesh | None = None
) -> jax.ShapeDtypeStruct:
    """The shape of a batch, split over a mesh if there is one."""
    return jax.ShapeDtypeStruct((rows, *shape), jnp.dtype(dtype), sharding=batch_sharding(mesh) if mesh else None)
