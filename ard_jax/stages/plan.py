"""Says what a run will cost, before a chip is rented: does it fit, how fast can it be, how many chip-hours, how much
disk.

--topology v5e:4x4   a TPU slice by chip and shape (v4, v5e, v5p, v6e); needs libtpu: pip install -e '.[tpu]'
--topology cpu       this machine, which needs nothing

Compiles the distillation step, the student's sampler and the trajectory step of the config ahead of time, for devices
that need not be there, and the text encoder where networks are told captions; the teacher's training is estimated.
What has a `dir` (teacher.dir, trajectories.dir), and a store that nothing reads (distill.online), are not counted; nor
are the chip-hours and the disk of the stages captions and encode.
Times are bounds: what the FLOPs, the bytes of memory and the bytes between chips take at the chips' peak rates,
whichever is longest. A training step that does not fit is tried with other settings of model.remat, the mesh and
accumulate, until one fits. XL/2 takes up to a minute a program on two cores.

--json FILE          writes the figures as one line of JSON, too; where nothing fits, those of the programs so far
--finetune           plans the adversarial fine-tune as well
--search             looks for the settings with the least bound, for each training step, and prints their flags; up to
                     ten more programs a step
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import ml_collections

from ard_jax.files import write_text
from ard_jax.parallel import check_batch
from ard_jax.plan import recipe
from ard_jax.plan.cost import Cost, measure
from ard_jax.plan.programs import caption_step, for_platform, sampler, trajectory_step
from ard_jax.plan.search import MAKERS, Candidate, candidate_of, least, try_settings
from ard_jax.plan.topology import Slice, find_slice


def run(
    config: ml_collections.ConfigDict, topology: str, json_file: pathlib.Path | None, finetune: bool, search: bool
) -> None:
    """Prints the plan.

    Raises:
        UserError: the topology is not known, libtpu is missing, mesh and batch do not fit it, or the student is none
            that can be fine-tuned.
    """
    where = find_slice(topology)
    config = for_platform(config, where.platform, where.chip)
    works = {stage: MAKERS[stage](config, where) for stage in ("distill", *(["finetune"] if finetune else []))}
    for stage, work in works.items():
        check_batch(config[stage], work.mesh, stage)
    print("\n".join(_heading(config, where)), flush=True)
    advice: dict[str, Candidate] = {}
    steps: dict[str, Cost] = {}
    fits_as_given = True
    for stage, work in works.items():
        steps[stage] = measure(work, where.chip)
        print("\n".join(_program_lines(steps[stage])), flush=True)
        fits_as_given &= steps[stage].fits
        if search or not steps[stage].fits:
            tried = try_settings(config, where, stage, steps[stage], thorough=search)
            print("\n".join(_search_lines(stage, tried)), flush=True)
            best = least(tried)
            if best is None:  # there is no recipe, but a program that reads the file shall not find that of before
                figures = {"programs": _program_figures(steps.values()), "chip_hours": {}, "storage": {}}
                return _write_json(json_file, topology, False, advice, figures)
            if best != tried[0]:
                advice[stage], steps[stage] = best
    if "distill" in advice:
        config = advice["distill"].apply(config, "distill")
    others = []
    for program in (sampler, trajectory_step):
        others.append(measure(program(config, where), where.chip))
        print("\n".join(_program_lines(others[-1])), flush=True)
    encoding = caption_step(config, where)
    captions = [] if encoding is None else [measure(encoding, where.chip)]
    for cost in captions:
        print("\n".join(_program_lines(cost)), flush=True)
    print("\n".join(_recipe_lines(config, where, steps, others)), flush=True)
    fits_as_given &= all(cost.fits for cost in (*others, *captions))
    figures = _figures(config, steps, [*others, *captions])
    _write_json(json_file, topology, fits_as_given, advice, figures)


def _write_json(
    file: pathlib.Path | None, topology: str, fits_as_given: bool, advice: dict[str, Candidate], figures: dict[str, Any]
) -> None:
    """Writes the plan as one line of JSON, if a file is given."""
    if file:
        head = {"topology": topology, "fits_as_given": fits_as_given}
        head |= {"advice": {stage: candidate._asdict() for stage, candidate in advice.items()}}
        write_text(file, json.dumps(head | figures) + "\n")


def _heading(config: ml_collections.ConfigDict, where: Slice) -> list[str]:
    chip, settings = where.chip, candidate_of(config, where, "distill")
    return [
        f"{where.name}: {len(where.devices)} devices; each {chip.flops / 1e12:.4g} TFLOP/s, "
        f"{_gb(chip.hbm_bytes)} at {_gb(chip.hbm_bandwidth)}/s, links {_gb(chip.ici_bandwidth)}/s",
        f"student of {recipe.parameters(config) / 1e6:.1f} M parameters, {config.model.dtype}, batch "
        f"{config.distill.batch_size}; remat {settings.remat}, data {settings.data}, fsdp {settings.fsdp}, "
        f"tensor {settings.tensor}, accumulate {settings.accumulate}",
    ]


def _program_lines(cost: Cost) -> list[str]:
    """One program's part of the report."""
    name = f"{cost.work.name}, {cost.work.rows} rows on {cost.work.mesh.size} devices"
    if cost.memory is None:
        return [
            "",
            name,
            f"  DOES NOT FIT: temporaries alone want {cost.needed / 1e9:.2f} of {_gb(cost.chip.hbm_bytes)}",
        ]
    spare, memory, seconds = cost.chip.hbm_bytes - cost.needed, cost.memory, cost.seconds
    verdict = f"fits, {_gb(spare)} to spare" if cost.fits else f"DOES NOT FIT, {_gb(-spare)} too much"
    by = max(seconds, key=seconds.__getitem__)
    model, counted = cost.work.flops / cost.work.mesh.size, cost.flops
    lines = [
        "",
        f"{name}: {verdict}",
        f"  memory a chip    {_gb(cost.needed)}: arguments {_gb(memory.arguments)}, temporaries "
        f"{_gb(memory.temporaries)}, results {_gb(memory.results)}, code {_gb(memory.code)}",
        f"  FLOPs a chip     {counted / 1e12:.4g} T counted, {model / 1e12:.4g} T by formula ({counted / model:.2f}×)",
        f"  bytes a chip     {_gb(cost.bytes)} between memory and cores",
    ]
    lines += [
        f"  {kind:<18} {traffic.count:>6} × , {_gb(traffic.bytes)} in all, {_gb(traffic.sent)} to be sent by each chip"
        for kind, traffic in sorted(cost.traffic.items())
    ]
    return [
        *lines,
        f"  bound            {_milliseconds(cost.bound)} by {by} (compute {_milliseconds(seconds['compute'])}, memory "
        f"{_milliseconds(seconds['memory'])}, links {_milliseconds(seconds['links'])})",
        f"  utilisation      at most {cost.utilisation:.0%} of peak, {cost.work.rows / cost.bound:.4g} rows/s",
        f"  compiled in      {cost.compile_seconds:.0f} s",
    ]


def _search_lines(stage: str, tried: list[tuple[Candidate, Cost]]) -> list[str]:
    """What was compiled for a stage, and what to take."""
    best = least(tried)
    if best is None:
        return ["", "Nothing that was tried fits: take more chips, larger ones, or a smaller batch."]
    lines = ["", f"{stage}: {len(tried)} settings compiled"]
    for candidate, cost in tried:
        said = _milliseconds(cost.bound) if cost.fits else "does not fit"
        lines.append(
            f"  remat {candidate.remat:<5} data {candidate.data:<4} fsdp {candidate.fsdp:<4} tensor "
            f"{candidate.tensor:<2} accumulate {candidate.accumulate:<3} {said}"
        )
    if best == tried[0]:
        return [*lines, "The settings as given are the best of them."]
    given = tried[0][1]
    compared = f"; as given, {best[1].bound / given.bound:.0%} of that speed" if given.fits else ""
    return [*lines, f"What to take: {best[0].flags(stage)}{compared}", *_program_lines(best[1])]


def _recipe_lines(
    config: ml_collections.ConfigDict, where: Slice, steps: dict[str, Cost], others: list[Cost]
) -> list[str]:
    """The whole recipe's part of the report."""
    hours = recipe.chip_hours(config, steps, *others)
    amounts = {
        "teacher": f"{config.teacher.steps} steps of {config.teacher.batch_size}, at the distillation's utilisation",
        "trajectories": f"{config.trajectories.count} trajectories",
        "distill": f"{config.distill.steps} steps of {config.distill.batch_size}",
        "finetune": f"{config.finetune.steps} steps of {config.finetune.batch_size}",
        "sample": f"{config.sample.count} images a student",
    }
    lines = ["", "the whole recipe, at least"]
    for stage, spent in hours.items():
        lines.append(
            f"  {stage:<16} {spent:>10.4g} chip-hours {spent / len(where.devices):>10.4g} hours   {amounts[stage]}"
        )
    lines.append("on disk")
    for folder, size in _storage(config, steps).items():
        what = "the store" if folder == "trajectories" else f"{recipe.kept_checkpoints(config, folder)} checkpoints"
        lines.append(f"  {folder:<16} {_gb(size):>13}   {what}")
    return lines


def _figures(config: ml_collections.ConfigDict, steps: dict[str, Cost], others: list[Cost]) -> dict[str, Any]:
    """The report as plain values: bytes, FLOPs, seconds and hours."""
    return {
        "programs": _program_figures([*steps.values(), *others]),
        "chip_hours": recipe.chip_hours(config, steps, *others[:2]),
        "storage": _storage(config, steps),
    }


def _program_figures(costs: Iterable[Cost]) -> dict[str, Any]:
    """Figures of each program, by its name."""
    return {
        cost.work.name: {
            "rows": cost.work.rows,
            "devices": cost.work.mesh.size,
            "fits": cost.fits,
            "memory": cost.memory._asdict() if cost.memory else None,
            "needed": cost.needed,
            "available": cost.chip.hbm_bytes,
            "flops": cost.flops,
            "model_flops": cost.work.flops / cost.work.mesh.size,
            "bytes": cost.bytes,
            "collectives": {kind: traffic._asdict() for kind, traffic in cost.traffic.items()},
            "seconds": cost.seconds,
            "bound": cost.bound,
            "utilisation": cost.utilisation,
            "compile_seconds": cost.compile_seconds,
        }
        for cost in costs
    }


def _storage(config: ml_collections.ConfigDict, steps: dict[str, Cost]) -> dict[str, int]:
    return recipe.storage(config, {stage: cost.work for stage, cost in steps.items()})


def _gb(amount: float) -> str:
    return f"{amount / 1e9:.2f} GB" if amount >= 1e7 else f"{amount / 1e6:.3f} MB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
