"""Model FLOPs, counted in the traced networks: any backbone is counted without a formula of its own.

A multiply-accumulate counts as two FLOPs and only matrix products count, as usual for utilisation figures. The counts
are checked against XLA's cost analysis of the unrolled models, and against formulas, in the tests.
"""

import functools

import jax

from ard_jax.models.backbone import Backbone, condition_like, inputs_like, parameter_shapes
from ard_jax.models.discriminator import Discriminator
from ard_jax.models.jaxprs import macs
from ard_jax.models.student import ARDStudent, init_from_teacher

# Attention by matrix products that can be counted, and nothing done twice.
PLAIN = {"attention": "xla", "remat": "none", "dtype": None, "unroll": False}


@functools.cache
def teacher_macs(model: Backbone, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one forward pass of one image of (height, width, channel)."""
    model = model.with_backbone(**PLAIN)
    _, time, condition = inputs = inputs_like(model)
    return _macs(model, parameter_shapes(model, *inputs), _image(shape), time, condition)


@functools.cache
def student_macs(model: ARDStudent, shape: tuple[int, int, int]) -> int:
    """The same of all S steps of one trajectory, in training or cached sampling: they cost the same."""
    model = model.with_backbone(**PLAIN)
    teacher = parameter_shapes(model.backbone, *inputs_like(model.backbone))
    params = jax.eval_shape(lambda params: init_from_teacher(params, model), teacher)
    points = jax.ShapeDtypeStruct((1, model.steps, *shape), "float32")
    return _macs(model, params, points, condition_like(model.backbone, 1, jax.ShapeDtypeStruct))


@functools.cache
def discriminator_macs(model: Backbone, heads: int, shape: tuple[int, int, int]) -> int:
    """The same of a discriminator's heads on the tokens of one image in the given teacher."""
    model = model.with_backbone(**PLAIN)
    _, time, condition = inputs = inputs_like(model)

    def look(params, image, time, condition):
        return model.apply({"params": params}, image, time, condition, (0,), method="features")

    tokens, summary = jax.eval_shape(look, parameter_shapes(model, *inputs), _image(shape), time, condition)
    tokens = jax.ShapeDtypeStruct((heads, *tokens.shape[1:]), tokens.dtype)
    judge = Discriminator(heads)
    return _macs(judge, parameter_shapes(judge, tokens, summary), tokens, summary)


def _image(shape: tuple[int, int, int]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape), "float32")


def _macs(model, params, *inputs) -> int:
    return macs(jax.make_jaxpr(lambda params, *inputs: model.apply({"params": params}, *inputs))(params, *inputs).jaxpr)
