"""What only a GPU can tell: python -m benchmarks.gpu [--only ITEM …]

attention  the fused kernel against XLA's: of a trajectory's blocks, and of captions, values and gradients in bfloat16
pixart     PixArt-Σ at 1024 px: the teacher's guided call and the student's four, batch 1 and 4
t5         T5-XXL's encoder in bfloat16: 32 captions of 300 tokens

Errors are ‖out − reference‖ / ‖reference‖, the reference in float32 at the highest precision. Weights and inputs are
random. Times as in benchmarks/speed.py; run by benchmarks/gpu.sh.
"""

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ard_jax.build import example_shape, make_solve, make_student, make_teacher
from ard_jax.command_line import parse_flags
from ard_jax.errors import UserError
from ard_jax.models import init_from_teacher
from ard_jax.models.attention import block_attention, cross_attention
from ard_jax.models.backbone import condition_like
from ard_jax.parallel import make_mesh
from ard_jax.sampling import sample_student, teacher_predictor
from ard_jax.stages.teacher import init_parameters
from ard_jax.text.t5 import T5Encoder
from benchmarks.measure import in_turns, spread, table
from configs import pixart_sigma_1024

Attend = Callable[..., jax.Array]


def _random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _cases() -> dict[str, tuple[Attend, tuple[jax.Array, ...]]]:
    """What is attended to, by its name: a function of (q, k, v, backend), and q, k, v."""
    blocks = tuple(_random(seed, 16 * 4, 256, 16, 72) for seed in range(3))
    caption = _random(0, 2, 4096, 16, 72), _random(1, 2, 300, 16, 72), _random(2, 2, 300, 16, 72)
    lengths = jnp.array([7, 300])
    cases: dict[str, tuple[Attend, tuple[jax.Array, ...]]] = {
        f"4 blocks of 256 tokens, {mask}": (
            lambda q, k, v, backend, mask=mask: block_attention(q, k, v, mask, 4, backend),
            blocks,
        )
        for mask in ("causal", "diagonal")
    }
    cases["4096 tokens meet 7 and 300 of a caption's"] = (
        lambda q, k, v, backend: cross_attention(q, k, v, lengths, backend),
        caption,
    )
    return cases


def attention(seconds: float) -> str:
    rows = []
    for name, (attend, given) in _cases().items():

        def both(q, k, v, backend, attend=attend):
            def loss(*args):
                out = attend(*args, backend).astype(jnp.float32)
                return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

            gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
            return out, gradients

        with jax.default_matmul_precision("highest"):
            wide = tuple(x.astype(jnp.float32) for x in given)
            reference = jax.jit(functools.partial(both, backend="xla"))(*wide)
        programs = {backend: jax.jit(functools.partial(both, backend=backend)) for backend in ("cudnn", "xla")}

        def error(got, want):
            got, want = (
                jnp.concatenate([x.astype(jnp.float32).ravel() for x in jax.tree.leaves(t)]) for t in (got, want)
            )
            return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))

        outputs = {backend: program(*given) for backend, program in programs.items()}
        turns = in_turns(
            {b: functools.partial(program, *given) for b, program in programs.items()}, jnp.bfloat16, seconds
        )
        for backend, (out, gradients) in outputs.items():
            errors = error(out, reference[0]), error(gradients, reference[1])
            each = spread(turns.seconds[backend] * 1e3, 3)
            rows.append((name, backend, f"{errors[0]:.1e}", f"{errors[1]:.1e}", each))
    return table(("what", "backend", "error", "of gradients", "ms, forward and backward"), rows)


def pixart(seconds: float) -> str:
    config = pixart_sigma_1024.get_config()
    teacher, student, shape = make_teacher(config), make_student(config), example_shape(config)
    params, how = init_parameters(teacher, shape, 0, make_mesh()), make_solve(config)
    heads, grid = init_from_teacher(params, student), how.process.grid(how.steps)

    def guided(params, noise, condition):
        return teacher_predictor(teacher, params, condition, grid, how.process, how.guidance)(noise, 0).x0

    runs, images = {}, {}
    for batch in (1, 4):
        given = (
            _random(0, batch, *shape).astype(jnp.float32),
            jax.tree.map(jnp.asarray, condition_like(teacher, batch, jnp.ones)),
        )
        for name, function, weights in (
            ("a guided call of the teacher", guided, params),
            (f"the student's {student.steps}", functools.partial(sample_student, student), heads),
        ):
            program = jax.jit(function).lower(weights, *given).compile()
            runs[f"{name}, batch {batch}"] = functools.partial(program, weights, *given)
            images[f"{name}, batch {batch}"] = batch
    turns = in_turns(runs, teacher.dtype, seconds)
    return table(
        ("what", "ms an image"), [(name, spread(turns.seconds[name] / images[name] * 1e3, 1)) for name in runs]
    )


def t5(seconds: float) -> str:
    model = T5Encoder(dtype=jnp.bfloat16)
    ids, mask = jnp.ones((32, 300), jnp.int32), jnp.ones((32, 300), bool)

    def init():
        drawn = model.init(jax.random.key(0), ids[:1, :16], mask[:1, :16])["params"]
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn)

    shapes = jax.eval_shape(init)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes)  # drawing them takes 19 GB more
    program = jax.jit(lambda *args: model.apply({"params": args[0]}, *args[1:])).lower(params, ids, mask).compile()
    turns = in_turns({"t5": functools.partial(program, params, ids, mask)}, jnp.bfloat16, seconds)
    return table(
        ("what", "ms a caption"), [("T5-XXL, 32 captions of 300 tokens", spread(turns.seconds["t5"] / 32 * 1e3, 2))]
    )


def memory() -> str:
    """The most that was in use on the device so far."""
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return f"At most {used / 1e9:.1f} GB in use."


ITEMS = {"attention": attention, "pixart": pixart, "t5": t5}
FLAGS = {
    "--only": dict(nargs="+", choices=ITEMS, default=[*ITEMS], metavar="ITEM", help=", ".join(ITEMS)),
    "--seconds": dict(type=float, default=3.0, help="turns start for so long, and there are two at least"),
}


def main(arguments: list[str]) -> int:
    try:
        args = parse_flags(FLAGS, arguments, prog="python -m benchmarks.gpu", description=__doc__)
        if jax.default_backend() != "gpu":
            raise UserError(f"this is for a GPU, and JAX finds {jax.default_backend()}: run benchmarks.speed.")
    except UserError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    for item in args.only:
        print(f"\n## {item.capitalize()}\n\n{ITEMS[item](args.seconds)}\n\n{memory()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
