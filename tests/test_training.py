"""The training loop: a run that is stopped at any instant and started again is the run that was never stopped."""

import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from pipeline_fixtures import STAGES, copy, done, finish, process, sentence, smoke
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from ard_jax import parallel
from ard_jax.config import default_config
from ard_jax.data import InMemory
from ard_jax.data.stream import stream
from ard_jax.errors import Preempted, UserError
from ard_jax.files import read_json, tree_sha256
from ard_jax.objectives import Joint, Method
from ard_jax.parallel import make_mesh
from ard_jax.training import checkpoints, loop
from ard_jax.training.loop import NotFinite, Preemption, train
from ard_jax.training.state import (
    OPTIMIZERS,
    init_state,
    learning_rate,
    make_optimizer,
    make_step,
    optimizer_of,
    ramped_decay,
    state_shapes,
)

OPTIMIZER = default_config().distill.optimizer.to_dict()

STEPS, BATCH = 12, 4


# ------------------------------------------------------------------------------- a model that compiles at once


def objective(params, frozen, batch, key):
    """Linear regression with noise drawn from the run's key and the example's position."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["position"])
    noise = jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys)
    error = (batch["x"] + 0.1 * noise) @ params["w"] + params["b"] - batch["y"]
    return jnp.mean(error**2), {"error": jnp.mean(jnp.abs(error))}


def data(**replaced):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3)).astype(np.float32)
    return InMemory({"x": x, "y": (x @ [1.0, -2.0, 0.5]).astype(np.float32)} | replaced)


def settings(**changes):
    values = {
        "steps": STEPS,
        "batch_size": BATCH,
        "accumulate": 1,
        "checkpoint_every": 3,
        "optimizer": dict(OPTIMIZER),
    }
    values["optimizer"] |= {"learning_rate": 0.05, "ema": 0.9}
    return ml_collections.ConfigDict(values | changes)


def fit(directory, source=None, loggers=(), log_every=2, method=None, keep=2, every=0, pictures=None, **changes):
    """Trains the small model; returns what `train` does."""
    run = ml_collections.ConfigDict(
        {"log_every": log_every, "keep_checkpoints": keep, "keep_every": every, "loggers": loggers}
    )
    return train(
        method or Method(objective, 24.0),
        {"w": jnp.zeros(3), "b": jnp.zeros(())},
        stream(source or data(), batch_size=BATCH, seed=3),
        settings=settings(**changes),
        run=run,
        seed=5,
        directory=directory,
        mesh=make_mesh(),
        pictures=pictures,
    )


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def saved_steps(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    """The small model needs no measured peak, which takes a third of a second."""
    monkeypatch.setattr(loop, "peak_flops", lambda: 1e12)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "peak_flops", lambda: 1e12)
        directory = tmp_path_factory.mktemp("uninterrupted")
        return directory, fit(directory).state


@pytest.fixture
def at_step(monkeypatch):
    """at_step(step, act): does something just before a step of the training."""
    calls = {}
    before = loop.put_batch

    def put_batch(batch, mesh):
        step = int(batch["position"][0]) // BATCH + 1
        calls.get(step, lambda: None)()
        return before(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put_batch)
    return calls.__setitem__


def test_what_a_run_starts_from_is_freed_but_for_what_it_reads(tmp_path, at_step):
    """Or it would lie beside the state to the end, of a fresh run and of one that goes on."""
    for last in (2, 4):
        params, seen = {"w": jnp.zeros(3), "b": jnp.zeros(())}, []
        at_step(last, lambda params=params, seen=seen: seen.append([leaf.is_deleted() for leaf in params.values()]))
        train(
            Method(objective, 24.0),
            params,
            stream(data(), batch_size=BATCH, seed=3),
            settings=settings(steps=last),
            run=ml_collections.ConfigDict({"log_every": 2, "keep_checkpoints": 2, "keep_every": 0, "loggers": ()}),
            seed=5,
            directory=tmp_path,
            mesh=make_mesh(),
            frozen={"teacher": params["w"]},
        )
        assert seen == [[False, True]]


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_small_model_trains(uninterrupted):
    directory, state = uninterrupted
    logged = lines(directory)
    assert [line["step"] for line in logged] == [2, 3, 4, 6, 8, 9, 10, 12]
    x, y = data().arrays["x"], data().arrays["y"]
    assert np.mean((x @ state.params["w"] + state.params["b"] - y) ** 2) < 0.6 * np.mean(y**2)
    assert saved_steps(directory) == [9, 12] and int(state.step) == 12


def test_the_loop_computes_what_it_says(uninterrupted):
    """The same steps written out: batches in the stream's order, clipping, AdamW, the ramped average."""
    directory, state = uninterrupted
    batches = stream(data(), batch_size=BATCH, seed=3)
    params = average = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05, weight_decay=0.0))
    opt_state, losses = optimizer.init(params), []
    for step in range(STEPS):
        batch = next(batches)
        (loss, _), gradient = jax.value_and_grad(objective, has_aux=True)(params, None, batch, jax.random.key(5))
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        decay = min(0.9, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, params)
        losses.append(float(loss))
    for ours, theirs in ((state.params, params), (state.ema, average)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    logged = {line["step"]: line["loss"] for line in lines(directory)}
    assert logged[2] == pytest.approx(np.mean(losses[:2]), rel=1e-5)
    assert logged[3] == pytest.approx(losses[2], rel=1e-5)
    assert logged[12] == pytest.approx(np.mean(losses[10:]), rel=1e-5)


def test_metrics_have_their_fields(uninterrupted):
    for line in lines(uninterrupted[0]):
        assert set(line) == {
            *("step", "loss", "error", "gradient_norm", "parameter_norm"),
            *("steps_per_s", "samples_per_s", "utilisation", "input_wait"),
        }
        assert 0 < line["input_wait"] < 1
        assert line["samples_per_s"] == pytest.approx(BATCH * line["steps_per_s"])
        assert line["utilisation"] == pytest.approx(line["samples_per_s"] * 24.0 / 1e12)


# ------------------------------------------------------------------------------------------ stopped and resumed


@pytest.mark.parametrize("step", [1, 3, 7, 11])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(uninterrupted, tmp_path, at_step, step):
    at_step(step, terminate)
    with pytest.raises(Preempted, match=f"stopped at step {step} of 12"):
        fit(tmp_path)
    assert saved_steps(tmp_path)[-1] == step
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    at_step(step, lambda: pytest.fail("a step that was saved was done again"))
    state = fit(tmp_path).state
    assert tree_sha256(state) == tree_sha256(uninterrupted[1])
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-1] == 12


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_lost_terminal_and_ctrl_c_save_as_a_preemption_does(uninterrupted, tmp_path, at_step, number):
    before = {each: signal.signal(each, signal.default_int_handler) for each in (signal.SIGHUP, signal.SIGINT)}
    try:
        at_step(7, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Preempted, match="stopped at step 7 of 12") as stop:
            fit(tmp_path)
        assert stop.value.by_hand == (number == signal.SIGINT) and saved_steps(tmp_path)[-1] == 7
        assert signal.getsignal(number) == signal.default_int_handler
        at_step(7, lambda: None)
        assert tree_sha256(fit(tmp_path).state) == tree_sha256(uninterrupted[1])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Coordinator:
    """JAX's rule for one of several hosts that go in step: all stop where they ask about the step that it chose.

    Attributes:
        step: the last that was asked about.
        chosen: the one after that, once there is a notice.
    """

    def __init__(self):
        self.step, self.chosen = 0, None

    def notice(self):
        self.chosen = self.step + 1

    def reached(self, step):
        self.step = step
        return step == self.chosen


@pytest.fixture
def coordinator(monkeypatch):
    made = Coordinator()
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop.multihost_utils, "reached_preemption_sync_point", made.reached)
    monkeypatch.setattr(loop, "gather_json", lambda value: [value, value], raising=False)
    monkeypatch.setattr(Preemption, "last", 0, raising=False)
    return made


@pytest.mark.parametrize("resumed", [0, 7, 5000])
def test_a_notice_before_the_first_step_of_several_hosts_is_not_lost(coordinator, resumed):
    """It comes while a checkpoint is read, or while the first step compiles."""
    coordinator.notice()
    with Preemption(resumed) as preemption:
        assert preemption.asked(resumed + 1)


@pytest.mark.parametrize("resumed", [0, 7, 5000])
def test_a_notice_while_the_first_step_of_several_hosts_compiles_is_not_lost(coordinator, resumed):
    with Preemption(resumed) as preemption:
        coordinator.notice()
        assert preemption.asked(resumed + 1)


@pytest.mark.parametrize("resumed", [0, 4, 90])
def test_a_notice_between_two_trainings_of_several_hosts_is_not_lost(coordinator, resumed):
    with Preemption(0) as preemption:
        assert not any(preemption.asked(step) for step in range(1, 21))
    coordinator.notice()
    with Preemption(resumed) as preemption:
        assert preemption.asked(resumed + 1)


def test_several_hosts_stop_if_one_of_them_has_come_further(coordinator, monkeypatch):
    """The step was chosen when this one had asked about the next training's, and another about the last one's."""
    monkeypatch.setattr(loop, "gather_json", lambda value: [value, True])
    with Preemption(0) as preemption:
        assert preemption.asked(1)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_several_hosts_are_asked_to_stop_by_a_lost_terminal_and_ctrl_c(coordinator, number):
    """Which JAX does not know of; SIGTERM it tells all hosts."""
    before = signal.signal(signal.SIGTERM, lambda *_: coordinator.notice())
    others = signal.signal(number, lambda *_: None)
    try:
        with Preemption(0) as preemption:
            assert not preemption.asked(1)
            os.kill(os.getpid(), number)
            assert preemption.asked(2) and preemption.noted == number
    finally:
        signal.signal(signal.SIGTERM, before), signal.signal(number, others)


def test_a_second_ctrl_c_ends_at_once(tmp_path, at_step):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells ignore it
    try:
        at_step(7, twice)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path)
        assert saved_steps(tmp_path)[-1] == 6
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("part", ["params", "ema", "optimizer"])
def test_a_flipped_bit_is_seen_on_resume(uninterrupted, tmp_path, at_step, caplog, part):
    at_step(8, terminate)
    with pytest.raises(Preempted):
        fit(tmp_path)
    assert saved_steps(tmp_path) == [6, 8]
    every = [path for path in (tmp_path / "checkpoints" / "8" / part).rglob("*") if path.is_file()]
    file = max(every, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    at_step(8, lambda: None)
    with caplog.at_level("INFO", "ard_jax"):
        assert tree_sha256(fit(tmp_path).state) == tree_sha256(uninterrupted[1])
    assert "checkpoint 8 cannot be read (1 of its files were altered or lost, such as" in caplog.text
    assert "resuming at step 6 of 12." in caplog.text
    assert (tmp_path / "checkpoints" / "8.unreadable" / part).exists()


def test_hashes_of_a_checkpoint_that_was_set_aside_are_not_held_against_the_next(uninterrupted, tmp_path):
    """Killed between a new checkpoint of that step and its hashes, a run would set the good one aside too."""
    copy(uninterrupted[0], tmp_path, "checkpoints", "checksums")
    truncate(largest_file(tmp_path / "checkpoints" / "12" / "params"))
    position = {"data": stream(data(), batch_size=BATCH, seed=3).get_state(), "seconds": 0.0}
    with checkpoints.make_manager(tmp_path / "checkpoints", 2) as manager:
        state, _ = checkpoints.restore(manager, uninterrupted[1])
        assert int(state.step) == 9
        checkpoints.save(manager, uninterrupted[1], position)
        manager.wait_until_finished()
        assert saved_steps(tmp_path) == [9, 12]
    with checkpoints.make_manager(tmp_path / "checkpoints", 2) as manager:
        state, _ = checkpoints.restore(manager, uninterrupted[1])
        assert tree_sha256(state) == tree_sha256(uninterrupted[1])


def test_the_checkpoints_that_are_kept_have_hashes(uninterrupted):
    directory, _ = uninterrupted
    noted = {path.stem for path in (directory / "checksums").iterdir()}
    assert noted == {path.name for path in (directory / "checkpoints").iterdir()}


@pytest.mark.parametrize(
    ("keep", "every", "wanted", "kept"),
    [
        (2, 0, [], [10, 12]),
        (0, 0, [], [2, 4, 6, 8, 10, 12]),
        (1, 4, [], [4, 8, 12]),
        (1, 0, [4, 10], [4, 10, 12]),
    ],
)
def test_the_checkpoints_that_are_kept(uninterrupted, tmp_path, keep, every, wanted, kept):
    """The newest, those of every n-th step, and those that somebody asks for; none changes what is trained."""
    checkpoints.write_wanted(tmp_path, wanted)
    state = fit(tmp_path, keep=keep, every=every, checkpoint_every=2).state
    assert saved_steps(tmp_path) == kept == checkpoints.sealed_steps(tmp_path / "checkpoints")
    assert tree_sha256(state.params) == tree_sha256(uninterrupted[1].params)


def test_a_damaged_wish_stops_no_training(tmp_path):
    (tmp_path / "wanted.json").write_text('{"steps": [3')
    fit(tmp_path)
    assert saved_steps(tmp_path) == [9, 12]


def test_a_checkpoint_has_its_hashes_before_the_next_one(tmp_path, at_step, monkeypatch):
    """Whoever looks on need not wait for as long as it takes to train to the next."""
    managers, sealed, has_been_sealed = [], [], threading.Event()
    make_manager, seal = checkpoints.make_manager, checkpoints.seal

    def make(*arguments):
        managers.append(make_manager(*arguments))
        return managers[-1]

    def note(directory, last=None):
        seal(directory, last)
        if last == 3:
            has_been_sealed.set()

    def look():
        has_been_sealed.wait(60)
        sealed.extend(checkpoints.sealed_steps(tmp_path / "checkpoints"))

    monkeypatch.setattr(checkpoints, "make_manager", make)
    monkeypatch.setattr(checkpoints, "seal", note)
    at_step(5, lambda: managers[0].wait_until_finished())
    at_step(6, look)
    fit(tmp_path)
    assert sealed == [3]


def test_another_checkpoint_of_the_same_step_has_another_hash(uninterrupted, tmp_path):
    fit(tmp_path, optimizer=dict(OPTIMIZER) | {"learning_rate": 0.01, "ema": 0.9})
    ours, theirs = (
        checkpoints.checkpoint_sha256(folder / "checkpoints", 12) for folder in (tmp_path, uninterrupted[0])
    )
    assert ours != theirs
    shutil.rmtree(tmp_path / "checksums")
    assert checkpoints.checkpoint_sha256(tmp_path / "checkpoints", 12) == ours  # of a converted model, which has none


def test_after_a_divergence_the_rate_may_be_lowered(tmp_path):
    settings = [
        "teacher.steps=12",
        "teacher.optimizer.name=sgd",
        "teacher.optimizer.clip=0",
        "teacher.optimizer.schedule=constant",
    ]
    said = sentence(smoke("teacher", tmp_path, *settings, "teacher.optimizer.learning_rate=900"), "teacher", last=True)
    assert " is nan at step " in said or " is inf at step " in said
    assert "lower the optimizer's learning_rate" in said
    lowered = smoke("teacher", tmp_path, *settings, "teacher.optimizer.learning_rate=0.001")
    assert lowered.status == 0
    assert "teacher.optimizer.learning_rate is 0.001 from here on" in lowered.err and "it was 900.0." in lowered.err
    config = read_json(tmp_path / "teacher" / "config.json")
    assert config["teacher"]["optimizer"]["learning_rate"] == 0.001
    (entry,) = config["history"]
    assert entry.pop("after_step") % 5 == 0
    assert entry == {"teacher.optimizer.learning_rate": {"before": 900.0, "now": 0.001}}
    # what is finished was made with what config.json says
    said = sentence(smoke("teacher", tmp_path, *settings, "teacher.optimizer.learning_rate=0.1"), "teacher")
    assert "teacher.optimizer.learning_rate 0.001 there, 0.1 here" in said


def test_more_steps_after_the_end_are_what_a_longer_run_would_be(tmp_path):
    constant = "teacher.optimizer.schedule=constant"
    for workdir, steps in (("long", 10), ("short", 6), ("short", 10)):
        assert smoke("teacher", tmp_path / workdir, constant, f"teacher.steps={steps}").status == 0
    hashes = [done(tmp_path / workdir / "teacher")["sha256"] for workdir in ("long", "short")]
    assert hashes[0] == hashes[1]
    assert "teacher.steps 10 there, 8 here" in sentence(
        smoke("teacher", tmp_path / "long", constant, "teacher.steps=8"), "teacher"
    )


def test_more_steps_of_a_falling_rate_are_said_to_be_something_else(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher")  # a cosine over 20 steps
    longer = smoke("teacher", workdir, "teacher.steps=22")
    assert longer.status == 0 and done(workdir / "teacher")["step"] == 22
    assert "as its rate is cosine, this is not what so many steps from the start would be." in longer.err


def test_the_cadence_of_checkpoints_may_change(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher")
    assert smoke("teacher", workdir, "teacher.checkpoint_every=10").status == 0


def test_a_request_to_stop_in_the_last_step_changes_nothing(uninterrupted, tmp_path, at_step):
    at_step(12, terminate)
    assert tree_sha256(fit(tmp_path).state) == tree_sha256(uninterrupted[1])


def test_a_request_that_comes_while_metrics_are_fetched_is_not_answered_without_saving(tmp_path, monkeypatch):
    """Fetching waits for the device, so that is where most requests come; step 4 logs, but saves nothing."""
    report, reports = loop.Meter.report, iter(range(1, 10))

    def interrupted(meter):
        report(meter)
        if next(reports) == 3:  # after steps 2, 3 and 4
            terminate()

    monkeypatch.setattr(loop.Meter, "report", interrupted)
    with pytest.raises(Preempted) as stop:
        fit(tmp_path)
    assert str(stop.value) == f"stopped at step {saved_steps(tmp_path)[-1]} of 12" == "stopped at step 5 of 12"


@pytest.mark.parametrize("step", [2, 5, 9])
def test_a_run_that_fails_between_checkpoints_goes_on_from_the_last_one(uninterrupted, tmp_path, at_step, step):
    def fall_over():
        raise KeyboardInterrupt

    at_step(step, fall_over)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path)
    assert saved_steps(tmp_path)[-1:] == [step - 1 - (step - 1) % 3 or None][: step > 3]
    at_step(step, lambda: None)
    assert tree_sha256(fit(tmp_path).state) == tree_sha256(uninterrupted[1])
    # whatever had been logged beyond the checkpoint is logged once
    assert [line["step"] for line in lines(tmp_path)] == [2, 3, 4, 6, 8, 9, 10, 12]


def test_a_line_cut_in_two_is_dropped(uninterrupted, tmp_path, at_step):
    at_step(6, terminate)
    with pytest.raises(Preempted):
        fit(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1')
    fit(tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [2, 3, 4, 6, 8, 9, 10, 12]


def test_seconds_add_up_over_starts(tmp_path, at_step):
    at_step(7, terminate)
    with pytest.raises(Preempted):
        fit(tmp_path)
    at_step(7, lambda: None)
    at_step(10, lambda: time.sleep(0.2))
    manager = checkpoints.make_manager(tmp_path / "checkpoints", 2)
    first = manager.restore(7, args=checkpoints.ocp.args.Composite(position=checkpoints.ocp.args.JsonRestore()))
    manager.close()
    assert first.position["seconds"] > 0
    assert fit(tmp_path).seconds > first.position["seconds"] + 0.2


def test_the_order_of_the_data_is_a_function_of_the_step(tmp_path, at_step, monkeypatch):
    """Step k reads positions [(k-1)·B, k·B) of the endless row, however often the run was stopped."""
    seen, put = {}, loop.put_batch

    def watch(batch, mesh):
        seen.setdefault(int(batch["position"][0]) // BATCH + 1, []).append((batch["position"].tolist(), batch["x"]))
        return put(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", watch)
    for step in (2, 5, 8):
        at_step(step, terminate)
        with pytest.raises(Preempted):
            fit(tmp_path)
    fit(tmp_path)
    source = stream(data(), batch_size=BATCH, seed=3)
    assert sorted(seen) == list(range(1, 13))
    for step in range(1, 13):
        batch = next(source)
        ((positions, x),) = seen[step]  # once, though the run was stopped three times
        assert positions == list(range((step - 1) * BATCH, step * BATCH))
        np.testing.assert_array_equal(x, batch["x"])


# ------------------------------------------------------------------------------------------ damaged checkpoints


def largest_file(folder):
    """The largest file of values in a part of a checkpoint."""
    return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [truncate, pathlib.Path.unlink])
@pytest.mark.parametrize("part", ["params", "ema", "optimizer", "position"])
def test_a_broken_checkpoint_is_passed_over(uninterrupted, tmp_path, part, damage, caplog):
    folder = copy(uninterrupted[0], tmp_path, "checkpoints") / "checkpoints" / "12" / part
    damage(folder / "metadata" if part == "position" else largest_file(folder))
    with caplog.at_level("INFO", logger="ard_jax"):
        state = fit(tmp_path).state
    said = [record.getMessage() for record in caplog.records if record.name == "ard_jax"]
    assert any(text.startswith("checkpoint 12 cannot be read (") and "the one before" in text for text in said)
    assert "resuming at step 9 of 12." in said
    assert tree_sha256(state) == tree_sha256(uninterrupted[1])
    assert saved_steps(tmp_path) == [9, 12]
    assert tree_sha256(fit(tmp_path).state) == tree_sha256(uninterrupted[1])  # and what it left is whole


def test_no_readable_checkpoint_ends_in_a_sentence(uninterrupted, tmp_path):
    copy(uninterrupted[0], tmp_path, "checkpoints")
    for step in ("9", "12"):
        truncate(largest_file(tmp_path / "checkpoints" / step / "params"))
    with pytest.raises(
        UserError, match=r"none of the checkpoints in .* can be read \(steps \[12, 9\]\): restore them from a copy"
    ):
        fit(tmp_path)
    assert saved_steps(tmp_path) == [9, 12]  # nothing was deleted on the user's behalf


def test_a_run_that_goes_on_never_makes_the_state_of_a_fresh_one(joint_run, tmp_path, at_step, monkeypatch):
    """Beside the one that is read there may be no room for it."""
    at_step(5, terminate)
    with pytest.raises(Preempted):
        fit(tmp_path, method=joint())
    monkeypatch.setattr(loop, "init_state", lambda *given: pytest.fail("the state of a fresh run was made"))
    assert tree_sha256(fit(tmp_path, method=joint()).state) == tree_sha256(joint_run[1])


def test_the_shapes_of_a_state_say_all_that_its_arrays_do():
    optimizer = optimizer_of(joint(), settings())
    given = {"w": jnp.zeros(3), "b": jnp.zeros(())}, optimizer, 5, make_mesh(), joint().begin
    shapes, state = state_shapes(*given), init_state(*given)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, array.sharding)


@pytest.fixture
def short_of_memory(monkeypatch):
    """Reading a checkpoint ends in what XLA, or NumPy, says when memory runs out; the steps that were tried."""
    tried = []

    def restore(manager, step, **_):
        tried.append(step)
        if len(tried) > 1:
            raise MemoryError("Unable to allocate 9.00 GiB")
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nMore")

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "restore", restore)
    return tried


def test_a_checkpoint_that_finds_no_memory_is_not_called_broken(uninterrupted, tmp_path, short_of_memory, caplog):
    copy(uninterrupted[0], tmp_path, "checkpoints")
    for said in ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.", "Unable to allocate 9.00 GiB"):
        with pytest.raises(UserError) as error:
            fit(tmp_path)
        assert str(error.value).startswith(f"memory ran out while checkpoint 12 was read ({said}): ")
    assert short_of_memory == [12, 12] and saved_steps(tmp_path) == [9, 12]
    assert "cannot be read" not in caplog.text


def test_parameters_that_find_no_memory_are_not_called_another_config_s(uninterrupted, short_of_memory):
    with pytest.raises(UserError, match="^memory ran out while checkpoint 12 was read "):
        checkpoints.load_parameters(uninterrupted[0] / "checkpoints", "ema", uninterrupted[1].ema)
    assert short_of_memory == [12]


def test_parameters_of_a_broken_checkpoint_end_in_a_sentence(uninterrupted, tmp_path):
    copy(uninterrupted[0], tmp_path, "checkpoints")
    truncate(largest_file(tmp_path / "checkpoints" / "12" / "ema"))
    with pytest.raises(UserError, match="checkpoint 12 in .* cannot be read") as error:
        checkpoints.load_parameters(tmp_path / "checkpoints", "ema", uninterrupted[1].ema)
    assert "\n" not in str(error.value)


def test_weights_with_a_flipped_bit_are_refused_by_the_next_stage(pipeline, tmp_path):
    """Orbax reads them without a word."""
    workdir = copy(pipeline, tmp_path, "teacher")
    path = largest_file(workdir / "teacher" / "checkpoints" / "20" / "ema")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    outcome = smoke("trajectories", workdir)
    assert outcome.status == 2 and "Traceback" not in outcome.err
    # which of these it is depends on where the middle of the compressed file happens to lie
    refusals = ("are not those that its done.json names", "cannot be read", "numbers that are NaN or infinite")
    assert any(refusal in outcome.err for refusal in refusals), outcome.err
    assert not (workdir / "trajectories").exists()


# ------------------------------------------------------------------------------------------------- not finite


def everything_saved_is_finite(directory, like):
    for step in saved_steps(directory):
        manager = checkpoints.make_manager(directory / "checkpoints", 2)
        state, _ = checkpoints.restore_step(manager, step, like)
        manager.close()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_loss_that_is_not_finite_stops_the_run(uninterrupted, tmp_path):
    """The source has a NaN at one record; the run stops in the step that reads it."""
    source = data()
    batches = stream(source, batch_size=BATCH, seed=3)
    order = [next(batches) for _ in range(5)]
    bad = int(np.flatnonzero((source.arrays["x"] == order[4]["x"][2]).all(axis=1))[0])  # first read in step 5
    y = source.arrays["y"].copy()
    y[bad] = np.nan
    with pytest.raises(NotFinite, match="^loss is nan at step 5, so the run stopped"):
        fit(tmp_path, source=data(y=y))
    assert saved_steps(tmp_path) == [3]
    everything_saved_is_finite(tmp_path, uninterrupted[1])
    assert tree_sha256(fit(tmp_path).state) == tree_sha256(uninterrupted[1])  # with mended data it goes on


def test_parameters_that_overflow_are_not_saved(uninterrupted, tmp_path):
    """The loss of that very step is still finite: it was computed before the update."""
    optimizer = OPTIMIZER | {"learning_rate": 3e38, "name": "sgd", "clip": 0.0}
    with pytest.raises(NotFinite, match="^parameter_norm is inf at step 1,"):
        fit(tmp_path, checkpoint_every=1, optimizer=optimizer)
    assert saved_steps(tmp_path) == []


def test_images_that_are_not_finite_stop_the_teacher(pipeline, tmp_path, monkeypatch):
    from ard_jax.stages import teacher

    source = teacher.image_source
    monkeypatch.setattr(
        teacher,
        "image_source",
        lambda settings: InMemory({**source(settings).arrays, "image": np.full((1797, 8, 8, 1), np.nan, np.float32)}),
    )
    outcome = smoke("teacher", tmp_path)
    assert outcome.status == 2 and "Traceback" not in outcome.err
    assert outcome.err.strip().splitlines()[-1].startswith("ard_jax teacher: loss is nan at step 1, so the run stopped")
    assert not (tmp_path / "teacher" / "done.json").exists()
    assert saved_steps(tmp_path / "teacher") == []


# ---------------------------------------------------------------------------------------- optimiser and average


def test_learning_rate_warms_up_and_falls():
    cosine = learning_rate(
        settings(optimizer=OPTIMIZER | {"schedule": "cosine", "warmup_steps": 4}).optimizer,
        20,
    )
    assert [float(cosine(step)) for step in (0, 2, 4, 12, 20)] == pytest.approx([0, 5e-5, 1e-4, 5e-5, 0], abs=1e-9)
    constant = learning_rate(settings(optimizer=OPTIMIZER).optimizer, 20)
    assert float(constant(0)) == float(constant(19)) == pytest.approx(1e-4)


def test_the_average_forgets_the_start():
    steps = np.array([0, 1, 90, 10**6])
    np.testing.assert_allclose(ramped_decay(0.99, jnp.asarray(steps)), [0.1, 2 / 11, 0.91, 0.99], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_trains(name):
    optimizer = make_optimizer(settings(optimizer=OPTIMIZER | {"name": name}).optimizer, 10)
    mesh = make_mesh()
    state = init_state({"w": jnp.ones(3), "b": jnp.ones(())}, optimizer, 0, mesh)
    batch = parallel.put_batch(next(stream(data(), batch_size=BATCH, seed=0)), mesh)
    after, _ = make_step(objective, optimizer, 0.9, mesh, state)(state, None, batch)
    assert all(not np.array_equal(a, np.ones_like(a)) for a in jax.tree.leaves(after.params))


def test_muon_turns_the_matrices_of_the_blocks_and_nothing_else():
    """Its update of a matrix has singular values that are all alike, whatever the gradient's; AdamW's has not."""
    rng = np.random.default_rng(0)
    scales = np.diag([1.0, 0.5, 0.1, 0.05])
    steep = np.stack([scales @ rng.normal(size=(4, 8)) for _ in range(2)]).astype(np.float32)
    gradient = {"blocks": {"qkv": {"kernel": jnp.asarray(steep), "bias": jnp.ones((2, 8))}}, "head": jnp.asarray(steep)}
    optimizer = make_optimizer(settings(optimizer=OPTIMIZER | {"name": "muon", "clip": 0.0}).optimizer, 10)
    moved, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    turned = np.linalg.svd(np.asarray(moved["blocks"]["qkv"]["kernel"]), compute_uv=False)
    assert (turned.max(axis=1) < 2 * turned.min(axis=1)).all()
    rate = float(learning_rate(settings(optimizer=OPTIMIZER).optimizer, 10)(0))
    size = np.sqrt(np.mean(np.square(moved["blocks"]["qkv"]["kernel"])))
    assert 0.1 * rate < size < 0.3 * rate  # as large as AdamW's usually are, so that the same rates suit both
    np.testing.assert_allclose(moved["head"], -1.4737 * rate * np.sign(steep), rtol=1e-2)  # AdamW's first, Nesterov's


def test_gradients_are_clipped(monkeypatch):
    mesh, batch = make_mesh(), {"x": jnp.full((4, 3), 100.0), "y": jnp.zeros(4), "position": jnp.arange(4)}
    sgd = {"name": "sgd", "learning_rate": 1.0}
    moved = {}
    for clip in (0.5, 0.0):
        optimizer = make_optimizer(settings(optimizer=OPTIMIZER | sgd | {"clip": clip}).optimizer, 10)
        start = {"w": jnp.ones(3), "b": jnp.ones(())}
        state = init_state(start, optimizer, 0, mesh)
        state, metrics = make_step(objective, optimizer, 0.9, mesh, state)(state, None, batch)
        moved[clip] = math.sqrt(sum(float(((a - 1) ** 2).sum()) for a in jax.tree.leaves(state.params)))
        assert float(metrics["gradient_norm"]) > 1e4  # as it was before clipping
    assert moved[0.5] == pytest.approx(0.5, rel=1e-4) and moved[0.0] > 1e4


# ---------------------------------------------------------------------------------------- several networks


def joint_gradients(networks, memory, frozen, batch, key, step):
    """A regression beside a copy of it that learns twice the answer; the memory counts the rows of both."""
    (loss, metrics), student = jax.value_and_grad(objective, has_aux=True)(networks["student"], frozen, batch, key)
    doubled = batch | {"y": 2 * batch["y"]}
    (other, _), rival = jax.value_and_grad(objective, has_aux=True)(networks["rival"], frozen, doubled, key)
    seen = {"rows": memory["rows"] + len(batch["y"]), "steps": jnp.asarray(step)}
    return {"student": student, "rival": rival}, seen, {"loss": loss, "loss_rival": other, **metrics}


def joint(**rival):
    """The rival starts at ones, and has an optimiser of its own."""

    def begin(params, frozen, key):
        ones = jax.tree.map(jnp.ones_like, params)
        return {"rival": ones}, {"rows": jnp.zeros((), jnp.int32), "steps": jnp.zeros((), jnp.int32)}

    own = ml_collections.ConfigDict(OPTIMIZER | {"name": "sgd", "learning_rate": 0.01, "clip": 0.0} | rival)
    return Method(Joint(joint_gradients), 24.0, begin=begin, optimizers={"rival": own})


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "peak_flops", lambda: 1e12)
        directory = tmp_path_factory.mktemp("joint")
        return directory, fit(directory, method=joint()).state


def test_each_network_learns_by_its_own_optimiser(joint_run, uninterrupted):
    """The student as if it were alone, its average too; the rival by plain gradient descent, written out."""
    state, alone = joint_run[1], uninterrupted[1]
    for ours, theirs in ((state.params, alone.params), (state.ema, alone.ema)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    batches, rival = stream(data(), batch_size=BATCH, seed=3), {"w": jnp.ones(3), "b": jnp.ones(())}
    for _ in range(STEPS):
        batch = next(batches)
        doubled = batch | {"y": 2 * batch["y"]}
        (_, _), gradient = jax.value_and_grad(objective, has_aux=True)(rival, None, doubled, jax.random.key(5))
        rival = jax.tree.map(lambda p, g: p - 0.01 * g, rival, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.others["rival"], rival)
    assert state.memory == {"rows": STEPS * BATCH, "steps": STEPS - 1}
    assert "loss_rival" in lines(joint_run[0])[0]


def test_checkpoints_keep_other_networks_and_the_memory(joint_run, tmp_path, at_step):
    at_step(5, terminate)
    with pytest.raises(Preempted):
        fit(tmp_path, method=joint())
    at_step(5, lambda: pytest.fail("a step that was saved was done again"))
    assert tree_sha256(fit(tmp_path, method=joint()).state) == tree_sha256(joint_run[1])


def test_several_networks_learn_from_microbatches(joint_run, tmp_path):
    """Means over rows do not care how they are split; the memory sees every microbatch."""
    state = fit(tmp_path, method=joint(), accumulate=2).state
    for ours, theirs in ((state.params, joint_run[1].params), (state.others, joint_run[1].others)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)
    assert state.memory["rows"] == STEPS * BATCH


def test_other_networks_clip_their_own_gradients(joint_run, tmp_path):
    state = fit(tmp_path, method=joint(clip=0.01), steps=1).state
    moved = jax.tree.map(lambda leaf: leaf - 1, state.others["rival"])
    assert optax.tree.norm(moved) == pytest.approx(0.01 * 0.01, rel=1e-2)
    assert optax.tree.norm(state.params) > 0.01


# ------------------------------------------------------------------------------------------------ TensorBoard


def test_tensorboard_shows_what_metrics_jsonl_holds(uninterrupted, tmp_path):
    fit(tmp_path, loggers=("tensorboard",))
    events = EventAccumulator(str(tmp_path)).Reload()
    logged = lines(tmp_path)
    for name in ("loss", "error", "gradient_norm"):
        shown = [(event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors(name)]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in logged]


# --------------------------------------------------------------------------------- the real thing, really killed


def training_folder(workdir, stage):
    return workdir / "teacher" if stage == "teacher" else workdir / "distill" / "ard"


def kill_at_random(stage, workdir, delay):
    """Starts a stage, waits until it trains, kills it after `delay` seconds; the status it ended with."""
    running = process(stage, workdir)
    metrics = training_folder(workdir, stage) / "metrics.jsonl"
    before = metrics.read_text() if metrics.exists() else ""
    while running.poll() is None and not (metrics.exists() and metrics.read_text() not in ("", before)):
        time.sleep(0.005)
    time.sleep(delay)
    running.kill()
    return finish(running).status


def resumed_like_the_pipeline(stage, workdir, pipeline):
    resumed = smoke(stage, workdir)
    assert resumed.status == 0, resumed.err
    assert done(workdir / stage)["sha256"] == done(pipeline / stage)["sha256"]
    steps = [line["step"] for line in lines(training_folder(workdir, stage))]
    assert steps == [5, 10, 15, 20]


@pytest.mark.parametrize("stage", ["teacher", "distill"])
def test_a_stage_that_was_killed_ends_like_one_that_was_not(pipeline, tmp_path, stage):
    workdir = copy(pipeline, tmp_path, *([] if stage == "teacher" else ["teacher", "trajectories"]))
    delay = random.SystemRandom().uniform(0, 0.3)
    status = kill_at_random(stage, workdir, delay)
    assert status in (0, -signal.SIGKILL), (delay, status)
    resumed_like_the_pipeline(stage, workdir, pipeline)


def test_a_stage_that_is_asked_to_stop_ends_well_and_goes_on(pipeline, tmp_path, monkeypatch):
    """The command line's part: status 0, and words that say how to go on."""
    put = loop.put_batch

    def put_batch(batch, mesh):
        if batch["position"][0] == 7 * 16:
            terminate()
        return put(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put_batch)
    outcome = smoke("teacher", tmp_path)
    assert outcome.status == 0, outcome.err
    assert outcome.out == "teacher: stopped at step 8 of 20; its state is saved: resume by running the same command.\n"
    assert not (tmp_path / "teacher" / "done.json").exists()
    monkeypatch.setattr(loop, "put_batch", put)
    resumed = smoke("teacher", tmp_path)
    assert resumed.status == 0 and "resuming at step 8 of 20." in resumed.err
    assert done(tmp_path / "teacher")["sha256"] == done(pipeline / "teacher")["sha256"]
    assert [line["step"] for line in lines(tmp_path / "teacher")] == [5, 8, 10, 15, 20]


def test_a_disk_that_is_full_at_a_checkpoint_leaves_the_one_before(pipeline, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    put, ballast = loop.put_batch, disk / "ballast"

    def put_batch(batch, mesh):
        if batch["position"][0] == 7 * 16:
            until = time.monotonic() + 60  # it is saved beside the training
            while saved_steps(disk / "run" / "teacher") != [5] and time.monotonic() < until:
                time.sleep(0.01)
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 20_000))
        return put(batch, mesh)

    try:
        monkeypatch.setattr(loop, "put_batch", put_batch)
        outcome = smoke("teacher", disk / "run")
        assert outcome.status == 2 and "Traceback" not in outcome.err
        said = outcome.err.strip().splitlines()[-1]
        assert said.startswith("ard_jax teacher: the disk of ") and "free some space" in said
        assert not (disk / "run" / "teacher" / "done.json").exists()
        ballast.unlink()
        monkeypatch.setattr(loop, "put_batch", put)
        resumed = smoke("teacher", disk / "run")
        assert resumed.status == 0 and "resuming at step 5 of 20." in resumed.err
        assert done(disk / "run" / "teacher")["sha256"] == done(pipeline / "teacher")["sha256"]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_stage_with_a_truncated_checkpoint_goes_back_to_the_one_before(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher")
    truncate(largest_file(workdir / "teacher" / "checkpoints" / "20" / "params"))
    outcome = smoke("teacher", workdir)
    assert outcome.status == 0, outcome.err
    assert "checkpoint 20 cannot be read" in outcome.err and "resuming at step 15 of 20." in outcome.err
    assert "Traceback" not in outcome.err
    assert done(workdir / "teacher")["sha256"] == done(pipeline / "teacher")["sha256"]


@pytest.mark.slow
def test_training_on_four_devices_is_that_on_one(pipeline, tmp_path):
    """The batch is split over the devices: the losses agree to rounding, and every later stage runs on them too."""
    workdir = tmp_path / "run"
    four = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    for stage in STAGES:
        outcome = finish(process(stage, workdir, XLA_FLAGS=four))
        assert outcome.status == 0, outcome.err
    for folder in ("teacher", "distill/ard"):
        there, here = (lines(root / folder) for root in (pipeline, workdir))
        assert [line["step"] for line in here] == [line["step"] for line in there]
        np.testing.assert_allclose([m["loss"] for m in here], [m["loss"] for m in there], rtol=1e-4)
