"""What every stage's command line has in common: flags, the config, and errors in one sentence."""

import argparse
import difflib
import errno
import importlib
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

from ard_jax.config import default_config, validate
from ard_jax.errors import Preempted, UserError

# Stages about a model that exists: they find its config beside it.
WITHOUT_CONFIG = ("convert", "export")


def run_stage(stage: str, arguments: list[str]) -> int:
    """Parses the flags and runs the stage, whose module is imported only once the config is known to be good.

    Returns:
        The exit status: 0 done or saved before a preemption, 2 a user's mistake, 130 interrupted.
    """
    if {"-h", "--help"} & set(arguments):
        module = stage_module(stage)
        if stage in WITHOUT_CONFIG:
            parser = module.flags()
            parser.prog, parser.description = f"python -m ard_jax {stage}", module.__doc__.strip()
            parser.formatter_class = argparse.RawDescriptionHelpFormatter
            print(parser.format_help())
            return 0
        print(f"python -m ard_jax {stage} --config FILE[:key=value,…] --workdir DIR [--config.key=value …]\n")
        print(module.__doc__.strip())
        return 0
    set_up_logging()
    try:
        if stage in WITHOUT_CONFIG:
            given = [parse_flags(stage_module(stage).flags(), arguments)]
            workdir = given[0].workdir
        else:
            config, workdir = given = parse(arguments)
            validate(config)
    except UserError as error:
        return fail(stage, str(error))
    module = stage_module(stage)
    set_up_jax(workdir)
    try:
        module.run(*given)
    except UserError as error:
        return fail(stage, str(error))
    except Preempted as stop:
        print(f"{stage}: {stop}; its state is saved: resume by running the same command.", flush=True)
    except KeyboardInterrupt:
        print(f"\nard_jax {stage}: interrupted; running the same command goes on from what is saved.", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = storage_trouble(error, workdir)
        if not sentence:
            raise
        return fail(stage, sentence)
    return 0


def parse_flags(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Flags of a stage that takes no config.

    Args:
        parser: with the stage's flags; `workdir` must be among them, as a path.
        arguments: the command line's, after the stage.

    Raises:
        UserError: an unknown, missing or unusable flag.
    """

    def refuse(message: str):
        raise UserError(f"the command line cannot be used ({message}): --help lists the flags.")

    parser.allow_abbrev, parser.error = False, refuse
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise UserError(f"there is no flag {name}: {f'did you mean {close[0]}' if close else '--help lists them'}.")
    return parser.parse_args(arguments)


def stage_module(stage: str) -> types.ModuleType:
    return importlib.import_module(f"ard_jax.stages.{stage}")


def storage_trouble(error: Exception, workdir: pathlib.Path) -> str:
    """The sentence for a full disk or a path that cannot be used, "" for any other error.

    ArrayRecord and TensorStore raise errors of their own, with the system's words in them.
    """
    said = one_line(error)
    if any(os.strerror(code) in said for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        return f"the disk of {workdir} is full: free some space and run the same command again."
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
        return f"a file or folder cannot be used ({said}): mend that, or choose another --workdir."
    return ""


def fail(stage: str, sentence: str) -> int:
    print(f"ard_jax {stage}: {sentence}", file=sys.stderr, flush=True)
    return 2


def set_up_logging() -> None:
    """Our own log lines and everybody's warnings, but for those around checkpoints.

    Orbax writes forty lines a checkpoint, and a failed one at length before it raises it; asyncio repeats that.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, force=True)
    logging.getLogger("ard_jax").setLevel(logging.INFO)
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def set_up_jax(workdir: pathlib.Path) -> None:
    """Keeps compiled programs under the workdir, unless JAX_COMPILATION_CACHE_DIR says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compile_cache"))


def parse(arguments: list[str]) -> tuple[ml_collections.ConfigDict, pathlib.Path]:
    """Flags → (resolved config, workdir).

    Raises:
        UserError: an unknown flag or key, a value of the wrong type, a config file that is not there or does not work.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["ard_jax", *arguments])
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    check_flags(arguments)
    try:
        rest = values(["ard_jax", *arguments])[1:]
        config = values.config
    except UserError:
        raise
    except flags.Error as error:
        raise UserError(f"the command line cannot be used: {last_line(error)}.") from None
    except Exception as error:  # a config file is code, which may raise anything
        raise UserError(f"the config file cannot be used ({type(error).__name__}: {last_line(error)}).") from None
    if rest:
        raise UserError(f"{rest[0]!r} is not understood: settings are given as --config.key=value.")
    if not isinstance(config, ml_collections.ConfigDict) or set(known_keys()) - set(dotted(config)):
        raise UserError("the config file leaves settings out: let its get_config start from default_config().")
    return config, pathlib.Path(values.workdir)


def check_flags(arguments: list[str]) -> None:
    """Says in words what ml_collections would say late or unclearly.

    Raises:
        UserError: a flag is missing, empty or unknown, or the config file is not there.
    """
    given = {}
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument.startswith("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            given[name] = value if equals else following
    for name in ("config", "workdir"):
        if not given.get(name):
            raise UserError(f"--{name} is missing: give --config FILE and --workdir DIR.")
    file = given["config"].split(":")[0]
    if not pathlib.Path(file).is_file():
        raise UserError(f"the config file {file!r} is not there: name one, such as configs/digits.py.")
    known = ["config", "workdir", *(f"config.{key}" for key in known_keys())]
    for name in given:
        if name not in known and name.removeprefix("no") not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean --{' or --'.join(close)}" if close else "ard_jax/config.py lists the settings"
            raise UserError(f"there is no flag --{name}: {hint}.")


def known_keys() -> list[str]:
    """Every setting that there is."""
    return dotted(default_config())


def dotted(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items():
        keys += dotted(value, f"{prefix}{key}.") if isinstance(value, ml_collections.ConfigDict) else [prefix + key]
    return keys


def last_line(error: Exception) -> str:
    """ml_collections puts a traceback before what matters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
