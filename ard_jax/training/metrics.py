"""What a run shows while it goes: a progress bar or log lines, metrics.jsonl, TensorBoard."""

import concurrent.futures
import importlib.util
import json
import logging
import os
import pathlib
from typing import TYPE_CHECKING

from ard_jax.errors import UserError
from ard_jax.files import read_json_lines, write_text
from ard_jax.progress import progress_bar

if TYPE_CHECKING:
    from clu import metric_writers

log = logging.getLogger("ard_jax")


class MetricLog:
    """Writes metrics to `metrics.jsonl`, to TensorBoard and, in short, to the screen.

    Lines after `step`, left by a run that was killed beyond its last checkpoint, and damaged ones are cut out first.
    """

    def __init__(self, directory: pathlib.Path, step: int, total: int, tensorboard: bool):
        check_tensorboard(tensorboard)
        self.path = directory / "metrics.jsonl"
        lines = read_json_lines(self.path)
        kept = [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a", buffering=1, encoding="utf-8")
        self.writer = TensorBoard(directory) if tensorboard else None
        self.total = total
        self.bar = progress_bar(total, "step", initial=step)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer:
            self.writer.write(step, values)
        short = {key: f"{values[key]:.4g}" for key in ("loss", "steps_per_s", "samples_per_s", "utilisation")}
        if self.bar.disable:
            rate = values["steps_per_s"]
            left = f"{(self.total - step) / rate:.0f} s left" if rate else "compiled"
            said = "  ".join(f"{key} {value}" for key, value in short.items())
            log.info("step %d/%d  %s  %s", step, self.total, said, left)
        else:
            self.bar.set_postfix(short)
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.writer:
            self.writer.close()


def check_tensorboard(asked: bool) -> None:
    """Raises UserError if TensorBoard's files are asked for and cannot be written."""
    if asked and importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            "run.tensorboard needs TensorFlow, which is not installed: install tensorflow-cpu, or set "
            "run.tensorboard=False and read metrics.jsonl."
        )


class TensorBoard:
    """TensorBoard through clu's metric writer, in a thread of its own.

    The writer needs TensorFlow, whose import takes seconds: here it runs while XLA compiles the training step.
    """

    def __init__(self, directory: pathlib.Path):
        self.thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self.writer = self.thread.submit(_make_writer, directory)
        self.last = self.writer

    def write(self, step: int, values: dict[str, float]) -> None:
        self.last = self.thread.submit(lambda: self.writer.result().write_scalars(step, values))

    def close(self) -> None:
        """Waits for what is still to be written; raises what writing it raised."""
        self.last.result()
        self.thread.submit(lambda: self.writer.result().close()).result()
        self.thread.shutdown()


def _make_writer(directory: pathlib.Path) -> "metric_writers.MetricWriter":
    """clu's writer of TensorBoard files; this is the only place that imports TensorFlow."""
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # nothing is computed with it, and it would say so at length
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(directory))
