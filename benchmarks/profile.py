"""Where a program's time goes on a CPU, and how fast its matrix products run: python -m benchmarks.profile [--only …]

sampler   the cached sampler's S steps, at batch 8
alone     the same without history layers
training  a training step, at batch 4

Two tables for each, by XLA's own profiler. The first has the clock's time by kind of operation; where several are at
work at once, it is the products'. The second has its products, those that take longest first, beside the same product
in a program of its own, which is what XLA has for that shape. XLA fuses some products with the softmax between them;
their time has that in it. Then comes the utilisation that the program would have if it were nothing but its products,
each as fast as it is alone: more is out of this code's reach. Utilisation is as in `benchmarks.speed`; weights are
random.
"""

import bisect
import itertools
import logging
import math
import pathlib
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ard_jax.build import example_shape, make_student, make_teacher
from ard_jax.command_line import parse_flags, set_up_logging
from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, init_from_teacher
from ard_jax.models.backbone import REMAT_POLICIES
from ard_jax.models.flops import student_macs
from ard_jax.objectives.ard import ard
from ard_jax.plan.hlo import Computation, Instruction, parse
from ard_jax.sampling import sample_student
from benchmarks.measure import in_turns, table
from benchmarks.parts import Span
from benchmarks.speed import Step, inputs, settings, teacher_params

SHOWN = 12  # products in a table
RUNS = 2  # under the profiler
ALONE = 0.3  # seconds for a product by itself
MOVES = {"copy", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "pad", "concatenate", "broadcast"}
NOTHING = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "fusion"}
AROUND = ("while", "call", "conditional")  # what they run is counted

WEIGHTS, GRADIENTS, ATTENTION = "x · W and dy · Wᵀ", "xᵀ · dy", "q · kᵀ, softmax · v and their gradients"


class Product(NamedTuple):
    """A product as `jax.lax.dot_general` takes it: shapes, and contracted and batch axes of both sides."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Of the batch, the left side's own, the contracted and the right side's own axes."""
        batch = math.prod(self.left[axis] for axis in self.batch[0])
        inner = math.prod(self.left[axis] for axis in self.contracted[0])
        return batch, math.prod(self.left) // batch // inner, inner, math.prod(self.right) // batch // inner

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.sizes)

    @property
    def kind(self) -> str:
        if self.batch[0]:
            return ATTENTION
        return WEIGHTS if self.contracted[0] == (len(self.left) - 1,) else GRADIENTS

    def __str__(self) -> str:
        batch, rows, inner, columns = self.sizes
        transposed = "" if self.contracted[0] == (len(self.left) - 1,) else "ᵀ"
        return f"{f'{batch} times ' if batch > 1 else ''}({rows}×{inner}){transposed} · {inner}×{columns}"


def names_of(products: Iterable[Product]) -> str:
    counted = Counter(products).items()
    return ", ".join(f"{count} of {product}" if count > 1 else str(product) for product, count in counted)


class Operation(NamedTuple):
    """What XLA runs as one: its kind, and the products in it."""

    kind: str
    products: tuple[Product, ...]


BETWEEN = Operation("nothing", ())

# ----------------------------------------------------------------------------------------------- reading a program


def operations(text: str) -> dict[str, Operation]:
    """Name → operation, of a compiled program's text."""
    program, found = parse(text), {}
    for computation in program.computations.values():
        for instruction in computation.values():
            if instruction.opcode in AROUND:
                continue
            called = re.search(r"\bcalls=%([\w.\-]+)", instruction.rest)
            inside = program.computations[called[1]] if called and instruction.opcode == "fusion" else computation
            parts = [instruction] if inside is computation else list(inside.values())
            products = tuple(product_of(inside, part) for part in parts if part.opcode == "dot")
            found[instruction.name] = Operation(kind_of(instruction, parts, products), products)
    return found


def product_of(computation: Computation, dot: Instruction) -> Product:
    def axes(name: str) -> tuple[int, ...]:
        said = re.search(rf"\b{name}=\{{([\d,]*)\}}", dot.rest)
        return numbers(said[1]) if said else ()

    left, right = (numbers(re.findall(r"\[([\d,]*)\]", computation[name].shape)[0]) for name in dot.operands)
    contracted = axes("lhs_contracting_dims"), axes("rhs_contracting_dims")
    return Product(left, right, contracted, (axes("lhs_batch_dims"), axes("rhs_batch_dims")))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(","))))


def kind_of(instruction: Instruction, parts: Iterable[Instruction], products: tuple[Product, ...]) -> str:
    """What an operation is for, by what it is made of; numbers that count are no part of that."""
    if products:
        return products[0].kind
    work = {part.opcode for part in parts if not part.shape.startswith(("s32", "u32", "pred"))} - NOTHING
    if re.search(r'op_name="jit\(step\)/[\w.]+"', instruction.rest):
        return "clipping, AdamW, average"
    if "exponential" in work:
        return "softmax by itself"
    if "tanh" in work:
        return "gelu"
    return "copies, transposes, slices" if work <= MOVES else "norms, modulation, residuals, sums"


# ------------------------------------------------------------------------------------------------------ measuring


def profiled(run: Callable[[], Any], known: Mapping[str, Operation]) -> tuple[dict[str, float], dict[str, float]]:
    """Of one run: operation → seconds that it takes itself, and how often it runs."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(RUNS):
                jax.block_until_ready(run())
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    lines = [[(e.start_ns, e.end_ns, e.name) for e in line.events] for plane in data.planes for line in plane.lines]
    spans = list(spans_of(lines, known))
    shares = by_the_clock([(span, bool(span.part in known and known[span.part].products)) for span in spans])
    return {name: own / 1e9 / RUNS for name, own in shares.items()}, {
        name: count / RUNS for name, count in Counter(span.part for span in spans).items()
    }


def spans_of(lines: Sequence[Sequence[tuple[float, float, str]]], known: Mapping[str, Operation]) -> Iterator[Span]:
    """Of threads' events (start, end, name) those of operations; a product that goes on after its call ends at "end: ".

    That is an event of its own, perhaps of another thread. Of other operations it may stand after a wait for a thread.
    """
    moments: dict[str, list[float]] = defaultdict(list)
    for start, _, name in sorted(event for line in lines for event in line):
        moments[name].append(start)

    def after(name: str, start: float) -> float:
        return next(iter(moments[name][bisect.bisect(moments[name], start) :]), math.inf)

    for start, end, name in (event for line in lines for event in line):
        if name in known and end > start:
            later = after(f"end: {name}", start) if known[name].products else math.inf
            yield Span(start, later if end < later < after(name, start) else end, name)


def by_the_clock(spans: Iterable[tuple[Span, bool]]) -> dict[str, float]:
    """Name → its share of the time from first to last: an instant is its products' if any is at work, in equal shares.

    Else it is that of whatever is at work, and if nothing is, of "".
    """
    found: dict[str, float] = defaultdict(float)
    at_work: tuple[Counter[str], Counter[str]] = Counter(), Counter()
    changes = sorted(
        (moment, change, span.part, first)
        for span, first in spans
        for moment, change in ((span.start, 1), (span.end, -1))
    )
    for (start, change, name, first), (end, *_) in itertools.pairwise([*changes, changes[-1]]):
        at_work[first][name] += change
        names = [*at_work[True].elements()] or [*at_work[False].elements()] or [""]
        for shared in names:
            found[shared] += (end - start) / len(names)
    return found


def seconds_alone(product: Product) -> float:
    """The median time of a product in a program of its own."""
    rng = np.random.default_rng(0)
    sides = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in (product.left, product.right)]
    program = (
        jax.jit(jax.lax.dot_general, static_argnums=2).lower(*sides, (product.contracted, product.batch)).compile()
    )
    jax.block_until_ready(program(*sides))
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < ALONE:
        start = time.perf_counter()
        jax.block_until_ready(program(*sides))
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def report(program: jax.stages.Compiled, run: Callable[[], Any], flops: float, seconds: float) -> str:
    """The tables of a program; `flops` are the model's."""
    known, turns = operations(program.as_text()), in_turns({"run": run}, jnp.float32, seconds)
    taken, times = profiled(run, known)
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    groups: dict[tuple[Product, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, own in taken.items():
        operation = known.get(name, BETWEEN)
        kinds[operation.kind][0] += own
        kinds[operation.kind][1] += times.get(name, 0) * sum(product.flops for product in operation.products)
        groups[operation.products][0] += own
        groups[operation.products][1] += times.get(name, 0)
    total = sum(own for own, _ in kinds.values())
    rows = [
        (kind, f"{own * 1e3:.0f}", f"{own / total:.1%}", f"{done / own / 1e9:.0f}" if done else "")
        for kind, (own, done) in sorted(kinds.items(), key=lambda item: -item[1][0])
    ]
    text = [table(("kind", "ms", "share", "GFLOP/s"), rows)]
    groups.pop((), None)
    alone = {product: seconds_alone(product) for product in dict.fromkeys(p for group in groups for p in group)}
    rows = []
    for group, (own, count) in sorted(groups.items(), key=lambda item: -item[1][0])[:SHOWN]:
        done, by_itself = sum(product.flops for product in group), sum(alone[product] for product in group)
        rates = f"{done * count / own / 1e9:.0f}", f"{done / by_itself / 1e9:.0f}"
        rows.append((names_of(group), f"{count:.0f}", f"{own * 1e3:.0f}", *rates))
    text.append(table(("product", "times", "ms", "GFLOP/s here", "alone"), rows))
    least = sum(count * sum(alone[product] for product in group) for group, (_, count) in groups.items())
    wall, rate = turns.median("run"), turns.rate()
    text.append(
        f"{wall * 1e3:.0f} ms without the profiler, {total * 1e3:.0f} ms with it; utilisation "
        f"{flops / wall / rate:.3f} of {rate / 1e9:.0f} GFLOP/s. Nothing but its products, each as fast as alone: "
        f"{least * 1e3:.0f} ms, utilisation {flops / least / rate:.3f}."
    )
    return "\n\n".join(text)


# ---------------------------------------------------------------------------------------------------------- items


def sampler(config: ml_collections.ConfigDict, student: ARDStudent, params: Any, batch: int, seconds: float) -> str:
    given = inputs(config, batch)
    args = params, jnp.asarray(given["noise"], jnp.float32), jnp.asarray(given["condition"], jnp.int32)
    program = jax.jit(lambda *args: sample_student(student, *args)[:, -1]).lower(*args).compile()
    return report(program, lambda: program(*args), 2 * batch * student_macs(student, example_shape(config)), seconds)


def alone(config: ml_collections.ConfigDict, student: ARDStudent, params: Any, batch: int, seconds: float) -> str:
    return sampler(config, student.clone(history_layers=0), params, batch, seconds)


def training(config: ml_collections.ConfigDict, student: ARDStudent, params: Any, batch: int, seconds: float) -> str:
    step = Step(ard(student, target="x0", columns=tuple(range(student.steps))), params, config, inputs(config, batch))
    return report(step.program, step, 6 * batch * student_macs(student, example_shape(config)), seconds)


ITEMS = {"sampler": (sampler, 8), "alone": (alone, 8), "training": (training, 4)}  # and how many rows at a time
FLAGS = {
    "--only": dict(nargs="+", choices=ITEMS, default=[*ITEMS], metavar="ITEM", help=", ".join(ITEMS)),
    "--size": dict(default="DiT-B/2", help="a published size such as DiT-S/2"),
    "--batch": dict(type=int, help="rows at a time, in place of each item's own number"),
    "--seconds": dict(type=float, default=10.0, help="the program is timed for so long, and twice at least"),
    "--remat": dict(choices=REMAT_POLICIES, default="dots", help="what the backward pass keeps of a block"),
}


def main(arguments: list[str]) -> int:
    set_up_logging()
    logging.getLogger("ard_jax").setLevel(logging.WARNING)
    try:
        args = parse_flags(FLAGS, arguments, prog="python -m benchmarks.profile", description=__doc__)
        config = settings(args.size)
    except UserError as error:
        print(f"benchmarks.profile: {error}", file=sys.stderr)
        return 2
    config.model.update(dtype="float32", remat=args.remat)
    student = make_student(config)
    params = init_from_teacher(teacher_params(make_teacher(config), example_shape(config)), student)
    print(f"# Profile\n\n{args.size}, float32, remat {args.remat}, jax {jax.__version__}.", flush=True)
    for item in args.only:
        function, batch = ITEMS[item]
        print(
            f"\n## {item.capitalize()}\n\n{function(config, student, params, args.batch or batch, args.seconds)}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
