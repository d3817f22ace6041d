"""ONNX nodes written as nested expressions: `op.Softmax(op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2])), axis=-1)`.

A value is a tensor's name. Nodes come out as `NodeProto`, so the same expression makes a function's body, a loop's body, or nodes
that surgery puts into a graph. The recorders of onnx_ir and onnxscript take no plain numbers at opset 14, or insert casts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

from fna.errors import InvalidArgumentError

LOWEST_OPSET, HIGHEST_OPSET = 14, 24
"""Of the standard operators; function bodies exist for these."""

_AXES_BECAME_AN_INPUT = {"Slice": 10, "ReduceSum": 13, "Squeeze": 13, "Unsqueeze": 13}
_OTHER_REDUCTIONS = 18
"""The opset at which `axes` of every other reduction became an input."""


class Builder:
    """Writes nodes of one opset; every attribute of it that is not a method is an operator: `op.MatMul(a, b)`.

    Inputs are values, `None` for an optional one that is absent, or constants: numbers, lists of numbers and arrays; whole numbers
    are int64, the others fp32. `axes` is an attribute here whatever the opset. `to` may be a type's name, such as `"INT32"`.
    `name` names the result, which is the layer's name in an engine; `outputs` is the number of results, 1 unless given. Equal
    expressions become one node.

    Attributes:
        opset: version of the standard operators.
        nodes: what was written so far, in order.
    """

    def __init__(
        self,
        opset: int,
        *,
        types: Mapping[str, int] | None = None,
        prefix: str = "",
        taken: set[str] | None = None,
        parent: Builder | None = None,
    ) -> None:
        """Start without nodes.

        Args:
            opset: version of the standard operators.
            types: ONNX element types of the inputs, by name, undefined where they are not known.
            prefix: of all names, for nodes that go into a graph that has others.
            taken: names that there are already; new ones are added to it.
            parent: the builder whose values a loop's body may use.

        Raises:
            InvalidArgumentError: for an opset outside `LOWEST_OPSET` to `HIGHEST_OPSET`.
        """
        check_opset(opset)
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self._types = dict(types or {})
        self._prefix = prefix
        self._parent = parent
        self._taken: set[str] = parent._taken if parent else set() if taken is None else taken
        self._taken.update(self._types)
        self._written: dict[bytes, NodeProto] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        """Return what writes a node of the operator `op_type`."""
        if not op_type[0].isupper():
            raise AttributeError(op_type)
        return partial(self._write, op_type)

    def attribute(self, name: str, kind: str = "FLOAT") -> str:
        """Return the value of an attribute of the function whose body this is; `kind`: FLOAT, INT, FLOATS or INTS."""
        node = helper.make_node("Constant", [], [""])
        node.attribute.append(
            AttributeProto(
                name=f"value_{kind.lower()}", type=AttributeProto.AttributeType.Value(kind), ref_attr_name=name
            )
        )
        return str(self._add(node, name).output[0])

    def reference(self, name: str, kind: str = "FLOAT") -> AttributeProto:
        """Return an attribute of the function whose body this is, for a node's attribute: `op.Selu(x, alpha=op.reference("a"))`."""
        return AttributeProto(type=AttributeProto.AttributeType.Value(kind), ref_attr_name=name)

    def as_float(self, value: str) -> str:
        """Return an input as fp32: itself where it is known to be that."""
        if self._types.get(value) == TensorProto.FLOAT:
            return value
        return str(self.Cast(value, to=TensorProto.FLOAT))

    def as_type_of(self, value: str, like: str, name: str | None = None) -> str:
        """Return an fp32 value in the type of the input `like`: itself where that is fp32.

        Raises:
            InvalidArgumentError: at opset 14, which has no CastLike, if the type of `like` is not known.
        """
        known = self._types.get(like, TensorProto.UNDEFINED)
        if known == TensorProto.FLOAT:
            return value
        if known != TensorProto.UNDEFINED:
            return str(self.Cast(value, to=known, name=name))
        if self.opset < 15:
            raise InvalidArgumentError(f"opset 14 has no CastLike: the element type of {like} must be given")
        return str(self.CastLike(value, like, name=name))

    def subgraph(
        self,
        function: Callable[..., Sequence[str]],
        inputs: Mapping[str, tuple[str, list[Any]]],
        outputs: Sequence[Any],
    ) -> GraphProto:
        """Return the body of a loop.

        Args:
            function: takes a builder and the inputs' values, and returns the results' values.
            inputs: type's name and shape of each input, by its name.
            outputs: type's name and shape of each result.
        """
        inner = Builder(self.opset, parent=self)
        names = [inner._name(name) for name in inputs]
        results = function(inner, *names)
        return helper.make_graph(
            inner.nodes,
            "body",
            [_typed(name, *described) for name, described in zip(names, inputs.values(), strict=True)],
            [_typed(name, *described) for name, described in zip(results, outputs, strict=True)],
        )

    def rename(self, value: str, name: str) -> None:
        """Give a value another name, in the node that makes it and in those that take it."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for position, other in enumerate(names):
                    if other == value:
                        names[position] = name

    def _write(
        self, op_type: str, *inputs: Any, name: str | None = None, outputs: int = 1, **attributes: Any
    ) -> str | tuple[str, ...]:
        axes = attributes.pop("axes", None)
        if axes is not None and self.opset >= self._axes_opset(op_type):
            inputs = (*inputs, axes)
        elif axes is not None:
            attributes["axes"] = axes
        if isinstance(attributes.get("to"), str):
            attributes["to"] = TensorProto.DataType.Value(attributes["to"])
        values = [
            "" if value is None else value if isinstance(value, str) else self._constant(value) for value in inputs
        ]
        references = {
            key: attributes.pop(key) for key in list(attributes) if isinstance(attributes[key], AttributeProto)
        }
        made = helper.make_node(op_type, values, [""] * outputs, **attributes)
        for key, reference in references.items():
            made.attribute.append(reference)
            made.attribute[-1].name = key
        node = self._add(made, name or op_type)
        return str(node.output[0]) if outputs == 1 else tuple(node.output)

    def _axes_opset(self, op_type: str) -> int:
        return _AXES_BECAME_AN_INPUT.get(op_type, _OTHER_REDUCTIONS)

    def _constant(self, value: Any) -> str:
        tensor = numpy_helper.from_array(_as_array(value))
        return str(self._add(helper.make_node("Constant", [], [""], value=tensor), "constant").output[0])

    def _add(self, node: NodeProto, stem: str) -> NodeProto:
        """Add a node whose results have no names yet, or return the equal one that is there."""
        key = node.SerializeToString(deterministic=True)
        known = self._find(key)
        if known is not None:
            return known
        several = len(node.output) > 1
        node.output[:] = [self._name(f"{stem}_{number}" if several else stem) for number in range(len(node.output))]
        self.nodes.append(node)
        self._written[key] = node
        return node

    def _find(self, key: bytes) -> NodeProto | None:
        return self._written.get(key) or (self._parent._find(key) if self._parent else None)

    def _name(self, stem: str) -> str:
        name, number = f"{self._prefix}{stem}", 1
        while name in self._taken:
            number += 1
            name = f"{self._prefix}{stem}_{number}"
        self._taken.add(name)
        return name


def check_opset(opset: int) -> None:
    """Raise InvalidArgumentError for an opset that no function body exists for."""
    if not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise InvalidArgumentError(
            f"opset {opset} was asked for, but FNA function bodies exist for {LOWEST_OPSET} to {HIGHEST_OPSET}; "
            "convert the model with onnx.version_converter first"
        )


def _as_array(value: Any) -> NDArray[Any]:
    array = np.asarray(value)
    if isinstance(value, np.ndarray | np.generic):
        return array
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64 if array.dtype.kind == "i" else array.dtype)


def _typed(name: str, kind: str, shape: list[Any]) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.DataType.Value(kind), shape)
