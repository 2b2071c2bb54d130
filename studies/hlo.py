"""Read an optimised program of XLA: its kernels, and what each of them reads, writes and computes.

`aot.py` uses this for programs that were compiled for devices that are not there. Everything is
read from the text; nothing is measured.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    """A line of a program: `name = type op(operands), rest`."""

    name: str
    type: str
    op: str
    operands: list[str]
    rest: str
    root: bool

    def attribute(self, pattern: str) -> str:
        """What the first group of a pattern matches in the rest of the line, or nothing."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


class Kernel(NamedTuple):
    """One launch on a device, in the order of the schedule.

    Attributes:
      op: the name of its operation, for a custom call that of its target.
      times: how often it is launched, which is more than once inside a loop.
      read, written: bytes of main memory, each operand and result once, and of a slice the slice.
      flops: operations of its convolutions and products, each multiplication and addition as two.
      paths: the lines of the model that it computes, as JAX names them.
      line: the instruction.
    """

    op: str
    times: int
    read: int
    written: int
    flops: int
    paths: str
    line: Instruction


FREE = ("parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all")
"""Operations for which nothing is launched."""

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
TARGET = r'custom_call_target="([^"]*)"'


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of that which it starts with."""
    computations, entry, name = {}, "", ""
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            name = head[2]
            computations[name] = {}
            entry = name if head[1] else entry
        elif name and (found := _instruction(line)):
            computations[name][found.name] = found
    return computations, entry


def _instruction(line):
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else re.match(r"\S+", rest).end()
    kind, rest = rest[:end], rest[end:].lstrip()
    op = re.match(r"[\w\-]+", rest)
    if not op:
        return None
    end = op.end() + _closing(rest[op.end() :])
    operands = rest[op.end() + 1 : end - 1]
    named = re.findall(r"%([\w.\-]+)", operands) or [operands]
    return Instruction(head[2], kind, op[0], named, rest[end:], bool(head[1]))


def _closing(text):
    """Where the first parenthesis of a text is closed."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return at + 1
    return len(text)


def arrays(kind: str) -> list[tuple[str, list[int]]]:
    """The element types and shapes of a type, which may be a tuple.

    >>> arrays("(bf16[8,3]{1,0}, u8[0]{0})")
    [('bf16', [8, 3]), ('u8', [0])]
    """
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\]", kind)
    return [(dtype, [int(n) for n in shape.split(",") if n]) for dtype, shape in found]


def size(kind: str) -> int:
    """Bytes of a type."""
    return sum(_bytes(*each) for each in arrays(kind))


def _bytes(dtype, shape):
    bits = re.search(r"\d+", dtype)
    return math.prod(shape) * int(bits[0] if bits else 8) // 8  # a boolean takes a byte


def kernels(text: str) -> list[Kernel]:
    """All that a program launches, in order; what tests whether a loop goes on is left out."""
    computations, entry = parse(text)
    return list(_launches(computations, entry, 1))


def _launches(computations, name, times) -> Iterator[Kernel]:
    computation = computations[name]
    for i in computation.values():
        called = i.attribute(r"(?:body|to_apply|calls)=%?([\w.\-]+)")
        inside = computations.get(called, {}) if i.op == "fusion" else {}
        if i.op in ("while", "call", "async-start"):
            rounds = i.attribute(r'known_trip_count":\{"n":"(\d+)"') or 1
            yield from _launches(computations, called, times * int(rounds))
        elif i.op not in FREE and not i.op.endswith("-done"):
            paths = (x.attribute(r'op_name="([^"]*)"') for x in (i, *inside.values()))
            yield Kernel(
                op=i.attribute(TARGET) or i.op,
                times=times,
                read=_read(computation, i, inside),
                written=_written(computation, i, inside),
                flops=sum(_flops(inside, x) for x in inside.values()) or _flops(computation, i),
                paths=" ".join(dict.fromkeys(filter(None, paths))),
                line=i,
            )


def _read(computation, i, inside):
    """Bytes of the operands of an instruction; a fusion may use only a slice of them."""
    if inside:
        return sum(_used(inside, x) for x in inside.values() if x.op == "parameter")
    sizes = [size(computation[name].type) for name in i.operands if name in computation]
    return sum(_slice(i, at, whole) for at, whole in enumerate(sizes))


def _used(computation, value):
    """Bytes of a value that the instructions of a fusion read."""
    whole = size(value.type)
    total = 0
    for i in computation.values():
        for at, name in enumerate(i.operands):
            if name == value.name:
                total += _used(computation, i) if i.op == "bitcast" else _slice(i, at, whole)
    return min(total, whole)


def _slice(i, at, whole):
    """Bytes of its operand number `at` that an instruction reads."""
    if at == 0 and i.op in ("dynamic-slice", "slice", "gather"):
        return size(i.type)
    return 0 if at == 0 and i.op == "dynamic-update-slice" else whole


def _written(computation, i, inside):
    """Bytes of the result: of one that is updated in place, those of the update."""
    if inside:
        return _written(inside, next(x for x in inside.values() if x.root), {})
    if i.op == "tuple":
        return sum(_written(computation, computation[name], {}) for name in i.operands)
    if i.op == "bitcast":
        return _written(computation, computation[i.operands[0]], {})
    if i.op == "dynamic-update-slice":
        return size(computation[i.operands[1]].type)
    if i.op == "custom-call":  # bytes without a type are a kernel's scratch
        return sum(_bytes(*each) for each in arrays(i.type) if each[0] not in ("s8", "u8"))
    if i.op in ("all-gather-start", "copy-start", "collective-permute-start"):  # (operands, result)
        return size(i.type) - _read(computation, i, {})
    return size(i.type)


def _flops(computation, i):
    """Operations of an instruction that is a convolution, a product or cuDNN's attention."""
    target = i.attribute(TARGET)
    operands = [arrays(computation[name].type) for name in i.operands if name in computation]
    shapes = [each[0][1] for each in operands if each] + [x[1] for x in arrays(i.type)[:1]]
    if i.op == "convolution" or target.startswith("__cudnn$conv"):
        left, right, out = *shapes[:2], shapes[-1]
        if "BackwardInput" in target:
            left, out = out, left
        elif "BackwardFilter" in target:
            right, out = out, right
        return 2 * _of_convolution(i.attribute(r"dim_labels=([\w>\-]+)"), left, right, out)
    if i.op == "dot" or target.startswith("__cublas"):
        axes = i.attribute(r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([^\]}]*)')
        contracted = math.prod(shapes[0][int(axis)] for axis in re.findall(r"\d+", axes))
        return 2 * math.prod(shapes[-1]) * contracted
    if target.startswith("__cudnn$fmha"):
        (_, tokens, _, _), products = shapes[1], 4 if "Backward" in target else 2
        return 2 * products * math.prod(shapes[0]) * tokens
    return 0


def _of_convolution(labels, image, kernel, out):
    """Its multiplications, as `diffjax.training.telemetry.flops` counts them."""
    i, k, o = re.split("_|->", labels)
    places = 1
    for axis in filter(str.isdigit, i):
        sizes = image[i.index(axis)], kernel[k.index(axis)], out[o.index(axis)]
        places *= math.prod(sorted(sizes)[:2])
    return places * out[o.index("b")] * out[o.index("f")] * kernel[k.index("i")]


class Collective(NamedTuple):
    """A communication between devices.

    Attributes:
      op: its operation.
      size: bytes of its result on one device.
      meanwhile: names of the kernels that are launched before its end is waited for.
    """

    op: str
    size: int
    meanwhile: list[str]


def collectives(text: str) -> list[Collective]:
    """The communications of a program outside its loops, in the order of the schedule."""
    computations, entry = parse(text)
    lines = list(computations[entry].values())
    found = []
    for at, i in enumerate(lines):
        inside = computations.get(i.attribute(r"calls=%?([\w.\-]+)"), {})
        each = next((x for x in (i, *inside.values()) if x.op.startswith(COLLECTIVES)), None)
        if each is None or i.op.endswith("-done"):
            continue
        ends = (n for n, x in enumerate(lines) if x.op.endswith("-done") and i.name in x.operands)
        between = lines[at + 1 : next(ends, at + 1)]
        names = [x.name for x in between if x.op not in FREE and not x.op.endswith("-done")]
        size_ = _written(computations[entry] if each is i else inside, each, {})
        found.append(Collective(each.op.removesuffix("-start"), size_, names))
    return found
