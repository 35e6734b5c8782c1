"""The demo's page in a real browser: Chromium without a head, and nothing on the net to ask."""

import importlib.util
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import ROOT, copy

from ard_jax.demo.drawing import MOST_PIXELS
from ard_jax.demo.models import find_models
from ard_jax.files import read_json, write_json

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["a Chromium"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: pip install '.[demo]' playwright"),
]


@pytest.fixture(scope="module")
def workdir(pipeline, tmp_path_factory):
    """A teacher, a student with history and one without, and one that is half trained."""
    workdir = copy(pipeline, tmp_path_factory.mktemp("run"), "teacher", "distill")
    for name, mask in (("step", "diagonal"), ("half", "causal")):
        folder = shutil.copytree(workdir / "distill" / "ard", workdir / "distill" / name)
        config = read_json(folder / "config.json")
        config["student"]["mask"] = mask
        write_json(folder / "config.json", config)
    (workdir / "distill" / "half" / "done.json").unlink()
    return workdir


@pytest.fixture(scope="module")
def models(workdir):
    return find_models(workdir)


@pytest.fixture(scope="module")
def served(models):
    """The page as gradio has it, and its address."""
    from ard_jax.demo.page import make_page, serve

    blocks = make_page(models)
    address, _ = serve(blocks, "127.0.0.1", 7870)
    yield blocks, address
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def queue(served):
    """Who waits and who is served: gradio's own, since no page shows when it has noticed that one is closed."""
    return served[0]._queue


@pytest.fixture(scope="module")
def address(served):
    return served[1]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def new_page(browser, **options):
    page = browser.new_page(**options)
    page.set_default_timeout(120_000)  # for machines that have other work
    return page


@pytest.fixture
def page(browser, address):
    page = new_page(browser)
    page.goto(address)
    page.wait_for_selector("#draw")
    yield page
    if not page.is_closed():
        page.close()


def said(page, tab: str) -> str:
    """What stands in the place of the bar once the work has ended."""
    return page.wait_for_selector(f"#{tab}-status :is(.ard-done, .ard-error):not(:has-text('Nothing is'))").inner_text()


def until(condition) -> None:
    """Waits for what other threads do."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.02)
    raise TimeoutError("it never came to that")


def tab_to(page, selector: str) -> None:
    """Presses the key as often as it takes to what is wanted, or to something in it."""
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.evaluate("wanted => document.activeElement.closest(wanted) !== null", selector):
            return
    raise AssertionError(f"no key leads to {selector}")


def too_far_right(page) -> list[str]:
    """What cannot be seen whole in the width of the window; gradio cuts it off, so that the page itself is no wider."""
    return page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, img, h3, p')]
        .filter(part => part.checkVisibility() && part.getBoundingClientRect().right > innerWidth)
        .map(part => part.outerHTML.slice(0, 99))"""
    )


def titles(page, tab: str = "draw") -> list[str]:
    return [heading.inner_text() for heading in page.query_selector_all(f"#{tab}-pictures h3")]


@pytest.fixture
def held(models):
    """The teacher waits before each step until it may go on; which steps it has begun."""

    class Held:
        began, may_go_on, steps = threading.Event(), threading.Semaphore(0), []

    runner = models.open("teacher")
    list(runner.draw(0, runner.noise(0, 1)))  # compiles
    solve = runner._solve

    def step(params, prepared, x, x0, number):
        Held.steps.append(int(number))
        Held.began.set()
        Held.may_go_on.acquire()
        return solve.step(params, prepared, x, x0, number)

    runner._solve = solve._replace(step=step)
    yield Held
    Held.may_go_on.release(100)
    runner._solve = solve


def test_all_models_draw_by_keyboard_alone(page, models):
    assert page.inner_text("#greyed") == (
        "Student half: its training is not finished (its newest checkpoint is of step 20): "
        "run the stage 'distill' to its end."
    )
    page.focus("#draw-seed input")
    page.keyboard.type("5")  # after the 0 that is there
    tab_to(page, "#draw")
    page.keyboard.press("Enter")
    assert said(page, "draw") == "Done."
    shown = titles(page)
    assert [title.split(" ")[0:2] for title in shown] == [["Teacher", "10"], ["Student", "ard"], ["Student", "step"]]
    assert all(re.search(r"(10|3) network calls · [\d.,]+ ms a picture", title) for title in shown)
    picture = page.query_selector("#draw-pictures figure img")
    assert picture.get_attribute("alt") == "Teacher, step 5 of 5: 0, picture 1 of 1"
    levels = page.evaluate(
        """image => { const c = document.createElement('canvas'); c.width = c.height = 8;
        const pen = c.getContext('2d'); pen.drawImage(image, 0, 0);
        return Array.from(pen.getImageData(0, 0, 8, 8).data).filter((_, i) => i % 4 == 0) }""",
        picture,
    )
    expected = np.asarray(models.open("teacher").pipe([0], seed=5).images[0], int)
    assert np.abs(np.reshape(levels, (8, 8)) - expected).max() <= 1
    page.focus("#moment input[type=range]")
    page.keyboard.press("Home")
    page.wait_for_selector("#draw-pictures .ard-where:has-text('step 1 of 5')")
    moments = [element.inner_text() for element in page.query_selector_all("#draw-pictures .ard-where")]
    assert moments == ["step 1 of 5", "step 1 of 3", "step 1 of 3"]


def test_history_on_and_off(page):
    ticked = "#models label:has(input:checked)"
    for choice, names in (("without", ["Teacher", "Student step"]), ("with history", ["Teacher", "Student ard"])):
        page.get_by_label(choice, exact=True).check()
        page.wait_for_selector(f"{ticked}:has-text('{names[1]}') ~ :not(:has(input:checked)), {ticked}:last-child")
        page.wait_for_function("n => document.querySelectorAll('#models input:checked').length == n", arg=2)
        page.wait_for_selector(f"{ticked}:has-text('{names[1]}')")
        assert [label.inner_text() for label in page.query_selector_all(ticked)] == names


def test_a_mistake_is_a_sentence_in_the_page(page):
    for box in page.query_selector_all("#models input:checked"):
        box.uncheck()
    page.click("#draw")
    assert said(page, "draw") == "No model is chosen: tick one at least."
    assert page.get_attribute("#draw-status .ard-error", "role") == "alert"


def test_a_picture_is_edited_by_keyboard_alone(page, tmp_path):
    tab_to(page, "[role=tab][aria-selected=false]")  # the other one
    page.keyboard.press("Enter")
    page.wait_for_selector("#picture button")
    with page.expect_file_chooser() as chooser:
        tab_to(page, "#picture button")
        page.keyboard.press("Enter")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)).save(tmp_path / "any.png")
    chooser.value.set_files(tmp_path / "any.png")
    page.wait_for_selector("#picture img")
    tab_to(page, "#take")
    page.keyboard.press("Enter")
    assert said(page, "edit") == "No picture has been drawn yet: draw one first."
    tab_to(page, "#edit")
    page.keyboard.press("Enter")
    page.wait_for_selector("#edit-status:has-text('Done.')")
    assert titles(page, "edit") == ["Student ard 3 calls, the picture after call 1"]
    assert page.query_selector("#edit-pictures .ard-strip img.given").get_attribute("alt") == "step 1"


@pytest.mark.parametrize("kind", ["huge", "no picture"])
def test_what_is_put_in_and_cannot_be_edited(page, tmp_path, kind):
    path = tmp_path / "picture.png"
    if kind == "huge":
        Image.new("1", (MOST_PIXELS // 5000 + 1, 5000)).save(path)
    else:
        path.write_text("words")
    page.get_by_role("tab", name="Edit a picture").click()
    page.set_input_files("#picture input[type=file]", path)
    page.wait_for_selector("#picture img")
    page.click("#edit")
    wanted = {"huge": "larger than 50 megapixels: shrink it first.", "no picture": "cannot be read"}[kind]
    assert wanted in said(page, "edit")


def test_more_bytes_than_may_be_put_in(page, tmp_path):
    (tmp_path / "picture.png").write_bytes(bytes(20 * 2**20 + 1))
    page.get_by_role("tab", name="Edit a picture").click()
    page.set_input_files("#picture input[type=file]", tmp_path / "picture.png")
    page.get_by_text("exceed the maximum allowed size of 20.0 Mb").first.wait_for()


def test_progress_is_shown_and_stop_stops(page, held, queue):
    page.click("#draw")
    for step in (1, 2):
        held.may_go_on.release()
        page.wait_for_selector(f"#draw-status span:has-text('Teacher: step {step} of 5')")
    assert float(page.get_attribute("#draw-status progress", "value")) == pytest.approx(2 / 5 / 3, abs=1e-3)
    with page.expect_response(lambda response: response.url.endswith("/cancel")):  # it comes when the work is over
        page.click("#stop")
        assert said(page, "draw") == "Stopped."
        until(lambda: not any(queue.active_jobs))  # what the page says is an answer to another request
        held.may_go_on.release(100)
    assert max(held.steps) < 4


def test_a_closed_browser_stops_the_work(page, browser, address, held, queue):
    page.click("#draw")
    assert held.began.wait(60)
    running = [event for job in queue.active_jobs if job for event in job]
    page.close()
    until(lambda: any(not event.alive for event in running))  # that is what gradio asks between two steps
    held.may_go_on.release(100)
    other = new_page(browser)
    other.goto(address)
    other.get_by_label("Teacher", exact=True).uncheck()
    other.click("#draw")
    other.wait_for_selector("#draw-status:has-text('Done.')")  # its turn has come
    assert max(held.steps) < 4
    other.close()


def test_two_at_once_are_drawn_one_after_another(page, browser, address, held):
    page.click("#draw")
    assert held.began.wait(60)
    other = new_page(browser)
    other.goto(address)
    other.get_by_label("Teacher", exact=True).uncheck()
    other.click("#draw")
    other.get_by_text("queue").first.wait_for()
    assert not titles(other)
    held.may_go_on.release(100)
    for one, count in ((page, 3), (other, 2)):
        one.wait_for_selector("#draw-status:has-text('Done.')")
        assert len(titles(one)) == count
    other.close()


def test_the_shipped_models_offline_on_a_phone(browser):
    """The command as people start it, on a port that is taken; every request of the page is this machine's."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-u", "-m", "ard_jax", "demo", "--port", str(port)]
        # the shipped networks are too slow without the optimisations that the tests leave out
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
        lines = [server.stdout.readline() for _ in range(3)]
        try:
            assert lines[:2] == ["demo: Teacher openmoji-teacher\n", "demo: Student openmoji-ard\n"]
            opened = re.fullmatch(r"demo: open (http://127\.0\.0\.1:(\d+)/) \(port \d+ is taken\); .*\n", lines[2])
            assert port < int(opened[2]) <= port + 20
            _on_a_phone(browser, opened[1])
        finally:
            server.send_signal(signal.SIGTERM)
            rest = server.communicate()[0]
    assert server.returncode == 0 and rest == "demo: closed.\n"


@pytest.mark.parametrize("flag", ["--workdir", "--pipeline"])
def test_the_commands_of_the_page_start_it_with_their_models(workdir, flag):
    (line,) = re.findall(
        rf"^(python -m ard_jax demo {flag} .*?) *#", (ROOT / "docs" / "DEMO.md").read_text(), re.MULTILINE
    )
    words = line.replace("runs/quickstart", str(workdir)).replace("FOLDER", str(ROOT / "pipelines" / "openmoji-ard"), 1)
    words = words.replace("FOLDER", str(ROOT / "pipelines" / "openmoji-teacher")).split()
    server = subprocess.Popen([sys.executable, "-u", *words[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        shown = list(
            itertools.takewhile(lambda said: not said.startswith("demo: open http://127.0.0.1:"), server.stdout)
        )
    finally:
        server.send_signal(signal.SIGTERM)
        rest = server.communicate()[0]
    assert server.returncode == 0 and rest == "demo: closed.\n"
    if flag == "--pipeline":
        assert shown == ["demo: Teacher openmoji-teacher\n", "demo: Student openmoji-ard\n"]
    else:
        assert shown[:2] == ["demo: Teacher\n", "demo: Student ard\n"]
        (left_out,) = [said for said in shown if " is left out: " in said]
        assert left_out.startswith("demo: Student half is left out: ")


def _on_a_phone(browser, address: str) -> None:
    page, asked = new_page(browser, viewport={"width": 390, "height": 844}), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#draw")
    page.fill("#draw-told textarea", "ab" * 5000)
    page.click("#draw")
    assert said(page, "draw") == "The caption has 10,000 characters: give at most 1,000."
    page.fill("#draw-told textarea", "red heart")
    page.keyboard.press("Enter")
    page.wait_for_selector("#draw-status:has-text('Done.')")
    assert len(page.query_selector_all("#draw-pictures .ard-strip img")) == 24 + 4
    assert too_far_right(page) == []
    page.get_by_role("tab", name="Edit a picture").click()
    page.click("#take")
    page.wait_for_selector("#picture img")
    assert too_far_right(page) == []
    others = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert len(asked) > 10 and not others
    page.close()
