"""Says what a run will cost, before a chip is rented: does it fit, how fast can it be, how many chip-hours, how much
disk.

--topology v5e:4x4   a TPU slice by chip and shape (v4, v5e, v5p, v6e); needs libtpu: pip install -e '.[tpu]'
--topology cpu       this machine, which needs nothing

Compiles the distillation step, the student's sampler and the trajectory step of the config ahead of time, for devices
that need not be there, and the text encoder where networks are told captions; the teacher's training is estimated.
Times are bounds: what the FLOPs, the bytes of memory and the bytes between chips take at the chips' peak rates,
whichever is longest. A training step that does not fit is tried with other settings of model.remat, mesh.fsdp and
distill.accumulate. XL/2 takes about two minutes a program on two cores.

--json FILE          writes the figures as one line of JSON, too
--finetune           plans the adversarial fine-tune as well
"""

import json
import pathlib
from typing import Any

import ml_collections

from ard_jax.files import write_text
from ard_jax.parallel import check_batch
from ard_jax.plan import ladder, recipe
from ard_jax.plan.cost import Cost, measure
from ard_jax.plan.programs import caption_step, finetune_step, for_platform, sampler, training_step, trajectory_step
from ard_jax.plan.topology import Slice, find_slice


def run(config: ml_collections.ConfigDict, topology: str, json_file: pathlib.Path | None, finetune: bool) -> None:
    """Prints the plan.

    Raises:
        UserError: the topology is not known, libtpu is missing, mesh and batch do not fit it, or the student is none
            that can be fine-tuned.
    """
    where = find_slice(topology)
    config = for_platform(config, where.platform)
    makers = {"distill": training_step} | ({"finetune": finetune_step} if finetune else {})
    works = {stage: make(config, where) for stage, make in makers.items()}
    for stage, work in works.items():
        check_batch(config[stage], work.mesh, stage)
    print("\n".join(_heading(config, where)), flush=True)
    first = measure(works["distill"], where.chip)
    print("\n".join(_program_lines(first)), flush=True)
    advice = None
    if not first.fits:
        advice = ladder.cheapest(config, where, first)
        print("\n".join(_advice_lines(advice)), flush=True)
        if advice is None:
            return
        config, first = advice[0].apply(config), advice[1]
    steps, others = {"distill": first}, []
    if finetune:
        steps["finetune"] = measure(finetune_step(config, where), where.chip)
        print("\n".join(_program_lines(steps["finetune"])), flush=True)
    for program in (sampler, trajectory_step):
        others.append(measure(program(config, where), where.chip))
        print("\n".join(_program_lines(others[-1])), flush=True)
    encoding = caption_step(config, where)
    captions = [] if encoding is None else [measure(encoding, where.chip)]
    for cost in captions:
        print("\n".join(_program_lines(cost)), flush=True)
    print("\n".join(_recipe_lines(config, where, steps, others)), flush=True)
    if json_file:
        line = json.dumps(_figures(config, topology, advice, steps, [*others, *captions])) + "\n"
        write_text(json_file, line)


def _heading(config: ml_collections.ConfigDict, where: Slice) -> list[str]:
    chip, settings = where.chip, ladder.rung_of(config, where)
    return [
        f"{where.name}: {len(where.devices)} devices; each {chip.flops / 1e12:.4g} TFLOP/s, "
        f"{_gb(chip.hbm_bytes)} at {_gb(chip.hbm_bandwidth)}/s, links {_gb(chip.ici_bandwidth)}/s",
        f"student of {recipe.parameters(config) / 1e6:.1f} M parameters, {config.model.dtype}, batch "
        f"{config.distill.batch_size}; remat {settings.remat}, fsdp {settings.fsdp}, accumulate {settings.accumulate}",
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


def _advice_lines(advice: tuple[ladder.Rung, Cost] | None) -> list[str]:
    if advice is None:
        return ["", "Nothing that was tried fits: take more chips, larger ones, or a smaller batch."]
    return ["", f"What fits: {advice[0].flags}", *_program_lines(advice[1])]


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


def _figures(
    config: ml_collections.ConfigDict,
    topology: str,
    advice: tuple[ladder.Rung, Cost] | None,
    steps: dict[str, Cost],
    others: list[Cost],
) -> dict[str, Any]:
    """The report as plain values: bytes, FLOPs, seconds and hours."""
    programs = {
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
        for cost in (*steps.values(), *others)
    }
    return {
        "topology": topology,
        "fits_as_given": advice is None,
        "advice": advice[0]._asdict() if advice else None,
        "programs": programs,
        "chip_hours": recipe.chip_hours(config, steps, *others[:2]),
        "storage": _storage(config, steps),
    }


def _storage(config: ml_collections.ConfigDict, steps: dict[str, Cost]) -> dict[str, int]:
    return recipe.storage(config, {stage: cost.work for stage, cost in steps.items()})


def _gb(amount: float) -> str:
    return f"{amount / 1e9:.2f} GB" if amount >= 1e7 else f"{amount / 1e6:.3f} MB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
