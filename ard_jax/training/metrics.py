"""What a run shows while it goes: a progress bar or log lines, metrics.jsonl, pictures, what `run.loggers` names."""

import json
import logging
import pathlib
from collections.abc import Collection

import numpy as np

from ard_jax.files import read_json_lines, write_text
from ard_jax.progress import progress_bar
from ard_jax.training.loggers import open_loggers
from ard_jax.training.pictures import pictures_in, write_picture

log = logging.getLogger("ard_jax")


class MetricLog:
    """Writes metrics to `metrics.jsonl`, to the loggers and, in short, to the screen; pictures to files and loggers.

    Lines and pictures after `step`, left by a run that was killed beyond its last checkpoint, and damaged lines are
    cut out first.
    """

    def __init__(self, directory: pathlib.Path, step: int, total: int, loggers: Collection[str]):
        self.directory, self.path = directory, directory / "metrics.jsonl"
        lines = [line for line in read_json_lines(self.path) if isinstance(line.get("step"), int)]
        kept = [line for line in lines if line["step"] <= step]
        pictures = pictures_in(directory)
        given = max([*(line["step"] for line in lines), *pictures], default=-1)
        self.loggers = open_loggers(loggers, directory, after=given)
        for beyond in (path for drawn_at, path in pictures.items() if drawn_at > step):
            beyond.unlink()
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a", buffering=1, encoding="utf-8")
        self.total = total
        self.bar = progress_bar(total, "step", initial=step)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for logger in self.loggers:
            logger.write(step, values)
        short = {key: f"{values[key]:.4g}" for key in ("loss", "steps_per_s", "samples_per_s", "utilisation")}
        if self.bar.disable:
            rate = values["steps_per_s"]
            left = f"{(self.total - step) / rate:.0f} s left" if rate else "compiled"
            said = "  ".join(f"{key} {value}" for key, value in short.items())
            log.info("step %d/%d  %s  %s", step, self.total, said, left)
        else:
            self.bar.set_postfix(short)
            self.bar.update(step - self.bar.n)

    def show(self, step: int, picture: np.ndarray) -> None:
        """Keeps and hands on a picture, uint8 (height, width, 3)."""
        write_picture(self.directory, step, picture)
        for logger in self.loggers:
            logger.show(step, picture)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        for logger in self.loggers:
            logger.close()
