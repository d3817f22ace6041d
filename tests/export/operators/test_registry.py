"""The list of operators: one record each, and nothing else that names them."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from operator_files import one_node_model, run

import fna.export.operators
from fna.errors import InvalidArgumentError
from fna.export.operators.builder import Builder
from fna.export.operators.record import DOMAIN, FormalAttribute, FormalParameter, Operator
from fna.export.operators.registry import (
    OPERATORS,
    attach_functions,
    fna_nodes,
    has_plugin,
    plugin_operators,
    translation_table,
    variant_of,
)
from fna.export.passes.lower import lower
from fna.export.sources.loading import LoadedModel
from fna.export.trace import TraceOptions, trace_model
from fna.plan import uniform_plan

ROOT = Path(__file__).parents[3]


def test_every_operator_is_a_record_in_a_file_of_its_name() -> None:
    folder = Path(fna.export.operators.__path__[0])
    files = {module.name for module in pkgutil.iter_modules([str(folder)])}
    shared = {"builder", "onnx_attention", "record", "registry", "shared_expressions"}
    records = {}
    for name in files - shared:
        module = importlib.import_module(f"fna.export.operators.{name}")
        records[getattr(module, name.upper()).name] = getattr(module, name.upper())
    assert records == OPERATORS


def test_no_other_file_of_the_product_spells_an_operators_name() -> None:
    """Those that cannot import the records: what the plugin registers, and bundles that run without this package."""
    allowed = {"plugins", "engines/run", "engines/bundle"}
    spelt = [
        str(path.relative_to(ROOT))
        for folder in ("export", "validate", "engines", "fna")
        for path in (ROOT / folder).rglob("*.py")
        if path.parent != ROOT / "export" / "operators"
        and not any(path.is_relative_to(ROOT / other) for other in allowed)
        and any(f'"{name}"' in path.read_text() for name in OPERATORS)
    ]
    assert spelt == []


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda operator: operator.name)
def test_schema_function_and_torch_operator_have_one_signature(operator: Operator) -> None:
    values: dict[str, Any] = {"INT": 4, "FLOAT": 0.25}
    attributes = {formal.name: values.get(formal.kind, formal.default) for formal in operator.attributes}
    for version in {operator.since, *(formal.since for formal in (*operator.inputs, *operator.attributes))}:
        schema = operator.schema(version)
        inputs = [formal.name for formal in operator.inputs if formal.since <= version]
        known = {attribute.name for attribute in operator.attributes_at(version)}
        variant = operator.variant(
            inputs, TensorProto.FLOAT, {name: value for name, value in attributes.items() if name in known}
        )
        function = variant.make_function(18)
        assert [formal.name for formal in schema.inputs] == list(function.input) == inputs
        assert [formal.name for formal in schema.outputs] == list(function.output)
        declared = {*function.attribute, *(attribute.name for attribute in function.attribute_proto)}
        assert set(schema.attributes) == declared
    for name in operator.torch_operators:
        arguments = [argument.name for argument in getattr(torch.ops.fna, name).default._schema.arguments]
        assert set(arguments) <= {formal.name for formal in operator.inputs} | set(attributes)


def test_every_torch_operator_of_ours_has_a_translation() -> None:
    written = {operator.name() for operator in translation_table()}  # type: ignore[attr-defined]
    assert written == {f"fna::{name}" for operator in OPERATORS.values() for name in operator.torch_operators}
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fna::")}
    assert {name.split(".")[0] for name in ours} - {name.split(".")[0] for name in written} == set()


def test_plugins_are_those_whose_records_say_so() -> None:
    assert set(plugin_operators()) == {"FastNystromAttention", "FarthestPointSampling", "FocalAttention"}


def test_an_operator_is_registered_by_its_record_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(op: Builder, features: str, *, times: int) -> str:
        return str(op.Mul(op.ReduceSum(features, axes=[1], keepdims=0), float(times)))

    toy = Operator(
        "ToySum",
        inputs=(FormalParameter("features"),),
        outputs=(FormalParameter("total"),),
        attributes=(FormalAttribute("times", default=3),),
        body=body,
    )
    monkeypatch.setitem(OPERATORS, toy.name, toy)
    model = one_node_model(toy, {"features": TensorProto.FLOAT}, {"total": TensorProto.FLOAT}, 24)
    features = np.ones((2, 5, 4), np.float32)
    (node,) = fna_nodes(model.graph)
    assert not has_plugin(node)
    for form in (model, lower(model, "plugin")):
        np.testing.assert_array_equal(run(form, {"features": features})[0], np.full((2, 4), 15.0))


def test_a_new_plugin_operator_is_kept_by_the_plugin_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Operator(
        "ToyCopy",
        inputs=(FormalParameter("tokens"),),
        outputs=(FormalParameter("copy"),),
        body=lambda op, tokens: op.Identity(tokens),
        plugin=True,
    )
    monkeypatch.setitem(OPERATORS, toy.name, toy)
    model = one_node_model(toy, {"tokens": TensorProto.FLOAT}, {"copy": TensorProto.FLOAT}, 18)
    (node,) = lower(model, "plugin").graph.node
    assert {attribute.name for attribute in node.attribute} == {"plugin_version", "plugin_namespace"}


def test_nodes_without_the_plugins_fields_get_them() -> None:
    plain = helper.make_node("FarthestPointSampling", ["features"], ["out"], domain=DOMAIN, num_landmarks=3)
    graph = helper.make_graph([plain], "test", [], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    for _ in range(2):
        attach_functions(model)
    (node,) = fna_nodes(model.graph)
    fields = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert len(node.attribute) == len(fields)
    assert fields == {"num_landmarks": 3, "plugin_version": b"1", "plugin_namespace": b""}


def test_nodes_that_no_record_describes_are_refused() -> None:
    stranger = helper.make_node("Nothing", ["features"], ["out"], name="here", domain=DOMAIN)
    with pytest.raises(InvalidArgumentError, match="node 'here' is fna::Nothing, which is not one"):
        variant_of(stranger)
    bare = helper.make_node("FarthestPointSampling", ["features"], ["out"], name="here", domain=DOMAIN)
    with pytest.raises(InvalidArgumentError, match="node 'here': .* needs the attribute num_landmarks"):
        variant_of(bare)
    with pytest.raises(InvalidArgumentError, match="FarthestPointSampling has no attribute count"):
        OPERATORS["FarthestPointSampling"].make_node(["features"], ["out"], "here", num_landmarks=3, count=3)


@pytest.mark.parametrize("opset", [13, 25])
def test_other_opsets_are_refused_by_number(opset: int) -> None:
    node = OPERATORS["FarthestPointSampling"].make_node(["features"], ["landmarks"], "here", num_landmarks=3)
    model = helper.make_model(
        helper.make_graph([node], "test", [], []), opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )
    with pytest.raises(InvalidArgumentError, match=f"opset {opset}.*14 to 24"):
        attach_functions(model)


def test_a_trace_at_the_highest_opset_computes_what_one_at_18_computes(tiny_model: LoadedModel) -> None:
    plan = uniform_plan(4, layers="1-2", landmarks=6, sampler="norm-grid")
    pixels = torch.randn(2, 3, 56, 56).numpy()
    low, high = (trace_model(tiny_model, plan, TraceOptions(56, 56, opset=opset))[0] for opset in (18, 24))
    assert {imported.domain: imported.version for imported in high.opset_import}[""] == 24
    for given, wanted in zip(run(high, {"pixel_values": pixels}), run(low, {"pixel_values": pixels}), strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5)
