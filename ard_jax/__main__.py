"""python -m ard_jax STAGE --config FILE[:key=value,…] --workdir DIR [--config.key=value …]

Stages, in the order of a run:
    convert        turn weights that were trained elsewhere into a teacher, a student or a VAE
    captions       encode captions with a text encoder, for networks that are told them
    encode         make latents of images, for a teacher of latents
    teacher        train the diffusion teacher on images
    trajectories   solve its ODE many times and store the trajectories
    distill        train a student of few steps on them (ARD, or step distillation)
    finetune       go on with one, so that a discriminator takes its images for real ones
    sample         draw images from the teacher and the students
    evaluate       measure them
    watch          measure the checkpoints of a training as they appear, beside it (--once: those that are there)
    report         put it all on one page
    compare        train, measure and show many methods side by side, all stages in one command (--quick)
    export         write a model in a form that others can use
    demo           show models in a page, side by side, to play with (no --config)
    doctor         say what this machine is, what would go wrong on it, and what to run next (no flags)
    plan           say what all of it will cost on a TPU slice, which it does not need (--topology, no --workdir)
Several in one process, which starts and imports once:
    python -m ard_jax run STAGE[,STAGE…] ARGUMENTS [then|beside STAGE[,STAGE…] ARGUMENTS] …
What stands beside each other does not need each other: on a CPU it runs at the same time, on processors of its own.
Tab completion of stages, flags and settings: `eval "$(ard-jax completion bash)"`, or zsh.
`python -m ard_jax STAGE --help` explains a stage; configs/ has the configs.
"""

import io
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

STAGES = (
    "convert", "captions", "encode", "teacher", "trajectories", "distill", "finetune", "sample", "evaluate", "watch",
    "report", "compare", "export", "demo", "doctor", "plan",
)  # fmt: skip
ALONE = ("convert", "watch", "compare", "export", "demo", "doctor", "plan")  # which `run` does not run
IN_TURN = tuple(stage for stage in STAGES if stage not in ALONE)


def main(arguments: list[str]) -> int:
    """Runs a stage; returns the exit status: see `command_line.run_stage`."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    stage, *rest = arguments
    if stage == "run":
        return run_in_turn(rest)
    if stage == "completion":
        return print_completion(*rest[:1])
    if stage not in STAGES:
        print(f"ard_jax: there is no stage {stage!r}: choose one of {', '.join(STAGES)}.", file=sys.stderr)
        return 2
    from ard_jax.command_line import run_stage

    return run_stage(stage, rest)


def run_in_turn(arguments: list[str]) -> int:
    """Runs stages one after another in this process, each as its own command would; on a CPU some beside each other.

    Args:
        arguments: STAGE,… and what follows a stage on its command line; after the word "then", the same again; after
            the word "beside" too, which need not wait for what is before it.

    Returns:
        The exit status of the first that does not end with 0, or that is preempted; there is no other after it.
    """
    parts = [_split(part, "beside") for part in _split(arguments, "then")]
    groups = [[[[stage, *words[1:]] for stage in "".join(words[:1]).split(",")] for words in part] for part in parts]
    every = [command for group in groups for commands in group for command in commands]
    for stage, *_ in every:
        if stage not in IN_TURN:
            print(f"ard_jax run: there is no {stage!r} to run: choose some of {','.join(IN_TURN)}.", file=sys.stderr)
            return 2
    import jax

    from ard_jax import beside, command_line

    number = 0
    for group in groups:
        if len(group) > 1 and beside.is_possible(arguments):
            labelled: list[tuple[str, list[str]]] = []
            for commands in group:
                of, first = ",".join(stage for stage, *_ in commands), number + 1
                print(f"== {of} ({first} of {len(every)}){', beside others' if labelled else ''}", flush=True)
                labelled.append((f"{first}: ", commands[0] if len(commands) == 1 else ["run", of, *commands[0][1:]]))
                number += len(commands)
            status, stopped = beside.run_beside(labelled)
            if stopped:
                command_line.stopped.set()
            if status or stopped:
                return status
            continue
        for stage, *given in (command for commands in group for command in commands):
            number += 1
            print(f"== {stage} ({number} of {len(every)})", flush=True)
            status = command_line.run_stage(stage, given)
            if status or command_line.stopped.is_set():
                return status
            jax.clear_caches()  # the next one has programs of its own, and wants the memory
    return 0


def _split(words: list[str], word: str) -> list[list[str]]:
    """The lists between the occurrences of a word."""
    parts: list[list[str]] = [[]]
    for each in words:
        if each == word:
            parts.append([])
        else:
            parts[-1].append(each)
    return parts


def print_completion(shell: str = "") -> int:
    """Prints the script that completes this command in a shell; returns the exit status."""
    from ard_jax.errors import UserError
    from ard_jax.shell import script

    try:
        print(script(shell, STAGES, ALONE), end="")
    except UserError as error:
        print(f"ard_jax completion: {error}", file=sys.stderr)
        return 2
    return 0


class Output:
    """A stream that falls silent when the pipe behind it is closed or its disk is full, so that the work goes on."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" for what it lacks

    def write(self, text: str) -> int:
        return self._try(lambda: self.stream.write(text))

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def command() -> None:
    """The command `ard-jax`, and `python -m ard_jax`: ends this process."""
    if not sys.flags.safe_path and (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # as -m does: configs and objectives import what lies beside them
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    status = main(sys.argv[1:])
    sys.stdout.flush()
    if "ard_jax.command_line" in sys.modules and sys.modules["ard_jax.command_line"].stopped.is_set():
        os._exit(status)  # what still compiles or is being imported beside us does not survive an orderly end
    sys.exit(status)


if __name__ == "__main__":
    command()
