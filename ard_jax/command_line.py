"""What every stage's command line has in common: flags, the config, and errors in one sentence."""

import difflib
import errno
import logging
import os
import pathlib
import sys
import types

import absl.logging
import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from ard_jax.config import validate
from ard_jax.errors import UserError
from ard_jax.training.loop import Preempted


def run_stage(module: types.ModuleType, stage: str, arguments: list[str]) -> int:
    """Parses the flags and runs the stage.

    Returns:
        The exit status: 0 done or saved before a preemption, 2 a user's mistake.
    """
    if {"-h", "--help"} & set(arguments):
        print(f"python -m ard_jax {stage} --config FILE[:key=value,…] --workdir DIR [--config.key=value …]\n")
        print(module.__doc__.strip())
        return 0
    set_up_logging()
    try:
        config, workdir = parse(arguments)
        validate(config)
        set_up_jax(workdir)
        module.run(config, workdir)
    except UserError as error:
        return fail(stage, str(error))
    except Preempted as stop:
        print(f"{stage}: {stop}; its state is saved: resume by running the same command.", flush=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return fail(stage, f"the disk of {error.filename or workdir} is full: free some space and run the same again.")
    return 0


def fail(stage: str, sentence: str) -> int:
    print(f"ard_jax {stage}: {sentence}", file=sys.stderr, flush=True)
    return 2


def set_up_logging() -> None:
    """Our own log lines and everybody's warnings; Orbax alone would write forty lines a checkpoint."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, force=True)
    logging.getLogger("ard_jax").setLevel(logging.INFO)
    absl.logging.set_verbosity(absl.logging.WARNING)


def set_up_jax(workdir: pathlib.Path) -> None:
    """Keeps compiled programs under the workdir, unless JAX_COMPILATION_CACHE_DIR says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compile_cache"))


def parse(arguments: list[str]) -> tuple[ml_collections.ConfigDict, pathlib.Path]:
    """Flags → (resolved config, workdir).

    Raises:
        UserError: an unknown flag or key, a value of the wrong type, a config file that is not there.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    given = {argument.lstrip("-").split("=")[0].split(".")[0] for argument in arguments if argument.startswith("-")}
    for name in ("config", "workdir"):
        if name not in given:
            raise UserError(f"--{name} is missing: give --config FILE and --workdir DIR.")
    check_config_file(arguments)
    try:
        rest = values(["ard_jax", *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"there is no flag --{error.flagname}: {suggestion(error.flagname, values)}.") from None
    except (flags.Error, TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"the command line cannot be used: {one_line(error)}.") from None
    if rest:
        raise UserError(f"{rest[0]!r} is not understood: settings are given as --config.key=value.")
    return values.config, pathlib.Path(values.workdir)


def check_config_file(arguments: list[str]) -> None:
    """Raises UserError if the file named by --config is not there; ml_collections would say so much later."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.lstrip("-").startswith("config=") or argument.lstrip("-") == "config":
            name = (argument.partition("=")[2] or following).split(":")[0]
            if not pathlib.Path(name).is_file():
                raise UserError(f"the config file {name!r} is not there: name one, such as configs/digits.py.")


def suggestion(name: str, values: flags.FlagValues) -> str:
    """The closest keys of the config, for a misspelt one."""
    known = list(values)
    if name.startswith("config.") and values["config"].value is not None:
        known = [f"config.{key}" for key in dotted(values["config"].value)]
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean --{' or --'.join(close)}" if close else "configs/ and ard_jax/config.py list the settings"


def dotted(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items():
        keys += dotted(value, f"{prefix}{key}.") if isinstance(value, ml_collections.ConfigDict) else [prefix + key]
    return keys


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
