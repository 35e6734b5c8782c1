"""How fast this code is on the device at hand: python -m benchmarks.speed [--only ITEM …] [--size DiT-B/2]

Prints a section of Markdown for each item:

sampling      the teacher's guided 25 steps, the student's 4, and the same without history layers
blocks        the student against a dense-mask, per-token reference (benchmarks/dense.py), at width 384, float32
training      the distillation step under each rematerialisation policy
trajectories  the job that solves the teacher's ODE and writes the store
reader        trajectories of 5×32×32×4 float16, from disk to batches
loop          the quickstart's distillation: its wait for input, and what checkpoints every 100 steps cost it

What is compared runs in turn in one process; times are medians over the turns (least–greatest). Utilisation is model
FLOPs a second over the rate of a large matrix product in the compute type, measured in the same turns; of FLOPs only
matrix products count, a multiply-accumulate as two, and a training step as three forward passes. The weights are
random, since speed does not depend on them. Default sizes are DiT-B/2 in float32 on a CPU, where all items take about
ten minutes on two cores, and DiT-XL/2 in bfloat16 on accelerators.

On Linux, GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment lets large arrays lie on huge pages where the system
allows programs that: a training step on a CPU then faults in 50 times fewer pages.
"""

import json
import logging
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ard_jax.build import (
    compute_dtype,
    example_shape,
    make_solve,
    make_student,
    make_teacher,
)
from ard_jax.chips import measured_matmul_rate
from ard_jax.command_line import parse_flags, set_up_logging
from ard_jax.conditions import Labels
from ard_jax.config import default_config
from ard_jax.data.stream import stream
from ard_jax.errors import UserError
from ard_jax.models import DiT, init_from_teacher
from ard_jax.models.backbone import REMAT_POLICIES
from ard_jax.models.flops import student_macs, teacher_macs
from ard_jax.objectives import Method, Objective
from ard_jax.objectives.ard import ard
from ard_jax.parallel import make_mesh, put_batch
from ard_jax.progress import Stopwatch
from ard_jax.sampling import network_calls, sample_student, sample_teacher
from ard_jax.stages.teacher import init_parameters
from ard_jax.training.fit import Task, fit
from ard_jax.training.state import init_state, make_optimizer, make_step
from ard_jax.trajectories import store
from ard_jax.trajectories.generate import features_of, make_store
from benchmarks import dense
from benchmarks.measure import in_turns, spread, table
from configs import digits

# -------------------------------------------------------------------------------------------- what items share


def settings(size: str) -> ml_collections.ConfigDict:
    """The paper's config at a published size, with N as deep as its 6 of 28 layers.

    Raises:
        UserError: no such size.
    """
    config = default_config()
    config.model.name = size
    config.student.history_layers = round(make_teacher(config).depth * 6 / 28)
    return config


def teacher_params(model: DiT, shape: tuple[int, int, int]) -> Any:
    return init_parameters(model, shape, 0, make_mesh())


def inputs(config: ml_collections.ConfigDict, batch: int) -> dict[str, np.ndarray]:
    """A training batch: "noise", "x0" and "condition"."""
    rng, points = np.random.default_rng(0), len(config.student.points)
    states = rng.standard_normal((batch, points + 1, *example_shape(config)), np.float32).astype(np.float16)
    return {"noise": states[:, 0], "x0": states[:, 1:], "condition": rng.integers(0, config.data.num_classes, batch)}


def fits(compiled: jax.stages.Compiled) -> bool:
    """Whether a program fits its device's memory; a CPU does not tell."""
    needed = compiled.memory_analysis()
    memory = jax.devices()[0].memory_stats() or {}
    free = memory.get("bytes_limit", math.inf) - memory.get("bytes_in_use", 0)  # its arguments are there already
    return needed.temp_size_in_bytes + needed.output_size_in_bytes - needed.alias_size_in_bytes < free


def compiled(function: Callable[..., Any], *args: Any) -> Callable[[], Any] | None:
    """The function of these arguments, compiled; None if it does not fit."""
    program = jax.jit(function).lower(*args).compile()
    return (lambda: program(*args)) if fits(program) else None


class Step:
    """Training steps of one objective, compiled: each call goes on from the state that the last one left."""

    def __init__(self, objective: Objective, params: Any, config: ml_collections.ConfigDict, batch: Any):
        mesh, optimizer = make_mesh(), make_optimizer(config.distill.optimizer, config.distill.steps)
        self.batch = put_batch(batch, mesh)
        self.state = init_state(params, optimizer, config.seed, mesh)
        step = make_step(objective, optimizer, config.distill.optimizer.ema, mesh, self.state)
        self.program = step.lower(self.state, None, self.batch).compile()

    def __call__(self) -> Any:
        self.state, metrics = self.program(self.state, None, self.batch)
        return self.state, metrics


def giga(macs: float) -> str:
    return f"{macs / 1e9:.4g}"


# ------------------------------------------------------------------------------------------------------- items


def sampling(config: ml_collections.ConfigDict, batch: int, seconds: float) -> str:
    teacher, student = make_teacher(config), make_student(config)
    alone, shape, solver = student.clone(history_layers=0), example_shape(config), make_solve(config)
    params = teacher_params(teacher, shape)
    heads = init_from_teacher(params, student)
    names = (
        f"teacher, {solver.steps} steps with guidance",
        f"student, {student.steps} steps, N = {student.history_layers} of {student.backbone.depth}",
        f"student, {student.steps} steps, N = 0",
    )
    macs = (
        network_calls(solver) * teacher_macs(teacher, shape),
        student_macs(student, shape),
        student_macs(alone, shape),
    )

    def solve(params, noise, y):
        return sample_teacher(teacher, params, noise, y, solver).xt[:, -1]

    def programs(rows):
        given = inputs(config, rows)
        noise, y = jnp.asarray(given["noise"], jnp.float32), jnp.asarray(given["condition"], jnp.int32)
        return (
            compiled(solve, params, noise, y),
            compiled(lambda *args: sample_student(student, *args)[:, -1], heads, noise, y),
            compiled(lambda *args: sample_student(alone, *args)[:, -1], heads, noise, y),
        )

    times, ratios = [], []
    for rows in (1, batch):
        while not all(runs := programs(rows)):
            rows //= 2
        turns = in_turns(dict(zip(names, runs, strict=True)), teacher.dtype, seconds, (*names, *names[1:]))
        for name, mac in zip(names, macs, strict=True):
            each = turns.seconds[name] / rows * 1e3
            times.append((rows, name, giga(mac), spread(each, 1), f"{turns.utilisation(name, 2 * mac * rows):.2f}"))
        for slow, fast in ((0, 1), (0, 2), (1, 2)):
            flops = f"{macs[slow] / macs[fast]:.3f}"
            ratios.append(
                (rows, f"{names[slow]} ÷ {names[fast]}", flops, spread(turns.ratio(names[slow], names[fast]), 3))
            )
    return (
        table(("batch", "what", "GMAC an image", "ms an image", "utilisation"), times)
        + "\n\n"
        + table(("batch", "ratio", "of FLOPs", "of time"), ratios)
    )


def blocks(config: ml_collections.ConfigDict, batch: int, seconds: float) -> str:
    student, shape = make_student(config), example_shape(config)
    params = init_from_teacher(teacher_params(make_teacher(config), shape), student)
    given = inputs(config, batch)
    noise, y = jnp.asarray(given["noise"], jnp.float32), jnp.asarray(given["condition"], jnp.int32)
    points = jnp.concatenate([noise[:, None], jnp.asarray(given["x0"][:, :-1], jnp.float32)], axis=1)
    columns = tuple(range(student.steps))

    def step(student):
        return Step(ard(student, target="x0", columns=columns), params, config, given)

    own = {
        "forward": compiled(lambda *args: student.apply({"params": args[0]}, *args[1:]), params, points, y),
        "training step": step(student),
        "sampler": compiled(lambda *args: sample_student(student, *args), params, noise, y),
    }
    reference = {
        "forward": compiled(lambda *args: dense.forward(student, *args), params, points, y),
        "training step": step(dense.DenseStudent(student)),
        "sampler": compiled(lambda *args: dense.sample(student, *args), params, noise, y),
    }
    rows = []
    for what in own:
        turns = in_turns({"blocks": own[what], "dense": reference[what]}, jnp.float32, seconds)
        passes = 3 if what == "training step" else 1
        macs = passes * student_macs(student, shape), passes * dense.dense_macs(student, shape, what != "sampler")
        rows.append(
            (
                what,
                *map(giga, macs),
                spread(turns.seconds["blocks"] / batch * 1e3, 1),
                spread(turns.seconds["dense"] / batch * 1e3, 1),
                f"{macs[1] / macs[0]:.3f}",
                spread(turns.ratio("dense", "blocks")),
            )
        )
    header = ("what", "GMAC, blocks", "GMAC, dense", "ms, blocks", "ms, dense", "dense ÷ blocks, FLOPs", "and time")
    network = student.backbone
    about = f"Width {network.hidden_size}, depth {network.depth}, S = {student.steps}, N = {student.history_layers}"
    return f"{about}, batch {batch}, float32; a trajectory:\n\n" + table(header, rows)


def training(config: ml_collections.ConfigDict, batch: int, seconds: float) -> str:
    shape, steps, given = example_shape(config), {}, inputs(config, batch)
    params = init_from_teacher(teacher_params(make_teacher(config), shape), make_student(config))
    for remat in REMAT_POLICIES:
        config.model.remat = remat
        student = make_student(config)
        step = Step(ard(student, target="x0", columns=tuple(range(student.steps))), params, config, given)
        if fits(step.program):
            steps[remat] = step
    turns = in_turns(steps, student.backbone.dtype, seconds)
    flops = 6 * student_macs(student, shape) * batch
    rows = [
        (
            remat,
            giga(flops / 2 / batch),
            spread(turns.seconds[remat]),
            f"{batch / turns.median(remat):.3g}",
            f"{turns.utilisation(remat, flops):.3f}",
        )
        for remat in steps
    ]
    rows += [(remat, giga(flops / 2 / batch), *["does not fit"] * 3) for remat in REMAT_POLICIES if remat not in steps]
    header = ("rematerialisation", "GMAC a trajectory", "seconds a step", "trajectories/s", "utilisation")
    best = min(steps, key=turns.median)
    return (
        f"Batch {batch}, S = {student.steps}, N = {student.history_layers} of {student.backbone.depth}; fastest: "
        f"{best}.\n\n" + table(header, rows)
    )


def trajectories(config: ml_collections.ConfigDict, batch: int, seconds: float) -> str:
    teacher, shape, shards = make_teacher(config), example_shape(config), 4
    params = teacher_params(teacher, shape)
    config.trajectories.update(count=shards * batch, batch_size=batch, shard_size=batch)
    dtype = compute_dtype(config.model.dtype)
    with tempfile.TemporaryDirectory() as folder:
        rates = [measured_matmul_rate(dtype)]
        make_store(teacher, params, Labels(config.data.num_classes), config, pathlib.Path(folder), make_mesh())
        rates.append(measured_matmul_rate(dtype))
        paths = [store.LAYOUT.shard_path(pathlib.Path(folder), shard, shards) for shard in range(shards)]
        finished = np.array([path.stat().st_mtime for path in paths])
    each = np.diff(finished) / batch  # the first shard's time has the compiling in it
    macs = network_calls(make_solve(config)) * teacher_macs(teacher, shape)
    utilisation = 2 * macs / np.median(each) / np.mean(rates)
    header = ("batch", "GMAC a trajectory", "seconds a trajectory", "trajectories/s", "utilisation")
    row = (batch, giga(macs), spread(each, 6), f"{1 / np.median(each):.3g}", f"{utilisation:.3f}")
    return "Solved, fetched and written, a shard a batch:\n\n" + table(header, [row])


def random_store(config: ml_collections.ConfigDict, directory: pathlib.Path, count: int) -> store.Store:
    """A whole store of random trajectories, in shards of `trajectories.shard_size`."""
    rng, features, size = np.random.default_rng(0), features_of(config), config.trajectories.shard_size
    shards = -(-count // size)

    def record(index):
        states = {name: feature for name, feature in features.items() if name not in ("label", "index")}
        drawn = {name: rng.random(f.shape, np.float32).astype(f.np_dtype) for name, f in states.items()}
        return drawn | {"label": index % config.data.num_classes, "index": index}

    for shard in range(shards):
        numbers = range(shard * size, min((shard + 1) * size, count))
        store.write_shard(directory, shard, shards, features, map(record, numbers), [])
    described = store.describe(directory, shards)
    store.finish(directory, features, described, {"shards": described})
    return store.Store(directory, store.read_manifest(directory))


def reader(config: ml_collections.ConfigDict, batch: int, seconds: float) -> str:
    config.trajectories.shard_size = 1024
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = random_store(config, pathlib.Path(folder), config.trajectories.count)
        batches = stream(source, batch_size=batch, seed=0, num_threads=config.run.workers)
        size = sum(value.nbytes for value in next(batches).values()) / batch
        rates, processor = [], []
        for _ in range(5):
            start, used, read = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - start < seconds / 5:
                read += len(next(batches)["label"])
            rates.append(read / (time.perf_counter() - start))
            processor.append((time.process_time() - used) / read * 1e6)
        megabytes = np.median(rates) * size / 1e6
        rows.append((batch, config.run.workers, spread(rates, 0), f"{megabytes:.0f}", spread(processor, 0)))
    about = f"{len(source)} records of {size:.0f} bytes, which the system's page cache holds; nothing else at work:\n\n"
    return about + table(("batch", "threads", "trajectories/s", "MB/s", "processor time, µs a trajectory"), rows)


def loop(config: ml_collections.ConfigDict, batch: int, seconds: float) -> str:
    """Distils on random trajectories, by the stage's own loop; what its metrics tell, window by window."""
    config.distill.batch_size = batch
    every, window = config.distill.checkpoint_every, config.run.log_every
    student = make_student(config)
    params = init_from_teacher(teacher_params(make_teacher(config), example_shape(config)), student)
    objective = ard(student, target="x0", columns=tuple(range(student.steps)))
    method = Method(objective, flops=6 * student_macs(student, example_shape(config)))
    with tempfile.TemporaryDirectory() as folder:
        source = random_store(config, pathlib.Path(folder) / "store", config.trajectories.count)
        directory = pathlib.Path(folder) / "run"
        directory.mkdir()
        fit(
            Task(source, method, Labels(config.data.num_classes)),
            params,
            config,
            config.distill,
            directory,
            make_mesh(),
            Stopwatch(),
        )
        lines = read_lines(directory / "metrics.jsonl")
    # the windows between two checkpoints, one row a checkpoint; the first row compiles and has no checkpoint before it
    windows = [line for line in lines if line["step"] > every]
    step = np.array([1 / line["steps_per_s"] for line in windows]).reshape(-1, every // window)
    cost = step.mean(axis=1) / step[:, -1] - 1
    wait = [line["input_wait"] for line in windows]
    header = ["steps after a checkpoint", "ms a step"]
    rows = [(f"{i * window + 1}–{(i + 1) * window}", spread(times * 1e3)) for i, times in enumerate(step.T)]
    figures = [
        ("waiting for input, of the time", spread(np.multiply(wait, 100)) + " %"),
        ("checkpoints, of the time without", spread(cost * 100) + " %"),
        ("utilisation", spread([line["utilisation"] for line in windows])),
    ]
    about = (
        f"A checkpoint every {every} steps of batch {config.distill.batch_size}; the last window has none at work.\n\n"
    )
    return about + table(header, rows) + "\n\n" + table(("what", "median (least–greatest)"), figures)


def read_lines(path: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Item: its function of a config, rows at a time and seconds; how many rows on a CPU, and on an accelerator.
ITEMS = {
    "sampling": (sampling, (8, 128)),
    "blocks": (blocks, (2, 32)),
    "training": (training, (4, 64)),
    "trajectories": (trajectories, (2, 64)),
    "reader": (reader, (64, 64)),
    "loop": (loop, (32, 32)),
}


# ------------------------------------------------------------------------------------------------ command line


def configs(size: str) -> dict[str, ml_collections.ConfigDict]:
    """What each item measures: item → config.

    Raises:
        UserError: no such size.
    """
    small, disk, quickstart = settings("DiT-S/2"), default_config(), digits.get_config()
    small.model.dtype = "float32"
    disk.trajectories.update(count=4096, shard_size=1024)
    quickstart.distill.checkpoint_every, quickstart.run.log_every = 100, 25
    own = {"blocks": small, "reader": disk, "loop": quickstart}
    return {item: own[item] if item in own else settings(size) for item in ITEMS}


def about(size: str) -> str:
    """The device, its software and its matrix-product rate."""
    device, dtype = jax.devices()[0], compute_dtype("auto")
    kind = (
        f"{os.cpu_count()} processors" if device.platform == "cpu" else f"{jax.device_count()} × {device.device_kind}"
    )
    rate = measured_matmul_rate(dtype, seconds=1.0)
    return f"{size}, {dtype.name}, on {kind} with jax {jax.__version__}; matrix product {rate / 1e9:,.0f} GFLOP/s."


FLAGS = {
    "--only": dict(nargs="+", choices=ITEMS, default=[*ITEMS], metavar="ITEM", help=", ".join(ITEMS)),
    "--size": dict(help="a published size such as DiT-S/2, of sampling, training and trajectories"),
    "--batch": dict(type=int, help="rows at a time, in place of each item's own number"),
    "--seconds": dict(type=float, default=30.0, help="turns start for so long, and there are two at least"),
}


def main(arguments: list[str]) -> int:
    set_up_logging()
    logging.getLogger("ard_jax").setLevel(logging.WARNING)  # what the items run would say line by line
    on_cpu = jax.default_backend() == "cpu"
    try:
        args = parse_flags(FLAGS, arguments, prog="python -m benchmarks.speed", description=__doc__)
        size = args.size or ("DiT-B/2" if on_cpu else "DiT-XL/2")
        every = configs(size)
    except UserError as error:
        print(f"benchmarks.speed: {error}", file=sys.stderr)
        return 2
    print(f"# Speed\n\n{about(size)}", flush=True)
    for item in args.only:
        function, batches = ITEMS[item]
        print(
            f"\n## {item.capitalize()}\n\n{function(every[item], args.batch or batches[not on_cpu], args.seconds)}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
