"""What every stage's command line has in common: flags, the config, and errors in one sentence."""

import argparse
import contextlib
import difflib
import errno
import importlib
import logging
import os
import pathlib
import re
import signal
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import absl.logging
import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from ard_jax import hosts, keys
from ard_jax.checks import validate
from ard_jax.config import ROWS, WORDLLAMA, default_config, flatten, plain
from ard_jax.errors import Preempted, UserError, first_line
from ard_jax.files import local_path
from ard_jax.parallel import is_first, set_up_libtpu
from ard_jax.workdir import leave_all

# Stages about models that exist, which find their configs beside them, about files of anybody, and about this machine.
WITHOUT_CONFIG = ("convert", "export", "evaluate_files", "demo", "doctor")

# Settings of JAX that change what a seed draws, and types: the same whatever the environment says.
FIXED = {
    "jax_default_prng_impl": keys.GENERATOR,
    "jax_threefry_partitionable": True,
    "jax_enable_x64": False,
}

# Stages that save and stop at a step of their own when they are asked to (`training.loop.Preemption`).
TRAINING = ("teacher", "distill", "finetune")

stopped = threading.Event()  # a stage has saved because it was asked to stop

# Flags by their words, each with what argparse's add_argument takes.
Flags = Mapping[str, Mapping[str, Any]]

# Flags beside --config. Those of stages without a config stand in the stage; these are read before it is imported.
WORKDIR: Flags = {"--workdir": dict(required=True, metavar="DIR", type=pathlib.Path)}
FLAGS: Mapping[str, Flags] = {  # where they are others
    "plan": {
        "--topology": dict(required=True, metavar="NAME"),
        "--json": dict(metavar="FILE", type=pathlib.Path),
        "--finetune": dict(action="store_true"),
        "--search": dict(action="store_true"),
    },
    "teacher": {**WORKDIR, "--check": dict(action="store_true")},
    "encode": {**WORKDIR, "--check": dict(action="store_true")},
    "make_reference": {**WORKDIR, "--make-reference": dict(required=True, metavar="OUT.npz", type=pathlib.Path)},
    "compare": {**WORKDIR, "--quick": dict(action="store_true")},
    "watch": {**WORKDIR, "--once": dict(action="store_true")},
}


def run_stage(stage: str, arguments: list[str]) -> int:
    """Parses the flags and runs the stage, whose module is imported only once the config is known to be good.

    Returns:
        The exit status: 0 done or saved before a preemption, 2 a user's mistake, 130 interrupted, 143 preempted with
        nothing to save.
    """
    words, stage = stage, _variant(stage, arguments)
    if {"-h", "--help"} & set(arguments):
        try:
            module = _stage_module(stage)
        except UserError as error:
            return _report_error(words, str(error))
        about = (module.__doc__ or "").strip()
        if stage in WITHOUT_CONFIG:
            prog = f"python -m ard_jax {words}"
            print(make_parser(module.FLAGS, prog=prog, description=about).format_help())
            return 0
        print(f"python -m ard_jax {words} --config FILE[:key=value,…] {usage(_flags_of(stage))} [--config.key=value …]")
        if _has_workdir(stage):
            print(f"    on each of several hosts: [{usage(hosts.FLAGS, brackets=False)}]")
        print()
        print(about)
        return 0
    set_up_logging()
    set_up_libtpu()
    if stage not in WITHOUT_CONFIG and not _has_workdir(stage):
        jax.config.update("jax_platforms", "cpu")  # it runs nothing, so it takes no accelerator from others
    for name, value in FIXED.items():
        jax.config.update(name, value)
    try:
        given: Sequence[Any]
        if stage in WITHOUT_CONFIG:
            args = parse_flags(_stage_module(stage).FLAGS, arguments)
            given = [argparse.Namespace(**{name: _as_meant(value) for name, value in vars(args).items()})]
            workdir = getattr(given[0], "workdir", None)
        else:
            every = parse_config(arguments, {**_flags_of(stage), **hosts.FLAGS})
            given, place = every[: -len(hosts.FLAGS)], hosts.place_by_flags(*every[-len(hosts.FLAGS) :])
            given = [_as_meant(value) for value in given]
            config, where = given[:2]
            if not _has_workdir(stage):  # it runs on one host, about another
                workdir = None
                validate(config, platform="cpu" if where == "cpu" else "tpu")
            else:
                workdir = where
                hosts.start(place or hosts.place_by_environment(), workdir / ".joining", config.run.join_timeout)
                check_devices()
                validate(config)
                hosts.check_same_settings(flatten(plain(config)))
                hosts.check_same_workdir(workdir)
        module = _stage_module(stage)
    except UserError as error:
        return _report_error(words, str(error))
    _set_up_jax(workdir)
    if stage not in WITHOUT_CONFIG and not is_first():  # those run on one host, and some without a device
        logging.getLogger("ard_jax").setLevel(logging.WARNING)
    try:
        with _stop_on_sigterm(stage):
            module.run(*given)
    except UserError as error:
        return _report_error(words, str(error))
    except Preempted as reason:
        print(f"{words}: {reason}; its state is saved: resume by running the same command.", flush=True)
        if jax.process_count() > 1 and stage not in TRAINING:
            hosts.leave(0)
        stopped.set()
        return 130 if reason.by_hand else 0
    except KeyboardInterrupt:
        print(f"\nard_jax {words}: interrupted; running the same command goes on from what is saved.", file=sys.stderr)
        hosts.leave_others(130)
        return 130
    except Exception as error:
        sentence = _describe_storage_error(error, workdir)
        if not sentence:
            hosts.leave_others(1, error)
            raise
        return _report_error(words, sentence)
    finally:
        leave_all()
    return 0


def check_devices() -> None:
    """Raises UserError if JAX finds no device, as where JAX_PLATFORMS asks for one that is not there."""
    try:
        jax.devices()
    except Exception as error:  # of whatever kind the platform's own library raises
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX finds no device to work on ({first_line(error)}): "
            f"{f'JAX_PLATFORMS is {asked!r}, so unset it, or ' if asked else ''}see that no other process has it and "
            f"that jax is installed for it."
        ) from None


def _as_meant(value: Any) -> Any:
    """A flag's value, or the config, with its paths as the user meant them; UserError for one that is none here."""
    if isinstance(value, ml_collections.ConfigDict):
        for key in (key for key in ROWS if key.endswith((".dir", ".path", ".encoder", ".weights", ".reference"))):
            section, name = key.split(".")
            given = value[section][name]
            if given and given != WORDLLAMA and not given.startswith("hf:"):
                value[section][name] = str(local_path(given))
        return value
    return local_path(value) if isinstance(value, pathlib.Path) else value


def _variant(stage: str, arguments: Sequence[str]) -> str:
    """The module of a stage: `evaluate --samples` is about files, and another than `evaluate` of a workdir."""
    given = {argument.partition("=")[0] for argument in arguments}
    if stage == "evaluate" and given & {"--samples", "--reference", "--weights"}:
        return "evaluate_files"
    return "make_reference" if stage == "evaluate" and "--make-reference" in given else stage


def _flags_of(stage: str) -> Flags:
    """The flags of a stage that takes a config, beside that."""
    return FLAGS.get(stage, WORKDIR)


def stage_flags(stage: str) -> Flags:
    """The flags of a stage, beside --config where it takes one; UserError if what it needs is not installed."""
    return _stage_module(stage).FLAGS if stage in WITHOUT_CONFIG else _flags_of(stage)


def _has_workdir(stage: str) -> bool:
    """Whether a stage that takes a config also takes a workdir."""
    return "--workdir" in _flags_of(stage)


def usage(table: Flags, brackets: bool = True) -> str:
    """Flags as a help text shows them, in brackets those that may be left out."""
    texts = {f"{flag} {options.get('metavar', '')}".strip(): options for flag, options in table.items()}
    return " ".join(f"[{text}]" if brackets and "required" not in texts[text] else text for text in texts)


def make_parser(table: Flags, **texts: Any) -> argparse.ArgumentParser:
    """A parser of the flags of what takes no config; `texts` are argparse's prog, description and epilog."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
    for flag, options in table.items():
        parser.add_argument(flag, **options)
    return parser


def parse_flags(table: Flags, arguments: list[str], **texts: str) -> argparse.Namespace:
    """Flags of what takes no config.

    Args:
        table: the flags.
        arguments: the command line's, after the stage.
        texts: see `make_parser`.

    Raises:
        UserError: an unknown, missing or unusable flag.
    """
    parser = make_parser(table, **texts)

    def refuse(message: str) -> NoReturn:
        raise UserError(f"the command line cannot be used ({message}): --help lists the flags.")

    parser.allow_abbrev = False
    parser.error = refuse  # type: ignore[method-assign]  # raises, as the parser's own exits
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise UserError(f"there is no flag {name}: {f'did you mean {close[0]}' if close else '--help lists them'}.")
    return parser.parse_args(arguments)


def _stage_module(stage: str) -> types.ModuleType:
    """The module of a stage; UserError if what it needs beside the base requirements is not installed."""
    try:
        return importlib.import_module(f"ard_jax.stages.{stage}")
    except ModuleNotFoundError as error:
        remedy = "install ard_jax with its extra train, or requirements.txt"
        raise UserError(f"this stage needs {error.name}, which is not installed: {remedy}.") from error


def _describe_storage_error(error: Exception, workdir: pathlib.Path | None) -> str:
    """The sentence for a full disk or a path that cannot be used, "" for any other error.

    ArrayRecord and TensorStore raise errors of their own, with the system's words in them.
    """
    said = _one_line(error)
    if any(os.strerror(code) in said for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        place = f"the disk of {workdir}" if workdir else "the disk"
        return f"{place} is full: free some space and run the same command again."
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
        remedy = "mend that, or choose another --workdir" if workdir else "mend that, or name another"
        return f"a file or folder cannot be used ({said}): {remedy}."
    return ""


@contextlib.contextmanager
def _stop_on_sigterm(stage: str) -> Iterator[None]:
    """Ends a stage at once on SIGTERM and SIGHUP: what it has made so far is whole, and what it was making is dropped.

    A stage that trains replaces this while its loop runs; on several hosts the signal is then JAX's from the start.
    """

    def stop(*_: object) -> None:
        if stage not in TRAINING:
            raise Preempted("stopped")
        # before the loop and after it nothing is half-written, and an orderly end would wait for what compiles
        print(f"{stage}: stopped with nothing new to save: resume by running the same command.", flush=True)
        os._exit(143)

    if stage in TRAINING and jax.process_count() > 1:
        yield
        return
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    with hosts.handlers_put_back(numbers):
        for number in numbers:
            signal.signal(number, stop)
        yield


def _report_error(stage: str, sentence: str) -> int:
    print(f"ard_jax {stage}: {sentence}", file=sys.stderr, flush=True)
    hosts.leave_others(2)
    return 2


def set_up_logging() -> None:
    """Our own log lines and everybody's warnings, but for those around checkpoints.

    Orbax writes forty lines a checkpoint, and a failed one at length before it raises it; asyncio repeats that.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, force=True)
    logging.getLogger("ard_jax").setLevel(logging.INFO)
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _set_up_jax(workdir: pathlib.Path | None) -> None:
    """Keeps compiled programs under the workdir, if there is one, unless JAX_COMPILATION_CACHE_DIR says where."""
    if workdir and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compile_cache"))
        # all of them, not just those that take a second: the stages of a run have many small ones in common
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def parse_config(arguments: list[str], table: Flags = WORKDIR) -> tuple[Any, ...]:
    """Flags → (resolved config, the other flags' values in their order).

    Args:
        arguments: the command line's, after the stage.
        table: flags beside --config.

    Raises:
        UserError: an unknown flag or key, a value of the wrong type, a config file that is not there or does not work.
    """
    arguments = [
        re.sub(r"^(--?config=)?~(?=/)", lambda found: (found[1] or "") + str(pathlib.Path.home()), argument)
        for argument in arguments
    ]  # a shell expands ~ at the start of a word alone
    sys.modules.pop("config_config", None)  # the last config file's names would still be in it
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["ard_jax", *arguments])
    for flag, options in table.items():
        if "action" in options:
            flags.DEFINE_bool(flag.lstrip("-"), False, "", flag_values=values)
        else:
            flags.DEFINE_string(flag.lstrip("-"), None, "", flag_values=values)
    _check_flags(arguments, table)
    try:
        rest = values(["ard_jax", *arguments])[1:]
        config = values.config
    except UserError:
        raise
    except flags.Error as error:
        raise UserError(f"the command line cannot be used: {_last_line(error)}.") from None
    except ModuleNotFoundError as error:
        raise UserError(
            f"the config file builds on {error.name}, which is not found from here: run in the folder that has it "
            f"(configs/ lies in the repository), or let get_config start from default_config()."
        ) from None
    except Exception as error:  # a config file is code, which may raise anything
        raise UserError(f"the config file cannot be used ({type(error).__name__}: {_last_line(error)}).") from None
    if rest:
        raise UserError(f"{rest[0]!r} is not understood: settings are given as --config.key=value.")
    if not isinstance(config, ml_collections.ConfigDict) or set(known_keys()) - set(flatten(config.to_dict()).keys()):
        raise UserError("the config file leaves settings out: let its get_config start from default_config().")
    given = {flag: values[flag.lstrip("-")].value for flag in table}
    return config, *(
        value if value is None else table[flag].get("type", lambda value: value)(value) for flag, value in given.items()
    )


def _check_flags(arguments: list[str], table: Flags) -> None:
    """Says in words what ml_collections would say late or unclearly.

    Raises:
        UserError: a flag is missing, empty or unknown, or the config file is not there.
    """
    given = {}
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument.startswith("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            given[name] = value if equals else following
    needed = {flag: options for flag, options in table.items() if "required" in options}
    for flag in ("--config", *needed):
        if not given.get(flag.lstrip("-")):
            raise UserError(f"{flag} is missing: give --config FILE and {usage(needed)}.")
    file = given["config"].split(":")[0]
    if not pathlib.Path(file).is_file():
        raise UserError(f"the config file {file!r} is not there: name one, such as configs/digits.py.")
    others = [flag.lstrip("-") for flag in (*table, *hosts.FLAGS)]
    known = ["config", *others, *(f"config.{key}" for key in known_keys())]
    for name in given:
        if name not in known and name.removeprefix("no") not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean --{' or --'.join(close)}" if close else "ard_jax/config.py lists the settings"
            raise UserError(f"there is no flag --{name}: {hint}.")


def known_keys() -> list[str]:
    """Every setting that there is."""
    return list(flatten(default_config().to_dict()))


def _last_line(error: Exception) -> str:
    """ml_collections puts a traceback before what matters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
