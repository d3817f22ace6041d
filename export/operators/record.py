"""What is written down about one ONNX operator of domain `fna`: signature, attributes, body, translation from PyTorch, plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from onnx import FunctionProto, NodeProto, TensorProto
from onnx.defs import OpSchema

from fna.errors import InvalidArgumentError
from fna.export.operators.builder import Builder, check_opset
from fna.samplers.common.record import ONNX_DOMAIN

DOMAIN = ONNX_DOMAIN
DOMAIN_VERSION = 1
MASKED_DOMAIN_VERSION = 2
"""From here on FastNystromAttention has an optional sixth input, `key_mask`; files that do not use it stay at version 1."""
FOCAL_DOMAIN_VERSION = 3
"""From here on there is FocalAttention."""
MASKED_FOCAL_DOMAIN_VERSION = 4
"""From here on it has an optional input `key_mask`."""
CORE_DOMAIN_VERSION = 5
"""From here on FastNystromAttention says which core it has; files whose nodes all have Newton-Schulz do not use it."""

_FLOAT_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_TYPE_NAMES = {"INT32": "tensor(int32)", "FLOAT": "tensor(float)"}

Translation = Callable[..., Any]
"""Takes what writes a node, then the torch operator's arguments; returns the node's results."""


@dataclass(frozen=True)
class FormalParameter:
    """An input or output.

    Attributes:
        name: in the signature and in the body.
        type: `T`, the type of the floating-point tensors, or a fixed one: FLOAT, INT32.
        since: the version of the domain that it came with; inputs that came later are optional.
    """

    name: str
    type: Literal["T", "FLOAT", "INT32"] = "T"
    since: int = DOMAIN_VERSION


@dataclass(frozen=True)
class FormalAttribute:
    """An attribute.

    Attributes:
        name: in the signature.
        kind: the body is written for the value of an INT or a STRING; it reads that of a FLOAT when it runs.
        default: what a node without it means; None for those that every node must have.
        since: the version of the domain that it came with.
        written: whether the body is written for its value, although it is a FLOAT.
        alone: whether naming it calls for `since`; others come with an input or an attribute that does.
        choices: of a STRING.
    """

    name: str
    kind: Literal["INT", "FLOAT", "STRING"] = "INT"
    default: int | float | str | None = None
    since: int = DOMAIN_VERSION
    written: bool = False
    alone: bool = False
    choices: tuple[str, ...] = ()

    @property
    def shapes_body(self) -> bool:
        """Whether the body is written for its value."""
        return self.written or self.kind != "FLOAT"

    def plain(self, value: Any) -> Any:
        """Return a node's value as the body is written for it: a FLOAT as fp32 has it, in its shortest form.

        Raises:
            InvalidArgumentError: for a STRING that is not one of the choices.
        """
        if self.kind == "FLOAT":
            return float(str(np.float32(value)))
        if self.kind == "INT":
            return int(value)
        if value not in self.choices:
            raise InvalidArgumentError(f"attribute {self.name} is {value!r}, but {' or '.join(self.choices)} is needed")
        return str(value)


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator.

    Attributes:
        name: the op type.
        inputs: in order.
        outputs: in order.
        body: takes a `Builder`, the inputs' values, None for absent ones, and by name the attributes that it is written for; returns
            the outputs' values.
        fused_body: the same with ONNX Attention, which opset 23 brings, for every product with N rows, in the type of the inputs.
            None: there is no such product.
        attributes: in order.
        torch_operators: how each torch operator of `torch.ops.fna` becomes a node, by its name. None: its arguments are the inputs,
            then the attributes.
        plugin: whether a TensorRT plugin implements it; other operators are always inlined.
        attends: whether it is a block's attention; every other operator chooses what attention looks at.
        approximates: whether it takes the place of exact attention.
        typed: whether the body is written for one type of `T`, where that is known.
        since: the version of the domain that it came with.
    """

    name: str
    inputs: tuple[FormalParameter, ...]
    outputs: tuple[FormalParameter, ...]
    body: Callable[..., str | tuple[str, ...]]
    fused_body: Callable[..., str | tuple[str, ...]] | None = None
    attributes: tuple[FormalAttribute, ...] = ()
    torch_operators: Mapping[str, Translation | None] = field(default_factory=dict)
    plugin: bool = False
    attends: bool = False
    approximates: bool = False
    typed: bool = False
    since: int = DOMAIN_VERSION

    def version(self, inputs: Sequence[str], attributes: Mapping[str, Any]) -> int:
        """Return the version of the domain that a node with these inputs needs; absent ones are empty or left out."""
        present = [formal.since for formal, name in zip(self.inputs, inputs, strict=False) if name]
        named = [attribute.since for attribute in self.attributes if attribute.alone and attribute.name in attributes]
        return max([self.since, *present, *named])

    def attributes_at(self, version: int) -> list[FormalAttribute]:
        """Return the attributes that a node of one version of the domain has, without the plugin's."""
        return [attribute for attribute in self.attributes if attribute.since <= version]

    def plugin_fields(self, version: int) -> dict[str, str]:
        """Return what TensorRT looks a plugin up by: empty for operators that no plugin implements.

        A plugin's version counts the versions of the domain at which its operator changed.
        """
        came = [formal.since for formal in self.inputs] + [attribute.since for attribute in self.attributes]
        changes = {self.since, *came}
        number = sum(self.since <= change <= version for change in changes)
        return {"plugin_version": str(number), "plugin_namespace": ""} if self.plugin else {}

    def make_node(self, inputs: Sequence[str], outputs: Sequence[str], name: str, **attributes: Any) -> NodeProto:
        """Return a node that calls this operator.

        Raises:
            InvalidArgumentError: for an attribute that it does not have, or one missing that has no default.
        """
        version = self.version(inputs, attributes)
        return onnx.helper.make_node(
            self.name, inputs, outputs, name=name, domain=DOMAIN, **self._complete(attributes, version)
        )

    def is_called_by(self, node: NodeProto) -> bool:
        """Whether a node calls this operator."""
        return bool(node.domain == DOMAIN and node.op_type == self.name)

    def variant(
        self, inputs: Sequence[str], element_type: int, attributes: Mapping[str, Any], node: str = ""
    ) -> FunctionVariant:
        """Return what the body for a node depends on; `node` names it in errors.

        Raises:
            InvalidArgumentError: if an attribute that the body is written for is missing.
        """
        version = self.version(inputs, attributes)
        values = self._complete(attributes, version, node)
        shaping = [attribute for attribute in self.attributes_at(version) if attribute.shapes_body]
        settings = tuple((attribute.name, attribute.plain(values[attribute.name])) for attribute in shaping)
        given = {formal.name for formal, name in zip(self.inputs, inputs, strict=False) if name}
        optional = (formal.name for formal in self.inputs if self.since < formal.since <= version)
        absent = tuple(name for name in optional if name not in given)
        return FunctionVariant(self, version, element_type if self.typed else TensorProto.UNDEFINED, settings, absent)

    def schema(self, version: int = DOMAIN_VERSION) -> OpSchema:
        """Return the signature as of one version of the domain."""
        version = max(version, self.since)
        kinds: dict[str, str] = {attribute.name: attribute.kind for attribute in self.attributes_at(version)}
        kinds |= dict.fromkeys(self.plugin_fields(version), "STRING")
        generic = any(formal.type == "T" for formal in self.inputs)
        return OpSchema(
            self.name,
            DOMAIN,
            version,
            inputs=[self._schema_parameter(formal) for formal in self.inputs if formal.since <= version],
            outputs=[self._schema_parameter(formal) for formal in self.outputs],
            type_constraints=[("T", _FLOAT_TYPES, "type of the floating-point tensors")] if generic else [],
            attributes=[
                OpSchema.Attribute(name, OpSchema.AttrType[kind], "", required=False) for name, kind in kinds.items()
            ],
        )

    def translations(self, make_node: Callable[..., Any]) -> Iterator[tuple[str, Translation]]:
        """Yield how each torch operator becomes a node, by its name; `make_node` takes operator, inputs and attributes."""

        def write(*inputs: Any, **attributes: Any) -> Any:
            return make_node(self, inputs, {name: _plain(value) for name, value in attributes.items()})

        def in_order(write: Translation, *arguments: Any) -> Any:
            count = len(self.inputs)
            names = [attribute.name for attribute in self.attributes]
            return write(*arguments[:count], **dict(zip(names, arguments[count:], strict=True)))

        for name, translation in self.torch_operators.items():
            yield name, _bind(translation or in_order, write)

    def _schema_parameter(self, formal: FormalParameter) -> OpSchema.FormalParameter:
        options = OpSchema.FormalParameterOption
        return OpSchema.FormalParameter(
            formal.name,
            _TYPE_NAMES.get(formal.type, formal.type),
            param_option=options.Optional if formal.since > self.since else options.Single,
        )

    def _complete(self, attributes: Mapping[str, Any], version: int, node: str = "") -> dict[str, Any]:
        """Attributes of a node with defaults filled in and the plugin's fields added."""
        known = self.attributes_at(version)
        fields = self.plugin_fields(version)
        wrong = set(attributes) - {attribute.name for attribute in known} - set(fields)
        missing = [
            attribute.name for attribute in known if attribute.default is None and attribute.name not in attributes
        ]
        if wrong or missing:
            problem = f"has no attribute {sorted(wrong)[0]}" if wrong else f"needs the attribute {missing[0]}"
            raise InvalidArgumentError(f"node {node!r}: {DOMAIN}::{self.name} {problem}")
        values = {attribute.name: attributes.get(attribute.name, attribute.default) for attribute in known}
        return {**values, **fields}


@dataclass(frozen=True)
class FunctionVariant:
    """What the body of one operator depends on, besides the opset.

    Attributes:
        operator: whose body it is.
        version: of the domain; inputs that came later are absent.
        element_type: of the inputs of type `T`; undefined for a body that takes any.
        settings: the attributes that the body is written for, and their values.
        absent: optional inputs of this version that are left out.
        cuts: where the pieces that the body works in begin and end; empty for a body in one.
    """

    operator: Operator
    version: int
    element_type: int
    settings: tuple[tuple[str, int | float | str], ...]
    absent: tuple[str, ...] = ()
    cuts: tuple[int, ...] = ()

    @property
    def overload(self) -> str:
        """The name that tells this variant from others of the same operator in one file."""
        kind = "any" if self.element_type == TensorProto.UNDEFINED else TensorProto.DataType.Name(self.element_type)
        without = [f"no_{name}" for name in self.absent]
        settings = [f"{name}{value}" for name, value in self.settings]
        pieces = [f"cut{'_'.join(map(str, self.cuts))}"] if self.cuts else []
        return "_".join([kind.lower(), f"v{self.version}", *without, *settings, *pieces])

    def make_function(self, opset: int, overload: str = "", *, fused: bool = False) -> FunctionProto:
        """Return the function for one opset, with the operator's fused body where it has one and `fused` is set.

        Raises:
            InvalidArgumentError: for an opset outside 14 to 24; for opset 14 without an element type (it has no CastLike).
        """
        check_opset(opset)
        operator = self.operator
        present = [
            formal for formal in operator.inputs if formal.since <= self.version and formal.name not in self.absent
        ]
        types = {
            formal.name: self.element_type if formal.type == "T" else TensorProto.DataType.Value(formal.type)
            for formal in present
        }
        outputs = [formal.name for formal in operator.outputs]
        op = Builder(opset, types=types, taken=set(outputs))
        values = [formal.name if formal in present else None for formal in operator.inputs]
        body = operator.fused_body if fused and operator.fused_body else operator.body
        cuts = {"cuts": self.cuts} if self.cuts else {}
        results = body(op, *values, **dict(self.settings), **cuts)
        for value, name in zip([results] if isinstance(results, str) else results, outputs, strict=True):
            op.rename(value, name)
        function = onnx.helper.make_function(
            DOMAIN,
            operator.name,
            [formal.name for formal in present],
            outputs,
            op.nodes,
            [onnx.helper.make_opsetid("", opset)],
            [attribute.name for attribute in operator.attributes if not attribute.shapes_body],
        )
        function.overload = overload
        function.attribute_proto.extend(
            onnx.helper.make_attribute(name, value)
            for name, value in {**dict(self.settings), **operator.plugin_fields(self.version)}.items()
        )
        return function


def _bind(translation: Translation, write: Callable[..., Any]) -> Translation:
    """The exporter looks at the name of what it calls, which a partial does not have."""

    def translate(*arguments: Any) -> Any:
        return translation(write, *arguments)

    return translate


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value
