"""Reading a compiled program's text (HLO): what its chips send each other and what they move to and from memory.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0}  # others have theirs in their names

# Opcodes, which may have "-start" at their end.
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

# These move nothing: they name, group or await what others made, or their cost is that of the computation they call.
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "opt-barrier", "partition-id", "replica-id", "async-start", "async-update", "async-done", "domain", "iota",
)  # fmt: skip


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name, opcode: as in the text.
        shape: of the result, as text; a tuple's in parentheses.
        operands: names.
        rest: the attributes, as text; of a constant or a parameter, its value or number too.
        root: it is the computation's result.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


class Computation(dict[str, Instruction]):
    """Instructions by name, in order."""

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in reversed(self.values()) if instruction.root)

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by their number."""
        return {int(i.rest.split(")")[0]): i.name for i in self.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self}
        for instruction in self.values():
            for operand in dict.fromkeys(instruction.operands):
                if operand in users:
                    users[operand].append(instruction)
        return users


class Program(NamedTuple):
    """A parsed module: its computations by name, the entry's name, and over how many devices it is partitioned."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


class Traffic(NamedTuple):
    """The collectives of one kind in one run of a program.

    Attributes:
        count: how many are run.
        bytes: what a chip puts in (of an all-gather, what it gets out), all together.
        sent: what a chip must send at least, in a ring, all together.
    """

    count: int  # type: ignore[assignment]  # tuple's own method of that name is not used
    bytes: float
    sent: float


def parse(text: str) -> Program:
    """Parses `jax.stages.Compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")):
            name = _part(r"%([\w.\-]+)", line)
            entry = name if line.startswith("ENTRY ") else entry
            current = computations[name] = Computation()
        elif line.rstrip() == "}":  # others that begin so end the metadata of a kernel, which stand on several lines
            current = None
        elif current is not None and " = " in line:
            instruction = _parse_line(line)
            current[instruction.name] = instruction
    partitions = re.search(r"num_partitions=(\d+)", text[: text.index("\n")])
    return Program(computations, entry, int(partitions.group(1)) if partitions else 1)


def _parse_line(line: str) -> Instruction:
    """`[ROOT] %name = shape opcode(operands), attributes` → the instruction."""
    left, _, right = re.sub(r"/\*.*?\*/", "", line).strip().partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].strip()
    start = right.index("(")
    end = _closing(right, start)
    operands = tuple(re.findall(r"%([\w.\-]+)", right[start:end]))
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, shape, right[:start], operands, right[start + 1 :], left.startswith("ROOT "))


def _part(pattern: str, text: str) -> str:
    """The group of a pattern in a text that must have it."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in {text[:80]!r}")
    return found[1]


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def arrays(shape: str) -> list[tuple[float, bool]]:
    """Bytes of each array of a shape, and whether it lies in main memory, not in faster memory on the chip."""
    found = []
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape):
        bits = BITS[dtype] if dtype in BITS else int(_part(r"(\d+)", dtype))
        numbers = map(int, filter(None, dims.split(",")))
        found.append((math.prod(numbers) * bits / 8, not re.search(r"S\([1-9]\d*\)", layout)))
    return found


def _size(shape: str) -> float:
    """Bytes of a shape."""
    return sum(amount for amount, _ in arrays(shape))


def _in_main_memory(shape: str) -> float:
    """Bytes of a shape's arrays that lie in main memory."""
    return sum(amount for amount, main in arrays(shape) if main)


# ------------------------------------------------------------------------------------------------- how often it runs


def _instructions(program: Program) -> Iterator[tuple[Computation, Instruction, int, bool]]:
    """Every instruction with its computation, how often it runs, and whether it is inside a fusion.

    Of a conditional, each branch counts.
    """
    yield from _walk(program, program.entry, 1, False)


def _walk(program: Program, name: str, times: int, fused: bool) -> Iterator[tuple[Computation, Instruction, int, bool]]:
    computation = program.computations[name]
    for instruction in computation.values():
        yield computation, instruction, times, fused
        turns = _trip_count(program, computation, instruction) if instruction.opcode == "while" else 1
        for called in _called_computations(instruction):
            yield from _walk(program, called, times * turns, fused or instruction.opcode == "fusion")


def _called_computations(instruction: Instruction) -> list[str]:
    """Names of the computations whose instructions run as this one does; those of reductions are no such thing."""
    found = re.findall(r"\b(?:calls|body|true_computation|false_computation)=%([\w.\-]+)", instruction.rest)
    if instruction.opcode == "call":
        found += re.findall(r"\bto_apply=%([\w.\-]+)", instruction.rest)
    for group in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", instruction.rest):
        found += re.findall(r"%([\w.\-]+)", group)
    return found


def _trip_count(program: Program, computation: Computation, loop: Instruction) -> int:
    """Turns of a loop that counts from 0, as JAX's scans do; 1 where the text does not tell."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known.group(1))
    condition = program.computations[_part(r"\bcondition=%([\w.\-]+)", loop.rest)]
    bounds = [constant(instruction) for instruction in condition.values()]
    if not any(bounds):  # the bound comes with the loop's state
        initial = computation[loop.operands[0]]
        for instruction in condition.values():
            if instruction.opcode == "get-tuple-element" and initial.opcode == "tuple":
                index = int(_part(r"\bindex=(\d+)", instruction.rest))
                bounds.append(constant(computation[initial.operands[index]]))
    return max(filter(None, bounds), default=1)


def constant(instruction: Instruction) -> int:
    """The value of a whole-numbered scalar constant, 0 for anything else."""
    value = re.match(r"(\d+)\)", instruction.rest)
    return int(value.group(1)) if instruction.opcode == "constant" and value else 0


# -------------------------------------------------------------------------------------------------------- collectives


def collectives(program: Program) -> dict[str, Traffic]:
    """What one run sends between chips, by kind; collectives of a single chip are left out."""
    found: dict[str, Traffic] = {}
    chains: set[str] = set()
    for computation, instruction, times, _ in _instructions(program):
        kind = _kind(computation, instruction)
        if kind not in COLLECTIVES or (group := _group_size(program, instruction)) == 1:
            continue
        # TPU's compiler spreads a collective over the fusions beside which it goes on, and names it in each of them
        chain = _part(r"(\bchannel_id=\d+|$)", instruction.rest) if "chain_id=" in instruction.rest else ""
        if chain in chains:
            continue
        chains |= {chain} - {""}
        amount = sum(_size(computation[operand].shape) for operand in instruction.operands)
        amount *= group if kind == "all-gather" else 1
        before = found.get(kind, Traffic(0, 0.0, 0.0))
        sent = amount * _sent_share(kind, group)
        found[kind] = Traffic(before.count + times, before.bytes + times * amount, before.sent + times * sent)
    return found


def _kind(computation: Computation, instruction: Instruction) -> str:
    """The collective that an instruction is, or its opcode.

    TPU's compiler writes a reduce-scatter as a computation all-reduce-scatter, which slices an all-reduce.
    """
    root, kind = computation.root, instruction.opcode.removesuffix("-start")
    scattered = root.opcode == "dynamic-slice" and root.operands[0] == instruction.name
    return "reduce-scatter" if kind == "all-reduce" and scattered else kind


def _sent_share(kind: str, group: int) -> float:
    """What each of a group of chips in a ring must send, over the bytes of the collective."""
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group


def _group_size(program: Program, instruction: Instruction) -> int:
    """How many devices take part in a collective together.

    Groups are written as lists {{0,1},{2,3}}, as an array of groups [2,2]<=[4], or as axes of a mesh,
    mesh['a'=4,'b'=2] {'a'}, of which one may be a part, 'a':(1)2, and between which the order of devices may stand.
    """
    if instruction.opcode.startswith("collective-permute"):
        return program.partitions
    groups = _part(r"\breplica_groups=(\S.*)", instruction.rest)
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return len(listed.group(1).split(","))
    if array := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(array.group(1))
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))?\s*\{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2]))
    return program.partitions


# ------------------------------------------------------------------------------------------------------------- memory


def memory_bytes(program: Program) -> float:
    """Bytes that one run reads from and writes to main memory, an instruction's operands and results each once."""
    return sum(
        times * _traffic(program, computation, instruction)
        for computation, instruction, times, fused in _instructions(program)
        if not fused
    )


def _traffic(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes of one instruction: of slices and updates in place just what is touched."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in FREE or opcode.endswith("-done"):
        return 0
    shapes = [computation[operand].shape for operand in operands]
    if opcode in ("copy-start", "slice-start"):  # among the results are both ends
        ends = arrays(instruction.shape)[:2]
        return sum(main for _, main in ends) * min(amount for amount, _ in ends)
    if opcode in ("dynamic-slice", "gather", "slice"):
        return _in_main_memory(instruction.shape) + min(_size(instruction.shape), _in_main_memory(shapes[0]))
    if opcode in ("dynamic-update-slice", "scatter"):
        update = shapes[1 if opcode == "dynamic-update-slice" else -1]
        return _in_main_memory(update) + min(_size(update), _in_main_memory(instruction.shape))
    if opcode == "fusion":
        called = program.computations[_called_computations(instruction)[0]]
        read = sum(_read_bytes(program, called, number, shape) for number, shape in enumerate(shapes))
        return read + _written_bytes(called, instruction.shape)
    return sum(map(_in_main_memory, (*shapes, instruction.shape)))


def _read_bytes(program: Program, fused: Computation, number: int, shape: str) -> float:
    """What a fusion reads of its operand of the given shape: only slices, if it does nothing else with it."""
    whole = _in_main_memory(shape)
    if not whole or number not in fused.parameters:
        return whole
    name, total = fused.parameters[number], 0.0
    for user in fused.users[name]:
        if user.opcode == "bitcast":
            return whole
        if user.opcode == "dynamic-slice" and user.operands[0] == name:
            total += _size(user.shape)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # what is replaced is not read, the rest stays where it is
        elif user.opcode == "tuple" or user.opcode in COLLECTIVES:
            continue  # handed on to the next fusion of a collective that goes on beside them
        elif user.opcode == "fusion":
            inner = program.computations[_called_computations(user)[0]]
            places = [place for place, operand in enumerate(user.operands) if operand == name]
            total += sum(_read_bytes(program, inner, place, shape) for place in places)
        else:
            return whole
    return min(total, whole)


def _written_bytes(fused: Computation, shape: str) -> float:
    """What a fusion writes of its result: of a slice that it updates in place, the slice."""
    root = fused.root
    results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    wholes = [amount * main for amount, main in arrays(shape)]
    if len(results) != len(wholes):
        return sum(wholes)
    return sum(min(whole, _updated(fused, result)) for whole, result in zip(wholes, results, strict=True))


def _updated(fused: Computation, result: Instruction) -> float:
    """Bytes of the update, if a result is an update in place; none if it is handed on as it came."""
    while result.opcode == "bitcast":
        result = fused[result.operands[0]]
    if result.opcode == "parameter" or result.opcode in COLLECTIVES:
        return 0
    return _size(fused[result.operands[1]].shape) if result.opcode == "dynamic-update-slice" else math.inf


def traffic_in_all(found: Iterable[Traffic]) -> float:
    """Bytes that a chip must send, of all kinds."""
    return sum(traffic.sent for traffic in found)
