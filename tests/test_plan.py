"""What a plan counts, against programs whose counts are known, and what it says."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from pipeline_fixtures import ROOT, SMOKE, run, sentence

from ard_jax.build import example_shape, make_student, make_teacher
from ard_jax.chips import CHIPS, GIB, chip_of
from ard_jax.errors import UserError
from ard_jax.methods import finetuned_config, make_finetune_method
from ard_jax.models import count_parameters, jaxprs
from ard_jax.models.flops import student_macs, teacher_macs
from ard_jax.plan import hlo, recipe
from ard_jax.plan.cost import Cost, Memory, measure, needed_bytes
from ard_jax.plan.programs import caption_step, finetune_step, for_platform, sampler, training_step, trajectory_step
from ard_jax.plan.search import MAKERS, candidate_of, candidates, least, try_settings
from ard_jax.plan.topology import SHAPES, Slice, find_slice
from ard_jax.runner import with_settings
from ard_jax.stages import plan
from configs import imagenet256, pixart_sigma_1024, smoke, smoke_captions

IMAGENET = str(ROOT / "configs" / "imagenet256.py")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"
)


def here(devices: int = 1) -> Slice:
    """A slice of this machine with round rates."""
    return Slice("cpu", jax.devices("cpu")[:devices], CHIPS["v5e"], "cpu")


# ---------------------------------------------------------------------------------------------------- the chips' table


def test_the_table_of_chips():
    kinds = {
        "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p",
        "TPU v6 lite": "v6e", "TPU v6e": "v6e", "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA H100 80GB HBM3": "H100",
    }  # fmt: skip
    assert {kind: chip_of(kind) for kind in kinds} == {kind: CHIPS[name] for kind, name in kinds.items()}
    dense = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H200 NVL": 835e12, "NVIDIA H200": 989e12}
    assert {kind: chip_of(kind).flops for kind in dense} == dense
    for other in ("cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H200 MIG 1g.18gb", "TPU v4 lite"):
        assert chip_of(other) is None  # a part of a chip, or another: measured
    assert set(SHAPES) <= set(CHIPS)
    assert CHIPS["v5e"] == (197e12, 15.75 * GIB, 819e9, 200e9)
    for chip in CHIPS.values():  # the ridge of the roofline, in FLOPs a byte, and links slower than memory
        assert 100 < chip.flops / chip.hbm_bandwidth < 600 and chip.ici_bandwidth < chip.hbm_bandwidth


# ------------------------------------------------------------------------------------------------ collectives in HLO

COLLECTIVES = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import Mesh, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))

@jax.jit
@partial(jax.shard_map, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(), check_vma=False)
def program(x):
    def turn(total, _):
        return jax.lax.psum(total * 1.5, "a"), None  # (16, 128) float32: 8192 bytes, in groups of 4

    total, _ = jax.lax.scan(turn, x, None, length=7)
    gathered = jax.lax.all_gather(total, "b", tiled=True)  # (32, 128): 16384 bytes, in groups of 2
    shifted = jax.lax.ppermute(gathered, "a", [(0, 1), (1, 2), (2, 3), (3, 0)])
    return jax.lax.psum_scatter(shifted, ("a", "b"), tiled=True)  # in groups of 8

print(program.lower(jax.ShapeDtypeStruct((128, 128), jnp.float32)).compile().as_text())
"""


def test_collectives_of_a_compiled_program():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    ended = subprocess.run(
        [sys.executable, "-c", COLLECTIVES], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    found = hlo.collectives(hlo.parse(ended.stdout))
    assert found == {
        "all-reduce": hlo.Traffic(7, 7 * 8192, 7 * 8192 * 2 * 3 / 4),
        "all-gather": hlo.Traffic(1, 16384, 16384 / 2),
        "collective-permute": hlo.Traffic(1, 16384, 16384),
        "reduce-scatter": hlo.Traffic(1, 16384, 16384 * 7 / 8),
    }


TPU_TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=16

%condition (state: (s32[], bf16[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(22)
  %state = (s32[]{:T(128)}, bf16[8]{0:T(128)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %bound), direction=LT
}

%body (state: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %state = (s32[]{:T(128)}, bf16[8]{0:T(128)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[8]{0:T(128)} get-tuple-element(%state), index=1
  %sum = bf16[8]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups=mesh['p'=4,'q'=4] {'p','q':(1)2}, to_apply=%add
  %part.1 = bf16[8]{0:T(128)} fusion(%x), kind=kCustom, calls=%first
  %part.2 = bf16[8]{0:T(128)} fusion(%x), kind=kCustom, calls=%second
  ROOT %both = (s32[]{:T(128)}, /*index=1*/bf16[8]{0:T(128)}) tuple(%turn, %sum)
}

%first (p: bf16[8]) -> bf16[128] {
  %p = bf16[8]{0:T(128)} parameter(0)
  ROOT %g = bf16[128]{0} all-gather(%p), channel_id=2, replica_groups=[1,16]<=[16], frontend_attributes={chain_id="0"}
}

%second (p: bf16[8]) -> bf16[128] {
  %p = bf16[8]{0:T(128)} parameter(0)
  ROOT %g = bf16[128]{0} all-gather(%p), channel_id=2, replica_groups=[1,16]<=[16], frontend_attributes={chain_id="0"}
}

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8]{0:T(128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8]{0:T(128)}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, bf16[8]{0:T(128)}) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[8]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


def test_collectives_as_tpu_s_compiler_writes_them():
    """Loops whose turns only their condition tells, groups as axes of a mesh, a gather spread over two fusions."""
    found = hlo.collectives(hlo.parse(TPU_TEXT))
    assert found["all-reduce"] == hlo.Traffic(22, 22 * 16, 22 * 16 * 2 * 7 / 8)
    assert found["all-gather"] == hlo.Traffic(22, 22 * 256, 22 * 256 * 15 / 16)
    assert hlo.traffic_in_all(found.values()) == 22 * 28 + 22 * 240
    # the order of a mesh's devices does not change how many of them gather
    ordered = TPU_TEXT.replace("[1,16]<=[16]", "mesh['p'=4,'q'=4], device_ids=([4,4]T(1,0)) {'q'}")
    assert hlo.collectives(hlo.parse(ordered))["all-gather"] == hlo.Traffic(22, 22 * 64, 22 * 64 * 3 / 4)
    # a reduce-scatter is written as a slice of an all-reduce
    scattered = TPU_TEXT.replace(
        "(s32[]{:T(128)}, /*index=1*/bf16[8]{0:T(128)}) tuple(%turn, %sum)", "bf16[2]{0} dynamic-slice(%sum, %turn)"
    )
    found = hlo.collectives(hlo.parse(scattered))
    assert found["reduce-scatter"] == hlo.Traffic(22, 22 * 16, 22 * 16 * 7 / 8) and "all-reduce" not in found


def test_bytes_of_a_compiled_program():
    """A loop over a stack reads a slice of it a turn and writes a slice, not all of it."""

    def program(stack, x):
        def turn(x, layer):
            x = jnp.tanh(x + layer)
            return x, x

        return jax.lax.scan(turn, x, stack)

    stack, x = jax.ShapeDtypeStruct((50, 4096), jnp.float32), jax.ShapeDtypeStruct((4096,), jnp.float32)
    moved = hlo.memory_bytes(hlo.parse(jax.jit(program).lower(stack, x).compile().as_text()))
    once = 50 * 4096 * 4
    assert 3 * once <= moved <= 14 * once  # whole stacks in every turn would be a hundred


def test_bytes_of_a_product():
    a = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    text = jax.jit(lambda a: a @ a.T).lower(a).compile().as_text()
    assert 4 * (256 * 512 + 256 * 256) <= hlo.memory_bytes(hlo.parse(text)) <= 4 * (4 * 256 * 512 + 256 * 256)


# --------------------------------------------------------------------------------------------------------------- FLOPs


def small(**changes):
    config = smoke.get_config()
    config.model.update(changes)
    return for_platform(config, "cpu")


def counted(work):
    return jaxprs.macs(work.function.trace(*work.arguments).jaxpr)


def test_a_step_is_three_forwards_and_rematerialisation_a_fourth():
    rows = smoke.get_config().distill.batch_size
    forward = student_macs(make_student(small()), example_shape(small())) * rows
    step = training_step(small(remat="none"), here())
    assert step.flops == 6 * forward
    # gradients by the images, which nobody wants, are not computed; times are the same for all rows
    assert 2.7 * forward < counted(step) < 3 * forward
    full = counted(training_step(small(remat="full"), here()))
    assert 3.5 * forward < full < 4.1 * forward
    microbatches = small(remat="none")
    microbatches.distill.accumulate = 2
    assert counted(training_step(microbatches, here())) == pytest.approx(counted(step), rel=0.02)


def test_a_solve_costs_what_the_formula_says():
    work = trajectory_step(small(), here())
    calls = 2 * 5
    rows = small().trajectories.batch_size
    assert work.flops == 2 * calls * teacher_macs(make_teacher(small()), example_shape(small())) * rows
    assert 2 * counted(work) == pytest.approx(work.flops, rel=0.001)
    draw = sampler(small(), here())
    assert 2 * counted(draw) == pytest.approx(draw.flops, rel=0.05)  # a block's time is embedded once for all rows


def test_a_fine_tune_s_step_has_the_teacher_and_the_discriminator():
    config = small(remat="none")
    work = finetune_step(config, here())
    assert (
        work.flops
        == config.finetune.batch_size
        * make_finetune_method(finetuned_config(config, config), make_teacher(config), (0, 1)).flops
    )
    # spectral norms are the batch's, and W's two gradients are taken apart
    assert 2 * counted(work) == pytest.approx(work.flops, rel=0.1)
    config.finetune.layers = (0,)
    assert counted(finetune_step(config, here())) < 0.8 * counted(work)
    config.student.kind = "deterministic"
    with pytest.raises(
        UserError, match="is of the kind 'deterministic', but the fine-tune trains students of the kind"
    ):
        finetune_step(config, here())


def test_the_paper_s_step_counts_no_more_than_three_forwards():
    """3.1 × 480 GMAC × batch without remat; counted in a trace of the whole step."""
    config = for_platform(imagenet256.get_config(), "tpu")
    assert config.model.dtype == "bfloat16"
    config.model.remat = "none"
    work = training_step(config, here())
    assert 2.9 * 480e9 * 64 < counted(work) <= 3.1 * 480e9 * 64


# ------------------------------------------------------------------------------------------- what fits, and what would


def cost(needed, work=None, chip=CHIPS["v5e"], fits=True):
    work = work or training_step(small(), here())
    memory = Memory(0.0, needed, 0.0, 0.0) if fits else None
    return Cost(work, chip, memory, needed, 197e12, 819e7, {"all-reduce": hlo.Traffic(1, 1.0, 2e9)}, 0.0)


def test_the_roofline():
    made = cost(1e9)
    assert made.seconds == {"compute": 1.0, "memory": 0.01, "links": 0.01} and made.bound == 1.0
    assert made.fits and not cost(15.76 * GIB).fits and not cost(1.0, fits=False).fits
    assert made.utilisation == pytest.approx(made.work.flops / 197e12)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (27.43G) "
            "exceeds available HBM (15.75G).",
            27.43 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.5M of 15.75G hbm.", 512.5 * 2**20),
        ("INTERNAL: Mosaic failed to compile", 0),
    ],
)
def test_errors_about_memory(message, needed):
    assert needed_bytes(message) == needed


def test_the_first_that_fits_is_taken():
    """A compiler that gives up on everything but full remat in halves is asked little, and its answer is taken."""
    config, asked = small(remat="none"), []

    def compiled(work, chip):
        asked.append(work)
        return cost(40 * GIB / (8 if len(asked) > 2 else 1), work)

    tried = try_settings(config, here(), "distill", cost(40 * GIB), False, compiled)
    candidate, best = least(tried)
    assert best.fits and len(asked) == 3 == len(tried) - 1 and tried[-1] == (candidate, best)
    # microbatches of the policy that failed are tried as soon as they may fit: 40 GiB need four of them
    assert (candidate.remat, candidate.accumulate) != ("none", 1)
    assert f"--config.model.remat={candidate.remat} " in candidate.flags("distill")
    assert candidate.apply(config, "distill").model.remat == candidate.remat and config.model.remat == "none"
    hopeless = try_settings(config, here(), "distill", cost(4000 * GIB), False, lambda work, _: cost(4000 * GIB, work))
    assert least(hopeless) is None


def test_a_kernel_s_metadata_may_stand_on_several_lines():
    text = """HloModule jit_f, num_partitions=1

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %kernel = f32[4]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
  "name": "splash"
}}, backend_config={}
  ROOT %sum = f32[4]{0} add(%kernel, %a)
}
"""
    main = hlo.parse(text).computations["main"]
    assert [*main] == ["a", "kernel", "sum"] and main.root.name == "sum"


@needs_libtpu
@pytest.mark.parametrize(("stage", "remat"), [("distill", "none"), ("finetune", "dots")])
def test_the_least_bound_is_found(stage, remat, monkeypatch):
    """Among all settings for sixteen chips, by a few questions to a compiler."""
    where, config, asked = find_slice("v5e:4x4"), small(remat=remat, hidden_size=64, num_heads=4), []
    config[stage].batch_size = 64
    every = list(candidates(config, where, stage))
    assert len(set(every)) == len(every) > 30
    assert all(math.prod(candidate[1:4]) == 16 and 64 % candidate.fsdp == 0 for candidate in every)
    assert {candidate.tensor for candidate in every} == {1, 2, 4}  # within a host
    assert {candidate.accumulate for candidate in every} == ({1} if stage == "finetune" else {1, 2, 4, 8, 16})

    # bytes of temporaries, and bytes moved, by remat: `none` does not fit before four microbatches, `dots` before two
    needed = {"none": 60 * GIB, "dots": 30 * GIB, "full": 15 * GIB}
    moved = {"none": 4e9, "dots": 2e9, "full": 3e9}
    policy = {}

    def maker(config, where):
        work = made(config, where)
        policy[id(work.function)] = config.model.remat, config[stage].accumulate
        return work

    def compiled(work, chip):
        remat, accumulate = policy[id(work.function)]
        memory = Memory(0.0, needed[remat] / accumulate, 0.0, 0.0)
        asked.append((remat, accumulate))
        return Cost(work, chip, memory, memory.total, 1e6, moved[remat], {}, 0.0)

    made = MAKERS[stage]
    monkeypatch.setitem(MAKERS, stage, maker)
    first = compiled(maker(config, where), where.chip)
    tried = try_settings(config, where, stage, first, True, compiled)
    assert tried[0] == (candidate_of(config, where, stage), first)
    best, found = least(tried)
    if stage == "distill":
        assert asked == [("none", 1), ("dots", 1), ("full", 1), ("dots", 2)]  # `none` moves more than the best
        assert (best.remat, best.accumulate) == ("dots", 2) and found.bound == pytest.approx(2e9 / 819e9)
    else:  # in which microbatches may not be
        assert asked == [("dots", 1), ("none", 1), ("full", 1), ("dots", 1)] and best.remat == "full"
    splits = [candidate.split for candidate, _ in tried]
    assert splits[0] == 1 and splits[1:] == [16] * (len(splits) - 1)  # what did not fit is split further


def test_a_search_prints_its_flags(tmp_path, monkeypatch, capsys):
    """Of a step whose given policy is slower than another, which the rest of the plan then has."""
    config, file = small(remat="full"), tmp_path / "plan.json"
    monkeypatch.setattr(plan, "find_slice", lambda _: here())
    monkeypatch.setattr(plan, "measure", lambda work, chip: cost(1e9, work)._replace(bytes=2 * 819e9))
    given, step = candidate_of(config, here(), "distill"), training_step(config, here())
    faster = given._replace(remat="none")
    tried = [(given, plan.measure(step, CHIPS["v5e"])), (faster, cost(1e9, step))]
    monkeypatch.setattr(plan, "try_settings", lambda *_, thorough: tried if thorough else [])
    plan.run(config, "cpu", file, False, True)
    said, found = capsys.readouterr().out, json.loads(file.read_text())
    assert f"What to take: {faster.flags('distill')}; as given, 50% of that speed" in said
    assert found["fits_as_given"] and found["advice"] == {"distill": faster._asdict()}
    assert found["programs"]["training step"]["bound"] == 1.0


@pytest.mark.parametrize("fitting", [(), ("training step",)])
def test_where_nothing_fits_the_file_says_so(fitting, tmp_path, monkeypatch, capsys):
    """And holds no plan of before, which a program would take for this one."""
    config, file = small(), tmp_path / "plan.json"
    file.write_text('{"fits_as_given": true}')
    monkeypatch.setattr(plan, "find_slice", lambda _: here())
    monkeypatch.setattr(plan, "measure", lambda work, _: cost(1e9 if work.name in fitting else 4000 * GIB, work))
    monkeypatch.setattr(plan, "try_settings", lambda config, where, stage, first, **_: [
        (candidate_of(config, where, stage), first)
    ])  # fmt: skip
    plan.run(config, "cpu", file, True, False)
    assert "Nothing that was tried fits: take more chips" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert (found["topology"], found["fits_as_given"], found["advice"]) == ("cpu", False, {})
    verdicts = {name: program["fits"] for name, program in found["programs"].items()}
    assert verdicts == ({"training step": True, "fine-tune step": False} if fitting else {"training step": False})
    assert found["chip_hours"] == found["storage"] == {}  # as printed: there is no recipe of what does not fit


@pytest.mark.parametrize("program", ["sampler", "trajectory step", "text encoder"])
def test_a_program_beside_the_training_that_does_not_fit_is_no_plan_that_fits(program, tmp_path, monkeypatch):
    config, file = for_platform(smoke_captions.get_config(), "cpu"), tmp_path / "plan.json"
    monkeypatch.setattr(plan, "find_slice", lambda _: here())
    monkeypatch.setattr(plan, "caption_step", lambda *_: training_step(config, here())._replace(name="text encoder"))
    monkeypatch.setattr(plan, "measure", lambda work, _: cost(4000 * GIB if program in work.name else 1e9, work))
    plan.run(config, "cpu", file, False, False)
    found = json.loads(file.read_text())
    assert not found["fits_as_given"]
    assert (
        [name for name, one in found["programs"].items() if not one["fits"]]
        == [name for name in found["programs"] if program in name]
        != []
    )


def test_the_recipe_leaves_out_what_its_run_does_not_make():
    """The store where the teacher is solved inside of the step, unless a fine-tune reads it; and what has a `dir`."""

    def counted_stages(*stages, **changes):
        config = with_settings(small(), {key.replace("_", "."): value for key, value in changes.items()})
        steps = {stage: cost(1e9, MAKERS[stage](config, here())) for stage in stages}
        others = (cost(1e9, program(config, here())) for program in (sampler, trajectory_step))
        hours = recipe.chip_hours(config, steps, *others)
        disk = recipe.storage(config, {stage: made.work for stage, made in steps.items()})
        assert hours.keys() - {"sample"} == disk.keys()
        return set(disk)

    every = {"teacher", "trajectories", "distill"}
    assert counted_stages("distill") == every
    assert counted_stages("distill", distill_online=True) == every - {"trajectories"}
    assert counted_stages("distill", "finetune", distill_online=True) == {*every, "finetune"}
    assert counted_stages("distill", teacher_dir="elsewhere") == every - {"teacher"}
    made = counted_stages("distill", "finetune", trajectories_dir="elsewhere")
    assert made == {*every, "finetune"} - {"trajectories"}


def test_the_recipe_s_storage():
    config = imagenet256.get_config()
    disk = recipe.storage(config, {"distill": training_step(config, here()), "finetune": finetune_step(config, here())})
    assert disk["trajectories"] == 2_560_000 * (5 * 32 * 32 * 4 * 2 + 16)
    parameters = recipe.parameters(config)
    assert disk["distill"] == pytest.approx(2 * 16 * parameters, rel=1e-6)  # four trees in float32, two checkpoints
    state = finetune_step(config, here()).arguments[0]
    heads = count_parameters(state.others)  # with Adam's two averages and one vector a kernel
    assert heads > 28 * 1152**2 and 16 * parameters + 12 * heads < disk["finetune"] / 2 < 16 * parameters + 13 * heads


@pytest.mark.parametrize(("name", "remat"), [("v4", "dots"), ("v5e", "dots"), ("v5p", "dots"), ("v6e", "full")])
def test_the_paper_s_recipe_keeps_what_the_chip_fetches_in_time(name, remat):
    """Searched for v6e:4x4: 31.8 ms with dots, 26.9 with full, which `auto` must come within 85 % of."""
    given = imagenet256.get_config()
    assert for_platform(given, "tpu", CHIPS[name]).model.remat == remat and given.model.remat == "auto"
    given.model.remat = "none"
    assert for_platform(given, "tpu", CHIPS[name]).model.remat == "none"


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_a_plan_for_this_machine(tmp_path):
    file = tmp_path / "plan.json"
    outcome = run("plan", "--config", SMOKE, "--topology", "cpu", "--json", file, "--finetune")
    assert outcome.status == 0, outcome.err
    assert "training step, 8 rows on 1 devices: fits" in outcome.out and "chip-hours" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 120
    assert "compiling the training step" in outcome.err
    found = json.loads(file.read_text())
    stages = ["teacher", "trajectories", "distill", "finetune", "sample"]
    assert found["fits_as_given"] and list(found["chip_hours"]) == stages
    assert set(found["storage"]) == {*stages} - {"sample"}
    tune, steps = found["programs"]["fine-tune step"], small().finetune.steps
    assert found["chip_hours"]["finetune"] == pytest.approx(steps * tune["bound"] / 3600)
    assert tune["needed"] > found["programs"]["training step"]["needed"]
    step = found["programs"]["training step"]
    assert step["model_flops"] == 6 * 8 * student_macs(make_student(small()), example_shape(small()))
    assert step["needed"] == sum(step["memory"].values()) < step["available"]
    state = recipe.state_bytes(training_step(small(), here()).arguments[0])
    assert state <= step["memory"]["arguments"] <= state + 8 * 50_000
    assert step["bound"] == max(step["seconds"].values()) and not step["collectives"]
    assert found["storage"]["trajectories"] == recipe.store_bytes(small())


def refused(*arguments):
    return sentence(run("plan", "--config", SMOKE, *arguments), "plan")


@pytest.mark.parametrize(
    "name", ["v5e:4by4", "v5e", "v3:2x2", "h100:8", "v5litepod-16", "v5e:2x2x1", "v4:2x2", "v5e:0x4"]
)
def test_topologies_that_do_not_exist(name):
    said = refused("--topology", name)
    assert f"there is no topology '{name}': choose v4:2x2x1" in said
    assert all(f"{chip}:" in said for chip in SHAPES) and "4x4" in said and said.endswith("or cpu.")


def test_libtpu_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert "needs libtpu, TPU's compiler, which is not installed: pip install -e '.[tpu]'" in refused(
        "--topology", "v5e:4x4"
    )


def test_flags_of_plan():
    assert "--topology is missing: give --config FILE and --topology NAME." in refused()
    assert "there is no flag --workdir" in refused("--topology", "cpu", "--workdir", "here")
    assert "mesh data=-1, fsdp=3, tensor=1 does not fit 1 devices" in refused("--topology=cpu", "--config.mesh.fsdp=3")
    shown = run("plan", "--help").out
    assert shown.startswith(
        "python -m ard_jax plan --config FILE[:key=value,…] --topology NAME [--json FILE] [--finetune] [--search] "
        "[--config"
    )


# ------------------------------------------------------------------------------------------------------ with libtpu


@needs_libtpu
def test_libtpu_s_errors_are_one_sentence():
    said = refused("--topology", "v5e:3x3")
    assert "libtpu refuses v5e:3x3 (INVALID_ARGUMENT" in said and "choose v4:" in said


@needs_libtpu
@pytest.mark.parametrize("chip", SHAPES)
def test_libtpu_knows_the_shapes_that_are_named(chip):
    for shape in SHAPES[chip]:
        found = find_slice(f"{chip}:{shape}")
        sides = [int(side) for side in shape.split("x")]
        assert (
            len(found.devices) == jnp.prod(jnp.asarray(sides)) and chip_of(found.devices[0].device_kind) == CHIPS[chip]
        )


@needs_libtpu
@pytest.mark.slow
def test_a_plan_for_four_chips(tmp_path):
    file = tmp_path / "plan.json"
    flags = ["--config.model.remat=none", "--config.mesh.fsdp=2", "--json", file]
    outcome = run("plan", "--config", SMOKE, "--topology", "v5e:2x2", *flags)
    assert outcome.status == 0, outcome.err
    step = json.loads(file.read_text())["programs"]["training step"]
    assert step["devices"] == 4 and step["fits"] and step["available"] == 15.75 * GIB
    assert "all-reduce" in step["collectives"] and "--xla_jf_spmd_threshold" in os.environ["LIBTPU_INIT_ARGS"]


@needs_libtpu
@pytest.mark.slow
def test_a_host_s_own_work_is_compiled_for_a_host():
    """Its parameters are split over its own devices, which libtpu cannot do on a part of a slice."""
    config, where = small(), find_slice("v5e:4x4")
    config.mesh.fsdp = 4
    made = measure(trajectory_step(config, where), where.chip)
    assert made.work.mesh.shape["fsdp"] == 4 == made.work.mesh.size and made.fits


@needs_libtpu
@pytest.mark.slow
def test_pixart_s_recipe_and_its_text_encoder_fit_sixteen_chips():
    """PixArt-Σ at 1024 px with 48 guided calls in the step; T5 XXL, which no folder has to be there for."""
    where, config = find_slice("v5e:4x4"), for_platform(pixart_sigma_1024.get_config(), "tpu")
    made = measure(training_step(config, where), where.chip)
    assert made.fits and made.needed < 15.75e9
    assert made.seconds["compute"] >= made.work.flops / 16 / where.chip.flops
    encoding = caption_step(config, where)
    cost = measure(encoding, where.chip)
    assert cost.fits and encoding.rows == 256 and encoding.mesh.size == 4
    assert abs(cost.flops / (encoding.flops / 4) - 1) < 0.01


def test_captions_of_a_small_encoder_are_not_planned():
    where = find_slice("cpu")
    assert caption_step(for_platform(smoke_captions.get_config(), "cpu"), where) is None
    assert caption_step(for_platform(smoke.get_config(), "cpu"), where) is None


@needs_libtpu
@pytest.mark.slow
def test_the_paper_s_recipe_fits_sixteen_chips():
    """Takes minutes: DiT-XL/2, S = 4, N = 6, batch 64, as the config has it."""
    config, where = for_platform(imagenet256.get_config(), "tpu"), find_slice("v5e:4x4")
    made = measure(training_step(config, where), where.chip)
    assert made.fits and made.needed < 15.75e9
    assert made.flops * 16 / 2 < 3.3 * 480e9 * 64
