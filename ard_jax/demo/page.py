"""The page, in gradio: fields, buttons, and who is told what; the rest of this room knows nothing of it."""

import errno
import logging
import os
import pathlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read when gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr

from ard_jax.demo import html
from ard_jax.demo.drawing import MOST_IMAGES, Drawing, draw, edit
from ard_jax.demo.models import Models
from ard_jax.errors import UserError, first_line

log = logging.getLogger("ard_jax")

EXAMPLES = {"openmoji": ("red heart", "cat face", "fire", "flag of France", "woman astronaut dark skin tone")}
LARGEST_UPLOAD = 20 * 2**20  # bytes
QUEUE = 16  # people who may wait
TRIES = 20  # ports
HISTORY = {"both": "with and without", "with": "with history", "without": "without"}


def make_page(models: Models) -> gr.Blocks:
    """The page of some models."""
    with gr.Blocks(title="ard_jax", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# ard_jax: a teacher and its students\nThe same noise, drawn by each of them.")
        with gr.Tab("Draw"):
            drawn = _draw_tab(models)
        if models.editors:
            with gr.Tab("Edit a picture"):
                _edit_tab(models, drawn)
    # one at a time works, whoever asks; the others wait for their turn
    page.queue(default_concurrency_limit=1, max_size=QUEUE)
    return page


def _told_field(models: Models, name: str) -> gr.Textbox | gr.Dropdown:
    """Where the caption is typed, or the class chosen."""
    pipe = models.first.pipe
    if pipe.prompts is None:
        classes = [(pipe.id2label.get(i, f"class {i}"), i) for i in range(pipe.config.data.num_classes)]
        return gr.Dropdown(classes, value=0, label="Class", filterable=True, elem_id=f"{name}-told")
    first = EXAMPLES.get(pipe.config.data.source, ("a red apple",))[0]
    return gr.Textbox(first, label="Caption", lines=1, max_lines=3, elem_id=f"{name}-told")


def _common_fields(name: str) -> tuple[gr.Number, gr.Slider]:
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id=f"{name}-seed")
    count = gr.Slider(1, MOST_IMAGES, value=1, step=1, label="Pictures", elem_id=f"{name}-count")
    return seed, count


def _draw_tab(models: Models) -> gr.State:
    """Fields, pictures and the slider; what was drawn last is the state that comes back."""
    drawn = gr.State(None)
    told = _told_field(models, "draw")
    examples = EXAMPLES.get(models.first.pipe.config.data.source, ())
    if examples and models.first.pipe.prompts is not None:
        gr.Examples([[words] for words in examples], inputs=[told], label="Such as", api_visibility="private")
    with gr.Row():
        seed, count = _common_fields("draw")
    chosen = gr.CheckboxGroup(
        [(model.title, model.name) for model in models.usable],
        value=[model.name for model in models.usable],
        label="Models",
        elem_id="models",
    )
    kinds = {"with": models.with_history(True), "without": models.with_history(False)}
    if all(kinds.values()):
        history = gr.Radio(
            [(words, key) for key, words in HISTORY.items()], value="both", label="Students", elem_id="history"
        )

        def choose(wanted: str, before: list[str]) -> list[str]:
            keys = kinds if wanted == "both" else [wanted]
            shown = {name for key in keys for name in kinds[key]}
            others = set(before) - {name for names in kinds.values() for name in names}
            return [model.name for model in models.usable if model.name in shown | others]

        history.input(choose, [history, chosen], chosen, queue=False, api_visibility="private")
    greyed = html.greyed(models)
    gr.HTML(greyed, elem_id="greyed", visible=bool(greyed))
    with gr.Row():
        go = gr.Button("Draw", variant="primary", elem_id="draw")
        stop = gr.Button("Stop", elem_id="stop")
    status = gr.HTML(html.message("Nothing is drawn yet."), elem_id="draw-status")
    moment = gr.Slider(1, 2, value=2, step=1, label="Moment of the trajectory", visible=False, elem_id="moment")
    pictures = gr.HTML("", elem_id="draw-pictures")

    def start(told: Any, seed: Any, count: Any, names: list[str]) -> Iterator[tuple[Any, ...]]:
        for drawing, said in _said(lambda: draw(models, told, seed, count, names)):
            if drawing is None:
                yield said, gr.skip(), gr.skip(), gr.skip()
            elif drawing.doing:
                shown = html.results(drawing) if drawing.rows else gr.skip()
                yield said, shown, gr.skip(), gr.skip()
            else:
                last = drawing.longest
                slider = gr.Slider(minimum=1, maximum=last, value=last, visible=last > 1)
                yield said, html.results(drawing), slider, drawing

    outputs = [status, pictures, moment, drawn]
    work = dict(concurrency_id="work", show_progress="minimal", show_progress_on=status, api_visibility="private")
    events = [go.click(start, [told, seed, count, chosen], outputs, **work)]
    if isinstance(told, gr.Textbox):
        events.append(told.submit(start, [told, seed, count, chosen], outputs, **work))
    stop.click(lambda: html.message("Stopped."), None, status, cancels=events, queue=False, api_visibility="private")
    moment.input(
        html.results, [drawn, moment], pictures, trigger_mode="always_last", show_progress="hidden", queue=False,
        api_visibility="private",
    )  # fmt: skip
    return drawn


def _edit_tab(models: Models, drawn: gr.State) -> None:
    """A picture in, and what a student makes of it."""
    editors = models.editors
    picture = gr.Image(
        label="Picture", sources=["upload", "clipboard"], format="png", height=240, elem_id="picture",
        type="filepath", image_mode=None,
    )  # fmt: skip
    # the file as it was put in: gradio would look into it, and what is wrong with it is for `open_picture` to say
    picture.preprocess = lambda payload: payload.path if payload else None
    take = gr.Button("Take the picture that was drawn", elem_id="take")
    told = _told_field(models, "edit")
    student = gr.Dropdown(
        [(model.title, model.name) for model in editors], value=editors[0].name, label="Student", elem_id="student"
    )
    step = gr.Slider(
        1, max(editors[0].steps - 1, 1), value=1, step=1, elem_id="source-step",
        label="Source step: the later, the more of the picture stays",
    )  # fmt: skip
    with gr.Row():
        seed, count = _common_fields("edit")
    go = gr.Button("Edit", variant="primary", elem_id="edit")
    status = gr.HTML(html.message("Nothing is edited yet."), elem_id="edit-status")
    pictures = gr.HTML("", elem_id="edit-pictures")

    def fit(name: str) -> Any:
        return gr.Slider(maximum=max(models.find(name).steps - 1, 1), value=1)

    def start(*asked: Any) -> Iterator[tuple[Any, ...]]:
        for drawing, said in _said(lambda: edit(models, *asked)):
            yield said, gr.skip() if drawing is None else html.results(drawing)

    def taken(drawing: Drawing | None) -> tuple[Any, str]:
        if drawing is None:
            return gr.skip(), html.message("No picture has been drawn yet: draw one first.", is_error=True)
        return drawing.rows[0].drawn.images[0].squeeze(), html.message("The first picture that was drawn is taken.")

    student.input(fit, student, step, queue=False, api_visibility="private")
    take.click(taken, drawn, [picture, status], queue=False, api_visibility="private")
    go.click(
        start, [told, seed, count, student, picture, step], [status, pictures], concurrency_id="work",
        show_progress="minimal", show_progress_on=status, api_visibility="private",
    )  # fmt: skip


def _said(work: Callable[[], Iterator[Drawing]]) -> Iterator[tuple[Drawing | None, str]]:
    """Every drawing of some work with what is said of it; what is wrong is said in a sentence, with no drawing."""
    try:
        for drawing in work():
            yield drawing, html.status(drawing)
    except UserError as error:
        said = str(error)
        yield None, html.message(said[:1].upper() + said[1:], is_error=True)
    except Exception as error:  # a defect of ours, or no memory: people at the page see no terminal
        log.exception("the demo failed")
        yield None, html.message(f"This failed ({type(error).__name__}: {first_line(error)}).", is_error=True)


# ------------------------------------------------------------------------------------------------------ serving


def serve(page: gr.Blocks, host: str, port: int) -> tuple[str, int]:
    """Serves the page in threads of its own; gives its address, and the port, which is the next free one.

    Raises:
        UserError: there is no free port, or nobody can listen on this host.
    """
    free = find_port(host, port)
    _, address, _ = page.launch(
        server_name=host,
        server_port=free,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        inbrowser=False,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        max_file_size=LARGEST_UPLOAD,
        css_paths=pathlib.Path(__file__).with_name("demo.css"),
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    return address, free


def find_port(host: str, port: int) -> int:
    """The first free one from `port` on.

    Raises:
        UserError: see `serve`.
    """
    for candidate in range(port, min(port + TRIES, 65536)):
        try:
            with socket.create_server((host, candidate)):
                return candidate
        except OSError as error:
            reason = error
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                break
    raise UserError(f"--port is {port}, but nobody can listen there or after it on {host} ({reason}): give another.")
