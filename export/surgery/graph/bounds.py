"""What values a tensor can take, whatever the image and whatever its size: interval arithmetic over the graph.

It answers one question: is this mask without effect, always? Booleans are 0 and 1. Only constants that are in the file
count; what was computed from the example's sizes does not, so nothing is proven by example.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from fna.export.surgery.graph.files import stored_value
from fna.export.surgery.graph.shapes import ShapePoint
from fna.export.surgery.graph.view import STANDARD_DOMAINS, GraphView, attribute, input_names, words

FORWARDS = words("""
    Identity Reshape Transpose Squeeze Unsqueeze Expand Tile Slice Gather GatherElements GatherND Flatten Split Dropout
    CastLike Compress Upsample DepthToSpace SpaceToDepth ReduceMax ReduceMin Ceil Floor Round""")


@dataclass(frozen=True)
class Bounds:
    """Every element lies in `low..high`; `exact` integers and infinities included, NaN excluded."""

    low: float
    high: float

    @property
    def single(self) -> float | None:
        """The one value that all elements have, if so."""
        return self.low if self.low == self.high and math.isfinite(self.low) else None


ANYTHING = Bounds(-math.inf, math.inf)
BOOLEAN = Bounds(0.0, 1.0)


class BoundsFinder:
    """Finds bounds on demand and remembers them."""

    def __init__(self, graph: GraphView, points: list[ShapePoint]) -> None:
        self.graph = graph
        self.point = points[0]
        self.static = all(_declared_static(tensor) for tensor in graph.inputs)
        self.known: dict[str, Bounds] = {}

    def find(self, name: str) -> Bounds:
        """Bounds of one tensor; `ANYTHING` where nothing is known."""
        todo = [name]
        waiting: set[str] = set()
        while todo:
            current = todo[-1]
            if current in self.known:
                todo.pop()
                continue
            node = self.graph.source(current)
            leaf = self._leaf(current, node)
            if leaf is not None or node is None:
                self.known[current] = leaf or self._unknown(current)
                todo.pop()
                continue
            missing = [name for name in input_names(node) if name and name not in self.known]
            if missing and current not in waiting:
                waiting.add(current)
                todo.extend(missing)
                continue
            todo.pop()
            self.known[current] = self._rule(node)
        return self.known[name]

    def _unknown(self, name: str) -> Bounds:
        return BOOLEAN if self.point.types.get(name) == TensorProto.BOOL else ANYTHING

    def _leaf(self, name: str, node: gs.Node | None) -> Bounds | None:
        value = self.graph.constant(name)
        if value is None and self.static:
            value = self.point.values.get(name)
        if value is not None:
            return _bounds_of(value)
        if node is None or node.domain not in STANDARD_DOMAINS:
            return self._unknown(name)
        if node.op in ("Shape", "Size"):
            return Bounds(0.0, math.inf)
        if node.op == "ConstantOfShape":
            tensor = attribute(node, "value")
            fill = 0.0 if tensor is None else float(stored_value(tensor).reshape(-1)[0])
            return Bounds(fill, fill)
        if node.op not in RULES and node.op not in FORWARDS:
            return self._unknown(name)
        return None

    def _rule(self, node: gs.Node) -> Bounds:
        inputs = [self.known[name] for name in input_names(node) if name]
        if not inputs:
            return ANYTHING
        if node.op in FORWARDS:
            return inputs[0]
        try:
            result = RULES[node.op](node, inputs, self)
        except (IndexError, OverflowError, ValueError, ZeroDivisionError):
            return self._unknown(node.outputs[0].name)
        return ANYTHING if math.isnan(result.low) or math.isnan(result.high) else result


def _declared_static(tensor: gs.Variable) -> bool:
    return all(isinstance(size, int) and size > 0 for size in tensor.shape or ())


def _bounds_of(value: np.ndarray) -> Bounds:
    if value.size == 0:
        return Bounds(0.0, 0.0)
    if value.dtype.kind not in "fiub" and value.dtype.name != "bfloat16":
        return ANYTHING
    array = value.astype(np.float64) if value.dtype.kind not in "fiub" else value
    low, high = float(array.min()), float(array.max())
    return ANYTHING if math.isnan(low) or math.isnan(high) else Bounds(low, high)


def _union(*bounds: Bounds) -> Bounds:
    return Bounds(min(bound.low for bound in bounds), max(bound.high for bound in bounds))


def _truth(always: bool, never: bool) -> Bounds:
    return Bounds(1.0, 1.0) if always else Bounds(0.0, 0.0) if never else BOOLEAN


def _product(left: Bounds, right: Bounds) -> Bounds:
    """An infinite end that stands for 'unknown but finite' times 0 is 0; a constant infinity times 0 is NaN: unknown."""
    for one, other in ((left, right), (right, left)):
        if math.isinf(one.low) and one.low == one.high and other.low <= 0 <= other.high:
            return ANYTHING
    corners = [0.0 if a == 0 or b == 0 else a * b for a in (left.low, left.high) for b in (right.low, right.high)]
    return Bounds(min(corners), max(corners))


def _cast(node: gs.Node, inputs: list[Bounds], finder: BoundsFinder) -> Bounds:
    data = inputs[0]
    to = int(attribute(node, "to", 0))
    if to == TensorProto.BOOL:
        return _truth(data.low > 0 or data.high < 0, data.low == data.high == 0)
    if to in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
        if to == TensorProto.FLOAT16:
            limit = 65504.0
            return Bounds(-math.inf if data.low < -limit else data.low, math.inf if data.high > limit else data.high)
        return data
    if math.isfinite(data.low) and math.isfinite(data.high):
        return Bounds(float(math.trunc(data.low)), float(math.trunc(data.high)))
    return Bounds(0.0, math.inf) if data.low >= 0 else ANYTHING


def _where(node: gs.Node, inputs: list[Bounds], finder: BoundsFinder) -> Bounds:
    condition, yes, no = inputs
    if condition.low > 0:
        return yes
    if condition.high == 0:
        return no
    return _union(yes, no)


def _range(node: gs.Node, inputs: list[Bounds], finder: BoundsFinder) -> Bounds:
    start, limit, delta = inputs
    if delta.low > 0:
        return Bounds(start.low, max(start.high, limit.high))
    if delta.high < 0:
        return Bounds(min(start.low, limit.low), start.high)
    return ANYTHING


def _compare(decide: Callable[[Bounds, Bounds], Bounds]) -> Callable[[gs.Node, list[Bounds], BoundsFinder], Bounds]:
    return lambda node, inputs, finder: decide(inputs[0], inputs[1])


def _greater(a: Bounds, b: Bounds) -> Bounds:
    return _truth(a.low > b.high, a.high <= b.low)


def _greater_equal(a: Bounds, b: Bounds) -> Bounds:
    return _truth(a.low >= b.high, a.high < b.low)


def _equal(node: gs.Node, inputs: list[Bounds], finder: BoundsFinder) -> Bounds:
    a, b = inputs
    return _truth(a.single is not None and a.single == b.single, a.high < b.low or b.high < a.low)


def _clip(node: gs.Node, inputs: list[Bounds], finder: BoundsFinder) -> Bounds:
    named = [finder.known[name] if name else None for name in input_names(node)]
    data = inputs[0]
    low = named[1] if len(named) > 1 and named[1] else Bounds(-math.inf, -math.inf)
    high = named[2] if len(named) > 2 and named[2] else Bounds(math.inf, math.inf)
    return Bounds(min(max(data.low, low.low), high.high), min(max(data.high, low.high), high.high))


def _divide(node: gs.Node, inputs: list[Bounds], finder: BoundsFinder) -> Bounds:
    above, below = inputs
    if above.single == 0 and (below.low > 0 or below.high < 0):
        return Bounds(0.0, 0.0)
    if below.single is None or below.single == 0:
        return ANYTHING
    return _product(above, Bounds(1 / below.single, 1 / below.single))


def _reduce_sum(node: gs.Node, inputs: list[Bounds], finder: BoundsFinder) -> Bounds:
    data = inputs[0]
    return Bounds(0.0 if data.low >= 0 else -math.inf, 0.0 if data.high <= 0 else math.inf)


RULES: dict[str, Callable[[gs.Node, list[Bounds], BoundsFinder], Bounds]] = {
    "Abs": lambda n, i, f: Bounds(
        0.0 if i[0].low <= 0 <= i[0].high else min(abs(i[0].low), abs(i[0].high)), max(abs(i[0].low), abs(i[0].high))
    ),
    "Add": lambda n, i, f: Bounds(i[0].low + i[1].low, i[0].high + i[1].high),
    "And": lambda n, i, f: _truth(i[0].low > 0 and i[1].low > 0, i[0].high == 0 or i[1].high == 0),
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda n, i, f: _union(*i),
    "CumSum": _reduce_sum,
    "Div": _divide,
    "Equal": _equal,
    "Exp": lambda n, i, f: Bounds(0.0, math.inf),
    "Greater": _compare(_greater),
    "GreaterOrEqual": _compare(_greater_equal),
    "Less": _compare(lambda a, b: _greater(b, a)),
    "LessOrEqual": _compare(lambda a, b: _greater_equal(b, a)),
    "Max": lambda n, i, f: Bounds(max(x.low for x in i), max(x.high for x in i)),
    "Min": lambda n, i, f: Bounds(min(x.low for x in i), min(x.high for x in i)),
    "Mul": lambda n, i, f: _product(i[0], i[1]),
    "Neg": lambda n, i, f: Bounds(-i[0].high, -i[0].low),
    "Not": lambda n, i, f: Bounds(1 - i[0].high, 1 - i[0].low),
    "Or": lambda n, i, f: _truth(i[0].low > 0 or i[1].low > 0, i[0].high == 0 and i[1].high == 0),
    "Range": _range,
    "ReduceSum": _reduce_sum,
    "Relu": lambda n, i, f: Bounds(max(0.0, i[0].low), max(0.0, i[0].high)),
    "ScatterElements": lambda n, i, f: _union(i[0], i[2]),
    "ScatterND": lambda n, i, f: _union(i[0], i[2]),
    "Sub": lambda n, i, f: Bounds(i[0].low - i[1].high, i[0].high - i[1].low),
    "Trilu": lambda n, i, f: _union(i[0], Bounds(0.0, 0.0)),
    "Where": _where,
    "Xor": lambda n, i, f: BOOLEAN,
}
