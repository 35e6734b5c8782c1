"""Draws what captions say with the shipped teacher and its student of four calls, side by side, from the same noise.

    python -m examples.draw_emoji --prompt "red heart" --prompt "woman astronaut dark skin tone"

Wants the extra `emoji`. With --workdir, the students of a run of configs/openmoji.py are drawn as well.
"""

import argparse
import pathlib
import re
import sys
import time

import numpy as np

from ard_jax import ARDPipeline
from ard_jax.build import make_solve
from ard_jax.data.openmoji_names import pictures
from ard_jax.errors import UserError
from ard_jax.report import captioned_rows
from ard_jax.sampling import network_calls

SHIPPED = pathlib.Path(__file__).resolve().parent.parent / "pipelines"
PROMPTS = ("red heart", "cat face", "fire", "flag of France", "red apple", "woman astronaut dark skin tone")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--prompt", action="append", metavar="TEXT", help="what to draw; may be given several times")
    flags.add_argument("--seed", type=int, default=0, help="of the noise")
    flags.add_argument("--workdir", type=pathlib.Path, help="a run whose students are drawn as well")
    flags.add_argument("--out", type=pathlib.Path, default=pathlib.Path("emoji.png"), help="the picture to write")
    args = flags.parse_args()
    prompts = args.prompt or list(PROMPTS)
    check_words(prompts)
    sources = {"Teacher": SHIPPED / "openmoji-teacher", "Student": SHIPPED / "openmoji-ard"}
    if args.workdir:
        folders = sorted(path.parent for path in (args.workdir / "distill").glob("*/done.json"))
        sources |= {f"Own student, {folder.name}": folder for folder in folders if folder.name != "shipped"}
    rows = {title: draw(ARDPipeline.from_pretrained(source), prompts, args.seed) for title, source in sources.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(captioned_rows(rows, prompts))
    print(f"done: {args.out}")


def check_words(prompts: list[str]) -> None:
    """Raises UserError for a prompt of which no word is in any caption."""
    known = {word for picture in pictures()[0] for word in words_of(picture.caption)}
    for prompt in prompts:
        if not known & set(words_of(prompt)):
            raise UserError(
                f"no word of the prompt {prompt!r} is in any of OpenMoji's captions, so that nobody taught the network "
                f"what it means: use other words, such as {PROMPTS[-1]!r}."
            )


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def draw(pipe: ARDPipeline, prompts: list[str], seed: int) -> tuple[str, np.ndarray]:
    """What it cost in words, and uint8 images (prompt, height, width, channel)."""
    pipe(prompts, seed=seed)  # compiles
    started = time.perf_counter()
    images = pipe(prompts, seed=seed).images
    milliseconds = 1000 * (time.perf_counter() - started) / len(prompts)
    calls = pipe.model.steps if pipe.is_student else network_calls(make_solve(pipe.config))
    return f"{calls} calls · {milliseconds:,.0f} ms an image", np.stack([np.asarray(image) for image in images])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
