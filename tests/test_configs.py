"""The configs: each is valid, and ImageNet's holds the paper's numbers (docs/METHOD.md section 5)."""

import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from ard_jax.build import example_shape, make_student, make_teacher
from ard_jax.checks import validate
from ard_jax.config import config_arguments, flatten
from ard_jax.entries import entries_of
from ard_jax.errors import UserError
from ard_jax.methods import training_flops
from ard_jax.models import count_parameters, init_from_teacher, network_shapes
from ard_jax.objectives.ard import ard
from ard_jax.parallel import make_mesh
from ard_jax.stages.compare import quick_config
from ard_jax.training.state import make_optimizer, make_step, start_state


def get_config(name, argument=""):
    return importlib.import_module(f"configs.{name}").get_config(argument)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("digits", ""),
        ("digits", "student=step_noisy"),
        ("digits", "recipe=default"),
        ("smoke", "process=flow,target=xt"),
        ("imagenet256", ""),
        ("imagenet256", "steps=2,mask=diagonal"),
        ("imagenet256", "steps=1"),
        ("imagenet256", "recipe=default"),
        ("smoke_captions", "process=flow"),
        ("shapes", "student=step"),
        ("openmoji", ""),
        ("openmoji", "told=groups"),
        ("openmoji", "told=subgroups,student=step,budget=quick,steps=2"),
        ("openmoji", "student=ard_noisy,target=xt,budget=cpu"),
        ("pixart_sigma_1024", ""),
        ("pixart_sigma_1024", "steps=2,history_layers=28,mask=diagonal"),
        ("pixart_alpha_512", ""),
    ],
)
def test_every_config_is_valid(name, argument):
    validate(get_config(name, argument))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("told=classes", "told is 'classes': choose one of captions, groups, subgroups"),
        ("budget=huge", "budget is 'huge': choose one of full, cpu, quick"),
        ("steps=3", "steps is 3: choose one of 4, 2, 1"),
    ],
)
def test_openmoji_says_what_it_can_be(argument, said):
    with pytest.raises(UserError, match=said):
        get_config("openmoji", argument)


@pytest.mark.parametrize("budget", ["full", "cpu", "quick"])
def test_students_of_openmoji_have_one_budget_of_flops_and_one_store(budget):
    """A network call of each point of each example: steps · batch · S, whatever S is."""
    configs = [get_config("openmoji", f"budget={budget},steps={steps}") for steps in (4, 2, 1)]
    assert [tuple(config.student.points) for config in configs] == [(15, 10, 5, 0), (10, 0), (0,)]
    assert len({len(c.student.points) * c.distill.steps * c.distill.batch_size for c in configs}) == 1
    assert len({str(config.trajectories) for config in configs}) == 1


@pytest.mark.parametrize(
    ("steps", "batch_size", "points"), [(4, 64, (15, 10, 5, 0)), (2, 128, (10, 0)), (1, 256, (0,))]
)
def test_imagenet_has_the_numbers_of_the_paper(steps, batch_size, points):
    config = get_config("imagenet256", f"steps={steps}")
    optimizer = config.distill.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("adamw", 1e-4, 0.0)
    assert (optimizer.clip, optimizer.ema, optimizer.schedule) == (1.0, 0.9999, "constant")
    assert (config.distill.steps, config.distill.batch_size) == (300_000, batch_size)
    assert (tuple(config.student.points), config.student.history_layers) == (points, 6)
    assert (config.student.mask, config.student.target, config.student.heads) == ("causal", "x0", "separate")
    assert (config.diffusion.steps, config.diffusion.solver, config.diffusion.guidance_scale) == (25, "ddim", 1.5)
    assert (config.diffusion.guided_channels, config.trajectories.count) == (3, 2_560_000)
    model = make_student(config)
    network = model.backbone
    assert (network.depth, network.hidden_size, network.num_heads, network.patch_size) == (28, 1152, 16, 2)
    assert (model.steps, model.noise_time) == (steps, 999.0)


@pytest.mark.parametrize("quick", [False, True])
def test_the_digits_methods_can_all_be_trained(quick, tmp_path):
    """All that the stage compare checks before it makes anything; and what each method starts from."""
    config = get_config("compare_digits")
    validate(config)
    entries = entries_of(quick_config(config) if quick else config, training_flops, tmp_path)
    steps = {}
    for entry in entries.values():
        steps.setdefault(entry.method, []).append(entry.steps)
    assert steps == {
        "ard": [2, 4], "consistency": [1, 2, 4], "knowledge": [1], "matching": [1, 2, 4], "progressive": [8, 4, 2, 1],
        "step": [2, 4], "adversarial": [4], "mean_flow": [4], "trajectory": [4],
    }  # fmt: skip
    assert [name for name, entry in entries.items() if not entry.shown] == ["progressive_8"]
    starts = {name: entry.start for name, entry in entries.items() if entry.start}
    assert starts == {
        "adversarial_4": "ard_4", "progressive_4": "progressive_8", "progressive_2": "progressive_4",
        "progressive_1": "progressive_2", "matching_1": "consistency_1", "matching_2": "consistency_2",
        "matching_4": "consistency_4", "trajectory_4": "mean_flow_4",
    }  # fmt: skip


@pytest.mark.parametrize("quick", [False, True])
def test_the_same_methods_and_noisy_points_can_be_trained_on_openmoji(quick, tmp_path):
    config = get_config("compare_openmoji")
    validate(config)
    entries = entries_of(quick_config(config) if quick else config, training_flops, tmp_path)
    own = {name for name, entry in entries.items() if entry.method == "noisy"}
    digits = entries_of(get_config("compare_digits"), training_flops, tmp_path)
    assert own == {"noisy_2", "noisy_4"} and set(entries) - own == set(digits)
    budget = entries["ard_4"].config.distill.steps
    assert budget == (24 if quick else 1000)
    assert entries["ard_2"].config.distill.steps == pytest.approx(2 * budget, rel=0.05)


def test_imagenet_trains_at_full_size_in_shapes():
    """The whole step of the paper's recipe is traced, without its memory: 683 million parameters, batch 64."""
    config = get_config("imagenet256")
    student, shape = make_student(config), example_shape(config)
    params = jax.eval_shape(lambda p: init_from_teacher(p, student), network_shapes(make_teacher(config)))
    assert count_parameters(params) == 683_209_856 - 256 * 1152  # the position table is a constant here
    optimizer = make_optimizer(config.distill.optimizer, config.distill.steps)
    mesh = make_mesh(devices=jax.devices()[:1])
    state = jax.eval_shape(functools.partial(start_state, optimizer=optimizer, seed=0), params)
    step = make_step(ard(student, target="x0", columns=(0, 1, 2, 3)), optimizer, 0.9999, mesh, state)
    batch = {
        "noise": jax.ShapeDtypeStruct((64, *shape), jnp.float16),
        "x0": jax.ShapeDtypeStruct((64, 4, *shape), jnp.float16),
        "condition": jax.ShapeDtypeStruct((64,), jnp.int32),
    }
    after, metrics = jax.eval_shape(step, state, None, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert set(metrics) >= {"loss", "loss_step_1", "loss_step_4", "gradient_norm"}


def test_what_is_compiled_does_not_grow_with_depth():
    """The paper's step with 14 and with 28 layers is the same program but for the lengths of its loops."""

    def operations(depth):
        config = get_config("imagenet256")
        with config.unlocked():
            config.model.update(name="", depth=depth)
        student, shape = make_student(config), example_shape(config)
        params = jax.eval_shape(lambda p: init_from_teacher(p, student), network_shapes(make_teacher(config)))
        optimizer = make_optimizer(config.distill.optimizer, config.distill.steps)
        mesh = make_mesh(devices=jax.devices()[:1])
        state = jax.eval_shape(functools.partial(start_state, optimizer=optimizer, seed=0), params)
        step = make_step(ard(student, target="x0", columns=(0, 1, 2, 3)), optimizer, 0.9999, mesh, state)
        points = jax.ShapeDtypeStruct((4, 4, *shape), jnp.float16)
        batch = {
            "noise": points.update(shape=(4, *shape)),
            "x0": points,
            "condition": jax.ShapeDtypeStruct((4,), jnp.int32),
        }
        return len(step.lower(state, None, batch).as_text().splitlines())

    assert operations(28) == operations(14)


def test_the_default_recipe_on_imagenet_differs_from_the_paper_s_in_what_the_page_says_alone():
    paper, ours = (flatten(get_config("imagenet256", argument).to_dict()) for argument in ("", "recipe=default"))
    changed = {key: value for key, value in ours.items() if paper[key] != value}
    assert changed == {
        "trajectories.keep_noisy": True,
        "student.name": "ard_noisy",
        "student.target": "xt",
        "distill.ard.huber": 0.03,
        "finetune.weight": 0.6,
        "finetune.feature_time": 0.03,
        "finetune.discriminator_optimizer.name": "rmsprop",
    }


def test_the_default_recipe_on_digits_differs_from_noisy_points_in_its_distance_and_weight_alone():
    noisy, ours = (
        flatten(get_config("digits", argument).to_dict()) for argument in ("student=ard_noisy", "recipe=default")
    )
    changed = {key: value for key, value in ours.items() if noisy[key] != value}
    assert changed == {"distill.ard.huber": 0.03, "finetune.weight": 0.6}


def test_config_arguments_are_typed_as_their_defaults():
    assert config_arguments("steps=2,mask=window", steps=4, mask="causal") == {"steps": 2, "mask": "window"}
    assert config_arguments(None, steps=4) == {"steps": 4}


@pytest.mark.parametrize(
    ("name", "argument", "sentence"),
    [
        ("imagenet256", "step=2", "config argument 'step' does not exist: this config has steps, mask"),
        ("imagenet256", "steps=two", "config argument steps is 'two', which is no int"),
        ("imagenet256", "steps=3", "config argument steps is 3: choose one of 4, 2, 1."),
        ("pixart_sigma_1024", "steps=5", "config argument steps is 5: choose one of 3, 4, 2, 1."),
        ("imagenet256", "recipe=best", "config argument recipe is 'best': choose one of paper, default"),
        ("digits", "students=ard", "config argument 'students' does not exist"),
        ("digits", "recipe=best", "config argument recipe is 'best': choose one of paper, default"),
        ("digits", "recipe=default,student=ard", "give student=ard_noisy or step_noisy, not 'ard'"),
    ],
)
def test_wrong_config_arguments_are_refused(name, argument, sentence):
    with pytest.raises(UserError, match=sentence):
        get_config(name, argument)
