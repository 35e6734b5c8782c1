"""The benchmarks measure what they say: the dense reference is the student, and every item prints its own figures."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import macs
from networks import ard_student
from quick import quick_jit
from test_models import SMALL, random_params, student_inputs

from ard_jax.build import make_student, make_teacher
from ard_jax.models import parameter_shapes, size_fields
from ard_jax.models.flops import student_macs, teacher_macs
from ard_jax.objectives.ard import ard
from ard_jax.sampling import sample_student
from benchmarks import dense, measure, speed
from configs import smoke

LATENT = (32, 32, 4)


# ----------------------------------------------------------------------------------------- the dense reference


def pair(**changes):
    """A small student, parameters that all matter, points with the data at their end, labels; float32."""
    student = ard_student(**SMALL, steps=3, **changes)
    points, y = student_inputs(3, dtype=np.float32)
    return student, random_params(student, dtype=np.float32), points, y


def assert_equal_to_rounding(ours, theirs):
    for own, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(own, other, rtol=2e-5, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize(
    "changes", [{"history_layers": 1}, {"history_layers": 0}, {"history_layers": 2, "mask": "window"}]
)
def test_the_dense_reference_is_the_student(changes):
    student, params, points, y = pair(**changes)
    inputs = points[:, :-1]
    expected = quick_jit(student.apply)({"params": params}, inputs, y)
    assert_equal_to_rounding(quick_jit(lambda *args: dense.forward(student, *args))(params, inputs, y), expected)
    expected = quick_jit(lambda *args: sample_student(student, *args))(params, points[:, 0], y)
    assert_equal_to_rounding(quick_jit(lambda *args: dense.sample(student, *args))(params, points[:, 0], y), expected)


def test_its_gradient_is_the_student_s():
    student, params, points, y = pair(history_layers=1)
    batch = jax.tree.map(jnp.asarray, {"noise": points[:, 0], "x0": points[:, 1:], "condition": y})

    def gradient(student):
        loss = ard(student, target="x0", columns=(0, 1, 2))
        return quick_jit(jax.grad(lambda params: loss(params, None, batch, None)[0]))(params)

    assert_equal_to_rounding(gradient(dense.DenseStudent(student)), gradient(student))


def test_it_costs_what_the_published_code_does():
    """docs/METHOD.md section 5; its formula counts every product of its trace."""
    student = ard_student(**size_fields("DiT-XL/2"), steps=4, history_layers=6)
    assert round(dense.dense_macs(student, LATENT, training=True) / 1e9, 1) == 755.3
    assert round(dense.dense_macs(student, LATENT, training=False) / 1e9, 1) == 710.0
    points, label = jax.ShapeDtypeStruct((1, 4, *LATENT), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    params = parameter_shapes(student, points, label)
    # the time embedding of all blocks is computed in each of its steps
    forward = macs(lambda *args: dense.forward(student, *args), params, points, label)
    assert forward == dense.dense_macs(student, LATENT, training=True)
    noise = jax.ShapeDtypeStruct((1, *LATENT), jnp.float32)
    sampler = macs(lambda *args: dense.sample(student, *args), params, noise, label)
    assert sampler == pytest.approx(dense.dense_macs(student, LATENT, training=False), rel=1e-4)


# ------------------------------------------------------------------------------------------------------ timing


def test_runs_are_timed_in_turn():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    turns = measure.in_turns(runs, jnp.float32, 0.0, turn="abb")
    assert calls == [*"ab", *"abb" * measure.LEAST_TURNS]  # once before the clock runs
    assert {name: len(seconds) for name, seconds in turns.seconds.items()} == {"a": 2, "b": 2}
    assert len(turns.rates) == 2 and turns.rate() > 1e7


def test_figures_of_turns():
    turns = measure.Turns({"a": [1.0, 6.0, 8.0], "b": [1.0, 2.0, 4.0]}, [10.0, 20.0, 60.0])
    assert turns.median("a") == 6 and turns.rate() == 20
    assert turns.ratio("a", "b").tolist() == [1, 3, 2]
    assert turns.utilisation("b", flops=10.0) == 0.25
    assert measure.spread([1.0, 3.0, 2.0], 1) == "2.0 (1.0–3.0)"
    assert measure.table(("x", "y"), [(1, "z")]) == "| x | y |\n| --- | --- |\n| 1 | z |"


# ------------------------------------------------------------------------------------------------------- items


def config():
    """The smoke config as the items want it: with the paper's steps and points, float32."""
    made = smoke.get_config()
    made.diffusion.steps = 25
    made.trajectories.points = made.student.points = (15, 10, 5, 0)
    made.data.source = "tfds"
    return made


def tables(text):
    """The Markdown tables in a text: lists of dicts header → cell."""
    found = []
    for part in re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.strip().split("\n")]
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def figure(cell):
    """Median, least and greatest of a cell such as "2.0 (1.0–3.0) %"."""
    median, low, high = map(float, re.fullmatch(r"(\S+) \((\S+)–(\S+)\)(?: %)?", cell).groups())
    assert low <= median <= high
    return median


def giga(count):
    return f"{count / 1e9:.4g}"


@pytest.mark.slow
def test_sampling():
    made = config()
    student, shape = make_student(made), (8, 8, 1)
    teacher, own = 50 * teacher_macs(make_teacher(made), shape), student_macs(student, shape)
    alone = student_macs(student.clone(history_layers=0), shape)
    times, ratios = tables(speed.sampling(made, 2, 0.0))
    assert [row["batch"] for row in times] == ["1"] * 3 + ["2"] * 3
    assert [row["GMAC an image"] for row in times] == [giga(teacher), giga(own), giga(alone)] * 2
    assert [row["what"].split(",")[0] for row in times[:3]] == ["teacher", "student", "student"]
    assert "N = 1 of 2" in times[1]["what"] and "N = 0" in times[2]["what"]
    assert [row["of FLOPs"] for row in ratios[:3]] == [
        f"{a:.3f}" for a in (teacher / own, teacher / alone, own / alone)
    ]
    assert all(figure(row["ms an image"]) > 0 for row in times)
    assert all(figure(row["of time"]) > 0 for row in ratios)


@pytest.mark.slow
def test_blocks():
    made = config()
    student, shape = make_student(made), (8, 8, 1)
    [rows] = tables(speed.blocks(made, 2, 0.0))
    assert [row["what"] for row in rows] == ["forward", "training step", "sampler"]
    own = student_macs(student, shape)
    whole, sampler = (dense.dense_macs(student, shape, training) for training in (True, False))
    assert [row["GMAC, blocks"] for row in rows] == [giga(own), giga(3 * own), giga(own)]
    assert [row["GMAC, dense"] for row in rows] == [giga(whole), giga(3 * whole), giga(sampler)]
    assert [row["dense ÷ blocks, FLOPs"] for row in rows] == [f"{m / own:.3f}" for m in (whole, whole, sampler)]
    assert all(figure(row[name]) > 0 for row in rows for name in ("ms, blocks", "ms, dense", "and time"))


@pytest.mark.slow
def test_training():
    made = config()
    text = speed.training(made, 4, 0.0)
    [rows] = tables(text)
    assert [row["rematerialisation"] for row in rows] == ["none", "dots", "full"]
    assert {row["GMAC a trajectory"] for row in rows} == {giga(3 * student_macs(make_student(made), (8, 8, 1)))}
    fastest = min(rows, key=lambda row: figure(row["seconds a step"]))
    assert figure(fastest["seconds a step"]) == min(
        figure(row["seconds a step"]) for row in rows if row["rematerialisation"] in text.split("fastest: ")[1][:5]
    )
    assert all(float(row["trajectories/s"]) > 0 for row in rows)


def test_a_step_goes_on_from_the_last():
    made = config()
    student = make_student(made)
    params = jax.jit(student.init)(jax.random.key(0), jnp.zeros((1, 4, 8, 8, 1)), jnp.zeros(1, jnp.int32))["params"]
    step = speed.Step(ard(student, target="x0", columns=(0, 1, 2, 3)), params, made, speed.inputs(made, 2))
    losses = [float(step()[1]["loss"]) for _ in range(10)]
    assert int(step.state.step) == 10 and losses[-1] < losses[0]


def test_trajectories():
    made = config()
    [[row]] = tables(speed.trajectories(made, 3, 0.0))
    assert row["batch"] == "3" and row["GMAC a trajectory"] == giga(50 * teacher_macs(make_teacher(made), (8, 8, 1)))
    assert float(row["trajectories/s"]) == pytest.approx(1 / figure(row["seconds a trajectory"]), rel=1)


def test_reader():
    made = config()
    made.trajectories.update(count=40, shard_size=16, keep_noisy=False)
    text = speed.reader(made, 8, 0.1)
    [[row]] = tables(text)
    size = 5 * 64 * 2 + 3 * 8  # noise and four points in float16; label, index and position
    assert f"40 records of {size} bytes" in text
    assert row["batch"] == "8" and figure(row["trajectories/s"]) > 0
    assert float(row["MB/s"]) == pytest.approx(figure(row["trajectories/s"]) * size / 1e6, abs=1)


@pytest.mark.slow
def test_loop():
    made = config()
    made.distill.update(steps=12, checkpoint_every=4)
    made.run.log_every = 2
    windows, figures = tables(speed.loop(made, 4, 0.0))
    assert [row["steps after a checkpoint"] for row in windows] == ["1–2", "3–4"]
    assert all(figure(row["ms a step"]) > 0 for row in windows)
    values = {row["what"]: row["median (least–greatest)"] for row in figures}
    assert 0 < figure(values["waiting for input, of the time"]) < 100
    assert "checkpoints, of the time without" in values


# ------------------------------------------------------------------------------------------------ command line


def test_the_command_prints_the_items_that_are_asked_for(capsys, monkeypatch):
    assert speed.main(["--only", "reader", "--seconds", "0.1"]) == 0
    text = capsys.readouterr().out
    assert f"jax {jax.__version__}" in text and re.search(r"matrix product [\d,]+ GFLOP/s", text)
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == ["Reader"]
    assert "4096 records of 40984 bytes" in text


def test_sizes_of_the_items():
    every = speed.configs("DiT-XL/2")
    assert [made.student.history_layers for made in every.values()] == [6, 3, 6, 6, 6, 2]
    student = make_student(every["blocks"])
    backbone = student.backbone
    assert (backbone.hidden_size, backbone.depth, backbone.num_heads, backbone.dtype) == (384, 12, 6, jnp.float32)
    assert every["loop"].distill.checkpoint_every == 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--size", "DiT-Q/2"], "not a published size"), (["--sise", "DiT-B/2"], "did you mean --size")],
)
def test_bad_input_is_said_in_a_sentence(capsys, arguments, words):
    assert speed.main(arguments) == 2
    assert words in capsys.readouterr().err
