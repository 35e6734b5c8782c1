"""A person who has never seen the project: from `git clone` to an edited picture, with the seconds of each part.

    python -m benchmarks.first_minutes FOLDER [--source REPOSITORY] [--pictures FOLDER]

Clones into FOLDER, which must not be there, makes an environment, installs as the README says, starts the demo, and
types into its page in a headless Chromium. Wants playwright and a Chromium; say whether the cache of pip was warm. With
--pictures, the screens that docs/TOUR.md shows are written there.
"""

import argparse
import base64
import contextlib
import io
import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from ard_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
WAIT = 120_000  # milliseconds that a part of the page may take


class Clock:
    """Seconds by part, said as they pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)
        print(f"{name}: {self.seconds[name]} s", flush=True)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("folder", type=pathlib.Path, help="a new one, to work in")
    flags.add_argument("--source", default=str(ROOT), help="what git clones (default: this repository)")
    flags.add_argument("--pictures", type=pathlib.Path, help="a folder for screenshots")
    args = flags.parse_args()
    if args.folder.exists():
        raise UserError(f"{args.folder} is there already: name a new folder.")
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if browser is None:
        raise UserError(f"there is no Chromium: install one of {', '.join(CHROMIUM)}.")
    clock, home = Clock(), args.folder.resolve() / "ard_jax"
    commands = home / ".venv" / "bin"
    with clock.part("git clone"):
        subprocess.run(["git", "clone", "--quiet", args.source, home], check=True)
    with clock.part("an environment"):
        subprocess.run([sys.executable, "-m", "venv", home / ".venv"], check=True)
    with clock.part("pip install '.[demo,emoji]'"):
        pip = [commands / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, ".[demo,emoji]"], cwd=home, check=True, stderr=subprocess.DEVNULL)
    demo = subprocess.Popen([commands / "ard-jax", "demo"], cwd=home, stdout=subprocess.PIPE, text=True)
    try:
        with clock.part("ard-jax demo, until it says where it is"):
            address = find_address(demo)
        with sync_playwright() as playwright:
            play(playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]), address, clock, args)
    finally:
        demo.terminate()
        demo.wait()
    total = round(sum(clock.seconds.values()), 1)
    print(json.dumps({"seconds": clock.seconds, "total": total}))


def find_address(demo: subprocess.Popen) -> str:
    """What the demo says that is to be opened."""
    for line in demo.stdout or ():
        if line.startswith("demo: open "):
            return line.split()[2].rstrip(";")
    raise RuntimeError("the demo ended before it was there")


def play(browser, address: str, clock: Clock, args: argparse.Namespace) -> None:
    """Draws, draws something else, edits it, and keeps the edited picture."""
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.set_default_timeout(WAIT)
    with clock.part("the page"):
        page.goto(address)
        page.wait_for_selector("#draw")
    with clock.part("first pictures: a cat face"):
        draw(page, "cat face")
    keep(page, args, "demo")
    with clock.part("the next: the flag of France"):
        draw(page, "flag of France")
    with clock.part("edited: the flag of Italy"):
        page.get_by_role("tab", name="Edit a picture").click()
        edit(page, "flag of Italy")
    with clock.part("saved"):
        shown = page.wait_for_selector("#edit-pictures .ard-model figure img").get_attribute("src")
        picture = Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2])))
        picture.save(args.folder / "edited.png")
    left = picture.convert("RGB").resize((1, 1), Image.Resampling.BOX, box=(4, 12, 9, 20)).getpixel((0, 0))
    print(f"the edited picture: {args.folder / 'edited.png'}, {picture.size}; its left, blue before, is {left} (RGB)")
    keep(page, args, "tour_edit")
    page.fill("#edit-told textarea", "heart " * 400)
    page.click("#edit")
    page.wait_for_selector("#edit-status .ard-error")
    keep(page, args, "tour_error")
    if args.pictures:
        page.set_viewport_size({"width": 390, "height": 844})
        page.get_by_role("tab", name="Draw").click()
        draw(page, "red heart")
        page.get_by_role("tab", name="Edit a picture").click()
        edit(page, "broken heart")
        keep(page, args, "demo_phone")
    browser.close()


def draw(page: Page, caption: str) -> None:
    page.fill("#draw-told textarea", caption)
    before = page.inner_html("#draw-pictures")
    page.click("#draw")
    page.wait_for_function("before => document.querySelector('#draw-pictures').innerHTML !== before", arg=before)
    page.wait_for_selector("#draw-status .ard-done:has-text('Done.')")


def edit(page: Page, caption: str) -> None:
    """Edits what was drawn last."""
    before = page.inner_html("#edit-pictures")
    page.click("#take")
    page.wait_for_selector("#edit-status:has-text('is taken.')")
    page.wait_for_selector("#picture img")
    page.fill("#edit-told textarea", caption)
    page.click("#edit")
    page.wait_for_function("before => document.querySelector('#edit-pictures').innerHTML !== before", arg=before)
    page.wait_for_selector("#edit-status .ard-done:has-text('Done.')")


def keep(page: Page, args: argparse.Namespace, name: str) -> None:
    """A screenshot in few colours, so that it is small."""
    if args.pictures:
        shot = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        args.pictures.mkdir(parents=True, exist_ok=True)
        shot.quantize(128, dither=Image.Dither.NONE).save(args.pictures / f"{name}.png", optimize=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
