"""python -m benchmarks.parts run STAGE,… ARGUMENTS: where the seconds of `python -m ard_jax run …` go, as a table.

ARD_MODULE=benchmarks.parts launch/quickstart.sh WORKDIR   # the quickstart

A second is counted once, in the innermost of the parts that it lies in, and on the main thread alone: what goes on
beside it, such as a checkpoint on its way to the disk, shows where it is waited for. Of stages that run beside each
other the rows have all seconds of each, and the sums the mean over as many processes as run at once. Linux only.
"""

import contextlib
import functools
import importlib
import json
import os
import pathlib
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

import ard_jax.__main__
from ard_jax import beside, command_line
from ard_jax.chips import processors
from ard_jax.training.loop import Meter
from benchmarks.measure import table

# What JAX tells of itself, when it is over, with its seconds: event → part.
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}

# Functions whose time is a part: (module or class, name) → part.
FUNCTIONS = {
    ("builtins", "__import__"): "import",
    ("importlib", "import_module"): "import",
    ("ard_jax.training.fit", "train"): "steps",
    ("ard_jax.training.checkpoints", "make_manager"): "checkpoints",
    ("ard_jax.training.checkpoints", "restore"): "checkpoints",
    ("ard_jax.training.checkpoints", "save"): "checkpoints",
    ("ard_jax.workdir", "load_parameters"): "checkpoints",
    ("orbax.checkpoint.CheckpointManager", "wait_until_finished"): "checkpoints",
    ("orbax.checkpoint.CheckpointManager", "close"): "checkpoints",
    ("ard_jax.stages.trajectories", "make_store"): "sampling",
    ("ard_jax.stages.sample", "_draw"): "sampling",
    ("ard_jax.stages.evaluate", "Paired"): "paired",
    ("ard_jax.stages.evaluate", "_beside_teacher"): "paired",
    ("ard_jax.stages.evaluate", "open_yardstick"): "classifier",
    ("ard_jax.measuring.classifier.Classifier", "measure"): "distances",
}
LEAST = 2e-4  # seconds; most imports find what is there already
FOLDER = "ARD_PARTS"  # of the environment: where stages beside each other leave what they found
START = ("import", "trace", "lower", "compile")
PARTS = (*START, "steps", "input wait", "checkpoints", "sampling", "classifier", "distances", "paired", "rest")


class Span(NamedTuple):
    """Seconds of the clock that a part took; of a stage, its name stands for the part."""

    start: float
    end: float
    part: str


def own_seconds(spans: Sequence[Span]) -> list[tuple[Span, float]]:
    """Of each span, its seconds without those of spans within it, in the order of their starts."""
    spans = sorted(spans, key=lambda span: (span.start, -span.end))
    own = [span.end - span.start for span in spans]
    around: list[int] = []
    for number, span in enumerate(spans):
        while around and spans[around[-1]].end <= span.start:
            around.pop()
        if around:
            own[around[-1]] -= min(span.end, spans[around[-1]].end) - span.start
        around.append(number)
    return list(zip(spans, own, strict=True))


def by_stage(stages: Sequence[Span], spans: Sequence[Span]) -> dict[str, dict[str, float]]:
    """Stage → part → seconds; what lies in none of the stages is not counted."""
    found: dict[str, dict[str, float]] = {stage.part: defaultdict(float) for stage in stages}
    for span, seconds in own_seconds([*(stage._replace(part="rest") for stage in stages), *spans]):
        for stage in stages:
            if stage.start <= span.start < stage.end:
                found[stage.part][span.part] += seconds
    return found


class Recorder:
    """Notes the spans of the main thread."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.stages: list[Span] = []

    def note(self, part: str, start: float) -> None:
        end = time.monotonic()
        if end - start > LEAST and threading.current_thread() is threading.main_thread():
            self.spans.append(Span(start, end, part))

    @contextlib.contextmanager
    def noting(self, part: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.note(part, start)

    def wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def wrapped(*args: Any, **named: Any) -> Any:
            with self.noting(part):
                return function(*args, **named)

        return wrapped

    def install(self) -> None:
        """Puts itself around `FUNCTIONS`, the wait for a batch, the stages and JAX's events."""

        def listen(event: str, seconds: float, **_: Any) -> None:
            if event in EVENTS:
                self.note(EVENTS[event], time.monotonic() - seconds)

        jax.monitoring.register_event_duration_secs_listener(listen)
        for (place, name), part in FUNCTIONS.items():
            owner = find(place)
            setattr(owner, name, self.wrap(getattr(owner, name), part))
        waiting, run_stage = Meter.waiting, command_line.run_stage

        @contextlib.contextmanager
        def noted(meter: Meter) -> Iterator[None]:
            with self.noting("input wait"), waiting(meter):
                yield

        def run_noted(stage: str, arguments: list[str]) -> int:
            start, student = time.monotonic(), f" {arguments}".partition("student=")[2].partition("'")[0]
            status = run_stage(stage, arguments)
            name = f"{stage} {student}" if stage == "distill" else stage
            self.stages.append(Span(start, time.monotonic(), name))
            return status

        Meter.waiting, command_line.run_stage = noted, run_noted  # type: ignore[method-assign]


def find(place: str) -> Any:
    """A module, or a class in one, by its dotted name."""
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError:
        module, _, name = place.rpartition(".")
        return getattr(importlib.import_module(module), name)


def since_start() -> float:
    """Seconds that this process has been there."""
    ticks = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


def report(found: dict[str, dict[str, float]], others: dict[str, dict[str, float]] | None = None) -> str:
    """The table, with sums, and the share of what is no work; `others` are stages that ran beside each other."""
    others = others or {}
    at_once, every = min(len(processors()), len(others)), found | others
    shown = [part for part in PARTS if any(parts.get(part, 0) >= 0.05 for parts in every.values())]
    weighted = [(parts, 1) for parts in found.values()] + [(parts, at_once) for parts in others.values()]
    total = {part: sum(parts.get(part, 0.0) / share for parts, share in weighted) for part in PARTS}
    rows = [
        [stage, *(f"{parts.get(part, 0.0):.1f}" for part in shown), f"{sum(parts.values()):.1f}"]
        for stage, parts in {**every, "all": total}.items()
    ]
    share = sum(total[part] for part in START) / sum(total.values())
    return table(["seconds", *shown, "sum"], rows) + f"\n\nPython, import, trace, lowering, compiling: {share:.1%}"


def main(arguments: list[str]) -> int:
    recorder = Recorder()
    recorder.install()
    before = since_start()
    if FOLDER in os.environ:  # one of several, which the first reports
        status = ard_jax.__main__.main(arguments)
        ((stage, parts),) = by_stage(recorder.stages, recorder.spans).items()
        parts["import"] += before
        pathlib.Path(os.environ[FOLDER], f"{stage}.json").write_text(json.dumps(parts))
        return status
    beside.MODULE = "benchmarks.parts"
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        status = ard_jax.__main__.main(arguments)
        of_others = {path.stem: json.loads(path.read_text()) for path in sorted(pathlib.Path(folder).iterdir())}
    own = {"start of Python": {"import": before}, **by_stage(recorder.stages, recorder.spans)}
    print(report(own, of_others), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
