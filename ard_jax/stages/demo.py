"""A page to play with: a teacher and its students draw the same noise side by side, and edit pictures.

--workdir DIR        the teacher and all students of a run
--pipeline FOLDER    or models that `export` wrote, or that diffusers opens; may be given several times
                     without either: the OpenMoji teacher and student that come with the repository

Opens on this machine alone, http://127.0.0.1:7860, until Ctrl-C; --host 0.0.0.0 lets everybody in who reaches this
machine. If the port is taken, the next free one is. Needs gradio: pip install '.[demo]'. See docs/DEMO.md.
"""

import argparse
import contextlib
import importlib.util
import pathlib
import signal
import threading

from ard_jax.demo.models import find_models
from ard_jax.errors import Preempted, UserError
from ard_jax.files import local_path

LOCAL = "127.0.0.1"


def run(args: argparse.Namespace) -> None:
    """Serves the page until it is interrupted.

    Raises:
        UserError: there is no gradio, nothing to show, or no port.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the demo needs gradio, which is not installed: pip install '.[demo]'.")
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port is {args.port}: give a number from 1 to 65535.")
    with contextlib.suppress(KeyboardInterrupt, Preempted):
        _show(args)
    print("demo: closed.", flush=True)


def _show(args: argparse.Namespace) -> None:
    """Serves the page until a signal comes."""
    models = find_models(args.workdir, [local_path(folder) for folder in args.pipeline or ()])
    for model in models.every:
        print(f"demo: {model.title}{f' is left out: {model.why_not}' if model.why_not else ''}", flush=True)
    from ard_jax.demo.page import make_page, serve

    page = make_page(models)
    address, port = serve(page, args.host, args.port)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            # raises nothing: it may come between any two lines, and in a garbage collection Python drops what is raised
            signal.signal(number, lambda *_: ended.set())
    taken = f" (port {args.port} is taken)" if port != args.port else ""
    print(f"demo: open {address}{taken}; Ctrl-C ends it.", flush=True)
    ended.wait()
    page.close(verbose=False)


FLAGS = {
    "--workdir": dict(type=pathlib.Path, metavar="DIR", help="of a run, whose models are shown"),
    "--pipeline": dict(
        type=pathlib.Path, metavar="FOLDER", action="append", help="a model's folder; may be given several times"
    ),
    "--host": dict(default=LOCAL, help=f"address to listen on (default: {LOCAL}, this machine alone)"),
    "--port": dict(type=int, default=7860, metavar="N", help="to listen on, or the next free one (default: 7860)"),
}
