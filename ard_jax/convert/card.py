"""The model card: the README.md of an export, with the front matter that the Hugging Face hub reads."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from ard_jax.build import make_solve, make_teacher
from ard_jax.convert.hub import is_repository
from ard_jax.convert.usage import usage
from ard_jax.errors import UserError
from ard_jax.results import Results, distance_format, shares
from ard_jax.sampling import network_calls

CITATION = """```bibtex
@inproceedings{kim2025autoregressive,
  title     = {Autoregressive Distillation of Diffusion Transformers},
  author    = {Kim, Yeongmin and Anagnostidis, Sotiris and Du, Yuming and Schönfeld, Edgar and Kohler, Jonas and
               Georgopoulos, Markos and Pumarola, Albert and Thabet, Ali and Sanakoyeu, Artsiom},
  booktitle = {CVPR},
  year      = {2025},
  note      = {arXiv:2504.11295}
}
```"""


# What the hub's front matter can have as a licence; it wants lower case.
IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")

# What data of ours ask to be said of them.
CREDITS = {"openmoji": "OpenMoji (openmoji.org), under CC BY-SA 4.0, which holds for these weights too"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a card tells.

    Attributes:
        name: of the model: "teacher", or a student's.
        form: of the export: "pipeline", "diffusers", "safetensors" or "stablehlo".
        config: that it was trained or converted with.
        is_student: or else a teacher.
        part: which weights: "ema" or "params".
        sha256: of these weights as the workdir has them.
        parameters: how many.
        images: (height, width, channel) of what it makes; None for latents that no VAE decodes.
        converted: it was trained elsewhere, so that the config says nothing of its training.
        source: the teacher's `source.json`, {} if it was trained with ard_jax, None if nothing is known of it.
        license: of the weights, "" if unknown.
        results: of a workdir; without these weights, if they have not been measured.
        notes: sentences on what is different in this form.
        repository: on the hub, ORG/NAME, where it will lie; "" for none.
        base_model: the repository of what it was made from, ORG/NAME, "" if that lies in none.
        start: of a fine-tuned student, the name of the one that it started from, "" if unknown.
        text_encoder: of a model of captions: "wordllama", a folder or "hf:ORG/NAME"; "" where there is none.
    """

    name: str
    form: str
    config: ml_collections.ConfigDict
    is_student: bool
    part: str
    sha256: str
    parameters: int
    images: tuple[int, int, int] | None
    converted: bool
    source: Mapping[str, Any] | None
    license: str
    results: Results
    notes: Sequence[str] = ()
    repository: str = ""
    base_model: str = ""
    start: str = ""
    text_encoder: str = ""


def model_card(facts: Facts) -> str:
    """The README.md, in Markdown."""
    sections = {
        "How to use it": "\n\n".join([_usage(facts), *facts.notes]),
        "Results": results(facts),
        "Settings": settings(facts),
        "Where it comes from": _origin(facts),
        "Licence": _license_words(facts.license),
        "Citation": CITATION,
    }
    body = "\n\n".join(f"## {title}\n\n{words}" for title, words in sections.items() if words)
    return f"{_front_matter(facts)}\n# {title(facts)}\n\n{_description(facts)}\n\n{body}\n"


def choose_license(source: Mapping[str, Any], asked: str) -> str:
    """The licence of weights that come from `source`: the source's own if it is known, else the one asked for, else "".

    Raises:
        UserError: another one is asked for than the source's, or it cannot be a licence's name.
    """
    known = source.get("license") or ""
    known = "" if known.lower() in ("other", "unknown") else known
    if asked and not IDENTIFIER.fullmatch(asked):
        raise UserError(
            f"--license is {asked!r}, which is no licence's identifier: give one such as apache-2.0 or cc-by-nc-4.0."
        )
    if known and asked.lower() not in ("", known.lower()):
        raise UserError(
            f"--license is {asked!r}, but these weights come from {_origin_name(source)} under {known!r}, which is "
            f"passed on: leave --license out."
        )
    return known or asked


def choose_base_model(source: Mapping[str, Any], asked: str) -> str:
    """The repository that weights come from, ORG/NAME: the one asked for, else that of their `source`, else "".

    Raises:
        UserError: what is asked for is none.
    """
    if asked and not is_repository(asked):
        raise UserError(f"--base-model is {asked!r}, which names no repository: write ORG/NAME.")
    known = str(source.get("source", ""))
    return asked or (known.removeprefix("hf:") if known.startswith("hf:") else "")


def _origin_name(source: Mapping[str, Any]) -> str:
    """Where a teacher comes from: a repository as it is, of a path just the last part, since cards are published."""
    name = str(source.get("source", ""))
    return name if name.startswith("hf:") else pathlib.PurePath(name).name


def _front_matter(facts: Facts) -> str:
    method = ["autoregressive-distillation", "arxiv:2504.11295"] if facts.is_student else ["diffusion"]
    told = ["dit", "class-conditional"] if facts.config.data.num_classes else ["pixart", "text-to-image"]
    tags = [*told, "jax", *method]
    return "\n".join(
        [
            "---",
            *(
                [f"license: {facts.license.lower()}"]
                if IDENTIFIER.fullmatch(facts.license)
                else ["license: other", f"license_name: {facts.license or 'unknown'}"]
            ),
            f"library_name: {'diffusers' if facts.form == 'diffusers' else 'ard_jax'}",
            f"pipeline_tag: {'unconditional-image-generation' if facts.config.data.num_classes else 'text-to-image'}",
            *([f"base_model: {facts.base_model}"] if facts.base_model else []),
            "tags:",
            *(f"- {tag}" for tag in tags),
            "---",
            "",
        ]
    )


def title(facts: Facts) -> str:
    if not facts.is_student:
        is_classed = facts.config.data.num_classes > 0
        return f"A {'class-conditional' if is_classed else 'text-to-image'} diffusion transformer ({_network(facts)})"
    return f"{facts.name}: a diffusion transformer distilled to {_count(len(facts.config.student.points), 'step')}"


def _description(facts: Facts) -> str:
    """What it is, in two sentences."""
    config = facts.config
    classes = f"of {config.data.num_classes} classes" if config.data.num_classes else "of captions"
    shape = "×".join(map(str, facts.images or (config.data.image_size, config.data.image_size, config.data.channels)))
    what = f"images {classes}, {shape}" if facts.images else f"latents of images {classes}, {shape}"
    how = make_solve(config)
    teacher = f"{_count(how.steps, 'step')} of {how.solver} ({network_calls(how)} network calls an image)"
    if not facts.is_student:
        return (
            f"A {_network(facts)} of {facts.parameters:,} parameters that makes {what}. Its settings are {teacher}, "
            f"with a guidance scale of {how.guidance.scale:g}."
        )
    history = config.student.history_layers if config.student.mask != "diagonal" else 0
    steps = _count(len(config.student.points), "step")
    method = (
        f"autoregressive distillation (ARD, arXiv 2504.11295), so that each step sees the earlier ones in its lowest "
        f"{'layer' if history == 1 else f'{history} layers'}"
        if history
        else "step distillation, so that each step sees just the point before it"
    )
    return (
        f"A {_network(facts)} of {facts.parameters:,} parameters that makes {what}, in {steps} of one network call "
        f"each. It was distilled from a teacher of {teacher} by {method}{FINETUNED * _is_finetuned(facts)}."
    )


FINETUNED = ", and then fine-tuned against a discriminator on that teacher's features"


def _is_finetuned(facts: Facts) -> bool:
    return facts.is_student and facts.config.distill.objective == "adversarial"  # see methods.finetuned_config


def _network(facts: Facts) -> str:
    return type(make_teacher(facts.config)).__name__


def _usage(facts: Facts) -> str:
    how = facts.form, facts.config, facts.is_student, facts.images is not None
    return usage(*how, text_encoder=facts.text_encoder, repository=facts.repository)


def results(facts: Facts) -> str:
    """A table of what was measured, the teacher beside a student."""
    models = facts.results.models
    if facts.name not in models:
        return "These weights have not been measured in the workdir that they were exported from."
    columns = {  # heading: key, format
        "FD": ("fd", lambda fd: format(fd, distance_format(fd))),
        "precision": ("precision", "{:.3f}".format),
        "recall": ("recall", "{:.3f}".format),
        "PSNR to the teacher (dB)": ("psnr", "{:.2f}".format),
        "network calls": ("network_calls", "{:.0f}".format),
    }
    judged = models[facts.name].recall_at_5
    heads = [*columns, *(["caption in first 5, trained / held out"] if judged else [])]
    rows = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in dict.fromkeys(("teacher", facts.name)):
        if name in models:
            values = [(getattr(models[name], key), form) for key, form in columns.values()]
            cells = ["" if value is None else form(value) for value, form in values]
            cells += [shares(models[name].recall_at_5)] if judged else []
            rows.append(f"| {name} | {' | '.join(cells)} |")
    real = facts.results.real_images
    words = (
        f"FD is the Fréchet distance of {facts.results.samples} samples to "
        f"{'a reference' if real is None else f'{real} real images'}; like precision and recall, it is measured in "
        f"{facts.results.features}."
    )
    return "\n".join(rows) + f"\n\n{words}"


def settings(facts: Facts) -> str:
    """What the network is, and how it was trained if that was here."""
    config = facts.config
    teacher, diffusion = make_teacher(config), config.diffusion
    solver = f"{diffusion.solver}, {_count(diffusion.steps, 'step')}"
    rows = {
        "layers, width, heads, patch": ", ".join(
            str(getattr(teacher, key)) for key in ("depth", "hidden_size", "num_heads", "patch_size")
        ),
        "process": {"vp": "VP, linear β", "flow": "flow matching"}[diffusion.process],
        "teacher's solver": f"{solver}, guidance {diffusion.guidance_scale:g}",
    }
    if facts.is_student:
        student = config.student
        rows |= {
            "points": f"{', '.join(map(str, student.points))} of the teacher's {diffusion.steps}",
            "target": {"x0": "predicted x0", "xt": "noisy points"}[student.target],
            "mask, history layers, heads": f"{student.mask}, {student.history_layers}, {student.heads}",
        }
    if not facts.converted:
        images = CREDITS.get(config.data.source, config.data.source)
        rows["images"] = " ".join(filter(None, (images, config.data.name)))
        rows |= _training(facts)
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _training(facts: Facts) -> dict[str, str]:
    """Rows on how it was trained; of a fine-tuned student on the fine-tune, and what that began with."""
    config, tuned = facts.config, _is_finetuned(facts)
    training = config.finetune if tuned else config.distill if facts.is_student else config.teacher
    words = (
        f"{_count(training.steps, 'step')} of batch {training.batch_size}, {_optimizer(training.optimizer)}, running "
        f"average {training.optimizer.ema:g}, seed {config.seed}"
    )
    if not tuned:
        return {"training": words}
    start = f"`{facts.start}`, " if facts.start else ""
    blocks = f"blocks {', '.join(map(str, training.layers))}" if training.layers else "all blocks"
    return {
        "fine-tuned from": f"{start}SHA-256 of the arrays `{config.inputs.start}`",
        "fine-tune": words,
        "discriminator": (
            f"heads on {blocks} of the teacher, weight {training.weight:g} after {_count(training.warmup, 'step')}, "
            f"{_optimizer(training.discriminator_optimizer)}"
        ),
    }


def _optimizer(settings: ml_collections.ConfigDict) -> str:
    return f"{settings.name}, learning rate {settings.learning_rate:g} ({settings.schedule})"


def _origin(facts: Facts) -> str:
    """The weights' hash, and the teacher's source."""
    part = {"ema": "the running average of the weights", "params": "the weights of the last step, not averaged"}
    words = f"Exported by ard_jax: {part[facts.part]}, SHA-256 of the arrays `{facts.sha256}`."
    if facts.source:
        which = "They" if facts.converted else "The teacher's weights"
        words += f" {which} come from `{_origin_name(facts.source)}`, SHA-256 `{facts.source.get('sha256')}`."
    elif facts.is_student:
        known = facts.source is not None
        words += " The teacher was trained with ard_jax." if known else " Where its teacher comes from is not known."
    return words


def _license_words(license: str) -> str:
    if license:
        return f"`{license}`, the licence of the teacher's weights."
    return (
        "Unknown: nobody said under which licence the teacher's weights are. Find that out before you share these, "
        "which come from them."
    )


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
