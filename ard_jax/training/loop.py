"""The one loop that every objective runs in."""

import concurrent.futures
import contextlib
import logging
import math
import os
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
from clu import parameter_overview
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ard_jax.chips import peak_flops
from ard_jax.errors import Preempted, UserError
from ard_jax.hosts import gather_json
from ard_jax.objectives import Method, Metrics
from ard_jax.parallel import is_first, put_batch, whole_matrices
from ard_jax.training import checkpoints
from ard_jax.training.loggers import check_loggers
from ard_jax.training.metrics import MetricLog
from ard_jax.training.pictures import Pictures
from ard_jax.training.reading import Reading
from ard_jax.training.state import TrainState, init_state, make_step, optimizer_of, release, state_shapes
from ard_jax.types import Batches, Params, PyTree

log = logging.getLogger("ard_jax")


class NotFinite(UserError):
    """A metric became NaN or infinite."""


class Trained(NamedTuple):
    """What a training hands back: its last state, and the seconds that it took over all its starts."""

    state: TrainState
    seconds: float


def train(
    method: Method,
    params: Params,
    batches: Batches,
    *,
    settings: ml_collections.ConfigDict,
    run: ml_collections.ConfigDict,
    seed: int,
    directory: pathlib.Path,
    mesh: Mesh,
    frozen: PyTree = None,
    pictures: Pictures | None = None,
) -> Trained:
    """Trains until `settings.steps`, from the newest checkpoint if there is one.

    Args:
        method: what is trained, see `ard_jax.objectives`.
        params: where a fresh run starts; their memory is freed once it has, but for what `frozen` holds too.
        batches: an iterator of this process's rows of each batch, with Grain's `get_state` and `set_state`.
        settings: a stage's section of the config: steps, batch_size, accumulate, checkpoint_every, optimizer.
        run: the `run` section.
        seed: of the run.
        directory: of the run: checkpoints/, metrics.jsonl, progress/ and TensorBoard's files go there.
        mesh: of devices.
        frozen: parameters that the objective reads and that are not trained.
        pictures: what is drawn of the average while it learns, if anything.

    Raises:
        UserError: a logger of `run.loggers` cannot be had; or a record cannot be read, on whichever host, and the state
            has been saved.
        NotFinite: a metric is; the last good checkpoint stays.
        Preempted: SIGTERM, SIGHUP or Ctrl-C came; the state has been saved.
    """
    check_loggers(run.loggers)
    started = time.monotonic()
    optimizer = optimizer_of(method, settings)
    start = params, optimizer, seed, mesh, method.begin, frozen
    shapes = state_shapes(*start)
    if (whole := whole_matrices(shapes.params, mesh)) and is_first():
        log.info("%.1f MB of parameters lie whole on every device: %s.", sum(whole.values()) / 1e6, ", ".join(whole))
    step_function = make_step(
        method.objective, optimizer, settings.optimizer.ema, mesh, shapes, frozen, settings.accumulate
    )
    with (
        checkpoints.make_manager(directory / "checkpoints", run.keep_checkpoints, run.keep_every) as manager,
        concurrent.futures.ThreadPoolExecutor(1) as sealer,
    ):
        seconds = 0.0
        if restored := checkpoints.restore(manager, shapes):
            state, position = restored
            batches.set_state(position["data"])
            seconds = position["seconds"]
            log.info("resuming at step %d of %d.", int(state.step), settings.steps)
        else:
            state = init_state(*start)  # only now: beside one that is read there may be no room
            if is_first():
                # the statistics of a parameter are for a process that has all of it
                statistics = jax.process_count() == 1
                overview = parameter_overview.get_parameter_overview(state.params, include_stats=statistics)
                log.info("parameters:\n%s", overview)
        release(params, frozen)

        reading = Reading(batches)

        def save(state: TrainState) -> None:
            spent = seconds + time.monotonic() - started
            checkpoints.save(manager, state, {"data": reading.position, "seconds": spent})
            if is_first():  # beside the training, those that are whole; this one still goes to the disk
                sealer.submit(checkpoints.seal, directory / "checkpoints", int(state.step) - 1)

        def seal_saved(step: int) -> bool:
            """Whether the checkpoint of a step is on the disk now, for whoever waits for it."""
            if manager.is_saving_in_progress():
                return False
            if is_first():
                sealer.submit(checkpoints.seal, directory / "checkpoints", step)
            return True

        def finish() -> None:
            manager.wait_until_finished()
            if is_first():
                sealer.submit(checkpoints.seal, directory / "checkpoints").result()

        def save_last(state: TrainState) -> None:
            """Of a run that cannot go on: its last step, unless that is there already."""
            if not int(state.step):
                return
            if manager.latest_step() != int(state.step):
                save(state)
            finish()
            log.warning("stopped at step %d, which is saved.", int(state.step))

        metric_log = MetricLog(directory, int(state.step), settings.steps, run.loggers) if is_first() else None
        meter = Meter(settings.batch_size, method.flops, metric_log)

        def show(state: TrainState, step: int) -> None:
            if pictures and pictures.due(step, step == settings.steps):
                picture = pictures.draw(state.ema)
                if metric_log:
                    metric_log.show(step, picture)

        try:
            with Preemption(int(state.step)) as preemption:
                unsealed = 0
                if not int(state.step):
                    show(state, 0)
                for step in range(int(state.step) + 1, settings.steps + 1):
                    try:
                        with meter.waiting():
                            batch = next(reading)
                    except UserError:  # a record that cannot be read
                        meter.report()
                        save_last(state)
                        raise
                    state, metrics = step_function(state, frozen, put_batch(batch, mesh))
                    reading.note(metrics)
                    meter.add(step, metrics)
                    last = step == settings.steps
                    asked = preemption.asked(step)  # once a step: it may change at any time
                    saving = last or asked or step % settings.checkpoint_every == 0
                    if saving or step % run.log_every == 0:
                        if not reading.is_whole() and (error := reading.met()):
                            save_last(state)
                            raise error
                        meter.report()  # raises before anything that is not finite is saved
                    show(state, step)  # before the checkpoint, so that one that goes on from there has all of them
                    if saving:
                        save(state)
                        unsealed = step
                    elif unsealed and seal_saved(unsealed):
                        unsealed = 0
                    if asked and not last:
                        finish()
                        by_hand = preemption.noted == signal.SIGINT
                        raise Preempted(f"stopped at step {step} of {settings.steps}", by_hand)
            finish()
        finally:
            if metric_log:
                metric_log.close()
    return Trained(state, seconds + time.monotonic() - started)


class Meter:
    """Collects metrics on the device and fetches them only when they are reported."""

    def __init__(self, batch_size: int, flops_per_example: float, metric_log: MetricLog | None):
        self.batch_size, self.flops_per_example, self.metric_log = batch_size, flops_per_example, metric_log
        self.peak = peak_flops()
        self.pending: list[tuple[int, Metrics]] = []
        self.since: float | None = None  # the clock starts after the first step, which compiles
        self.timed, self.waited = 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what the loop does for its next batch."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def add(self, step: int, metrics: Metrics) -> None:
        self.pending.append((step, metrics))
        if self.since is None:
            jax.block_until_ready(metrics)
            self.since, self.waited = time.monotonic(), 0.0
        else:
            self.timed += 1

    def report(self) -> None:
        """Means of the metrics since the last report; raises NotFinite with the step and the name of a bad one."""
        if not self.pending:
            return
        fetched = jax.device_get(self.pending)  # all in one go
        for step, metrics in fetched:
            for name, value in sorted(metrics.items(), key=lambda item: item[0] != "loss"):  # the loss is named first
                if not math.isfinite(value):
                    raise NotFinite(
                        f"{name} is {value} at step {step}, so the run stopped and its last good checkpoint stays: "
                        f"lower the optimizer's learning_rate, or its clip where it has one, and run the same again."
                    )
        assert self.since is not None  # `add` came before
        now = time.monotonic()
        spent = max(now - self.since, 1e-9)
        rate = self.timed / spent
        values = {name: float(sum(m[name] for _, m in fetched)) / len(fetched) for name in fetched[0][1]}
        samples = rate * self.batch_size
        values |= {
            "steps_per_s": rate,
            "samples_per_s": samples,
            "utilisation": samples * self.flops_per_example / self.peak,
            # share of the host's time; devices wait as long at most, since they may be at work on steps before
            "input_wait": self.waited / spent,
        }
        self.pending, self.since, self.timed, self.waited = [], now, 0, 0.0
        if self.metric_log:
            self.metric_log.write(fetched[-1][0], values)


class Preemption:
    """Notes SIGTERM, a lost terminal and Ctrl-C while the loop runs; a second Ctrl-C ends it at once.

    Of several hosts, all stop after the same step when one is asked to. There JAX handles SIGTERM, and the preemption
    notice of a TPU, and its coordinator chooses the step: the one after the last that any host has asked about. The
    other signals are passed on as SIGTERM.

    Args:
        step: of the state that the loop goes on from.
    """

    last = 0  # the step that this process asked about last, in a training before this one too

    def __init__(self, step: int):
        self.step, self.early = step, False
        self.noted, self.at_once, self.alone = 0, False, jax.process_count() == 1
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if not self.alone:
            self.early = self._skip_to(self.step)
        for number in (*((signal.SIGTERM,) if self.alone else ()), signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self.before[number] = signal.signal(number, self.note)
        return self

    def _skip_to(self, step: int) -> bool:
        """Whether a notice has come since the last step that was asked about; from here on the next is `step` + 1.

        JAX compares with the step that it has chosen, so one between the two would never be found again. Both are asked
        about before any host goes on: what comes in between finds a host at either end.
        """
        reached = multihost_utils.reached_preemption_sync_point(Preemption.last + 1)
        Preemption.last = step
        reached = multihost_utils.reached_preemption_sync_point(step) or reached
        return any(gather_json(reached))

    def note(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            if self.noted:
                self.at_once = True
                raise KeyboardInterrupt
            log.warning("stopping after this step, once its state is saved; Ctrl-C again ends at once.")
        self.noted = number
        if not self.alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; every host asks after every step."""
        if self.at_once:  # what a signal raises within a garbage collection Python drops
            raise KeyboardInterrupt
        if self.alone:
            return bool(self.noted)
        Preemption.last = step
        return multihost_utils.reached_preemption_sync_point(step) or self.early

    def __exit__(self, *_: object) -> None:
        for number, before in self.before.items():
            signal.signal(number, before)
