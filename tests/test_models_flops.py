import jax
import jax.numpy as jnp
import pytest
from jaxprs import macs
from networks import ard_student

from ard_jax import chips
from ard_jax.chips import measured_matmul_rate, peak_flops
from ard_jax.diffusion import Guidance, LinearVP, guided_output
from ard_jax.models import MASKS, DiT, parameter_shapes, size_fields, visible_blocks
from ard_jax.models.flops import student_macs, teacher_macs
from ard_jax.sampling import sample_student

SMALL = dict(channels=3, patch_size=2, hidden_size=24, depth=2, num_heads=2, num_classes=5)
LATENT = (32, 32, 4)
XL = size_fields("DiT-XL/2")


def image(shape, *leading):
    return jax.ShapeDtypeStruct((*leading, *shape), jnp.float32)


LABEL, TIME = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32)


def formula(model, shape, steps=1, history_layers=0, mask="diagonal"):
    """Multiply-accumulates of a DiT's rows by hand: `steps` of them, of which some layers look at several."""
    width, hidden = model.hidden_size, round(model.hidden_size * model.mlp_ratio)
    patch = model.patch_size**2 * model.channels
    out = patch * (2 if model.learn_sigma else 1)
    tokens = (shape[0] // model.patch_size) * (shape[1] // model.patch_size)
    per_token = patch * width + model.depth * (4 * width**2 + 2 * width * hidden) + width * out
    modulation, time = model.depth * 6 * width**2 + 2 * width**2, 256 * width + width**2
    seen = sum(len(visible_blocks(mask, block)) for block in range(steps))
    attention = history_layers * seen + (model.depth - history_layers) * steps
    return steps * (tokens * per_token + modulation + time) + attention * 2 * tokens**2 * width


def traced_teacher(model, shape):
    """Multiply-accumulates of the network itself, from its trace; nothing is computed or compiled."""
    params = parameter_shapes(model, image(shape, 1), TIME, LABEL)
    return macs(lambda p, *inputs: model.apply({"params": p}, *inputs), params, image(shape, 1), TIME, LABEL)


def traced_student(model, shape):
    """The same of the training forward and of the cached sampler."""
    points = image(shape, 1, model.steps)
    params = parameter_shapes(model, points, LABEL)
    forward = macs(lambda p, *inputs: model.apply({"params": p}, *inputs), params, points, LABEL)
    return forward, macs(lambda p, *inputs: sample_student(model, p, *inputs), params, image(shape, 1), LABEL)


@pytest.mark.parametrize("fields", [{}, {"learn_sigma": False, "mlp_ratio": 2.6}, {"patch_size": 4, "unroll": True}])
def test_what_is_counted_is_every_product_of_small_models(fields):
    shape = (16, 8, 3)
    teacher = DiT(**(SMALL | fields))
    assert teacher_macs(teacher, shape) == traced_teacher(teacher, shape) == formula(teacher, shape)
    masks = MASKS if not fields else ("causal",)
    for steps, history_layers, mask in [(3, 1, mask) for mask in masks] + [(1, 2, "causal"), (4, 2, "causal")]:
        student = ard_student(**(SMALL | fields), steps=steps, history_layers=history_layers, mask=mask)
        counted = student_macs(student, shape)
        assert traced_student(student, shape) == (counted, counted)
        assert counted == formula(teacher, shape, steps, student.layers_with_history, mask)


def test_xla_counts_the_same_products():
    """XLA adds the elementwise work to the products, little in a wide model; a loop's body it counts but once."""
    shape = (4, 4, 4)
    student = ard_student(hidden_size=512, depth=2, num_heads=4, num_classes=5, steps=3, history_layers=1, unroll=True)
    params = parameter_shapes(student, image(shape, 1, 3), LABEL)
    lowered = jax.jit(lambda p, *inputs: student.apply({"params": p}, *inputs)).lower(params, image(shape, 1, 3), LABEL)
    assert lowered.cost_analysis()["flops"] == pytest.approx(2 * student_macs(student, shape), rel=0.02)


def test_the_paper_s_teacher():
    teacher = DiT(**XL)
    assert round(teacher_macs(teacher, LATENT) / 1e9, 2) == 118.62
    assert traced_teacher(teacher, LATENT) == teacher_macs(teacher, LATENT)
    params = parameter_shapes(teacher, image(LATENT, 1), TIME, LABEL)

    def guided(params, x, y):
        return guided_output(teacher, params, x, 10.0, y, Guidance(1.5, 3), LinearVP())

    # 25 steps with guidance; both halves share nothing, not even the time embedding
    assert round(25 * macs(guided, params, image(LATENT, 1), LABEL) / 1e9) == 5931


@pytest.mark.parametrize("history_layers, giga", [(0, 474.5), (6, 479.9), (28, 499.9)])
def test_the_paper_s_student(history_layers, giga):
    student = ard_student(**XL, steps=4, history_layers=history_layers)
    counted = student_macs(student, LATENT)
    assert round(counted / 1e9, 1) == giga
    assert traced_student(student, LATENT) == (counted, counted)


def test_history_costs_about_a_percent():
    with_history, without = (student_macs(ard_student(**XL, steps=4, history_layers=n), LATENT) for n in (6, 0))
    assert with_history <= 1.02 * 480e9
    assert 1.011 <= with_history / without <= 1.012
    cheaper = {m: student_macs(ard_student(**XL, steps=4, history_layers=6, mask=m), LATENT) for m in MASKS}
    assert (
        cheaper["diagonal"]
        == without
        < cheaper["window"]
        == cheaper["noise_and_own"]
        < with_history
        == cheaper["causal"]
    )


def test_peak_rates(monkeypatch):
    class Device:
        def __init__(self, kind, platform):
            self.device_kind, self.platform = kind, platform

    def peak(kind, platform, devices=4):
        monkeypatch.setattr(jax, "devices", lambda: [Device(kind, platform)])
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        return peak_flops()

    rates = {jnp.float32: 1e9, jnp.bfloat16: 2e9}
    monkeypatch.setattr(chips, "measured_matmul_rate", lambda dtype=jnp.float32, size=None: rates[dtype] / (size or 1))
    assert peak("TPU v5 lite", "tpu") == 4 * 197e12
    assert peak("TPU v5", "tpu") == peak("TPU v5p", "tpu") == 4 * 459e12
    assert peak("NVIDIA H100 80GB HBM3", "gpu") == 4 * 989e12
    assert peak("cpu", "cpu") == 1e9 / 512  # they share the machine's cores
    assert peak("a new accelerator", "gpu") == 4 * 2e9  # in bfloat16, as those of the table
    assert 1e7 < measured_matmul_rate(size=64, seconds=0.001) < 1e15
