"""What a run shows while it goes: a progress bar or log lines, metrics.jsonl, TensorBoard."""

import json
import logging
import pathlib
import sys
from typing import Any

import tqdm

from ard_jax.files import atomic_write

log = logging.getLogger("ard_jax")


class MetricLog:
    """Writes metrics to `metrics.jsonl`, to TensorBoard and, in short, to the screen.

    Lines after `step`, left by a run that was killed beyond its last checkpoint, are cut off first.
    """

    def __init__(self, directory: pathlib.Path, step: int, total: int, tensorboard: bool):
        self.path = directory / "metrics.jsonl"
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        atomic_write(self.path, lambda temporary: temporary.write_text("".join(kept)))
        self.file = self.path.open("a", buffering=1)
        self.writer = make_writer(directory) if tensorboard else None
        self.total = total
        self.bar = progress_bar(total, "step", initial=step)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer:
            self.writer.write_scalars(step, values)
        short = {key: f"{values[key]:.4g}" for key in ("loss", "steps_per_s", "samples_per_s", "utilisation")}
        if self.bar.disable:
            left = (self.total - step) / max(values["steps_per_s"], 1e-9)
            said = "  ".join(f"{key} {value}" for key, value in short.items())
            log.info("step %d/%d  %s  %.0f s left", step, self.total, said, left)
        else:
            self.bar.set_postfix(short)
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.writer:
            self.writer.close()


def make_writer(directory: pathlib.Path) -> Any:
    """TensorBoard through clu; it needs TensorFlow, which is why it is imported here and nowhere else."""
    try:
        from clu import metric_writers
    except ImportError as error:
        log.warning("no TensorBoard logs, since %s cannot be imported: install tensorflow-cpu.", error.name)
        return None
    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(directory)))


def progress_bar(total: int, unit: str, initial: int = 0) -> tqdm.tqdm:
    """A bar with rate and remaining time on a terminal, a disabled one elsewhere (log lines serve there)."""
    return tqdm.tqdm(total=total, unit=unit, initial=initial, disable=not sys.stderr.isatty(), dynamic_ncols=True)
