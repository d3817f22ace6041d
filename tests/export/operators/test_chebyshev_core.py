"""FastNystromAttention with the cheaper core: its bodies on onnxruntime against PyTorch, and the versions that such nodes have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto
from operator_files import one_node_model, run

from fna.attention import fast_nystrom_attention
from fna.chebyshev import ChebyshevSteps
from fna.errors import InvalidArgumentError
from fna.export.operators.builder import HIGHEST_OPSET, LOWEST_OPSET
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION, core_of
from fna.export.operators.record import DOMAIN
from fna.export.operators.registry import attach_functions, fna_nodes, node_attributes, translation_table
from fna.export.passes.lower import lower

OPSETS = range(LOWEST_OPSET, HIGHEST_OPSET + 1)
NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
TOLERANCE = {TensorProto.FLOAT: 2e-5, TensorProto.FLOAT16: 4e-3}
STEPS = ChebyshevSteps(8, 0.05)
CHEBYSHEV = {"core": "chebyshev", "steps": 8, "low": 0.05}
every_mask = pytest.mark.parametrize("mask", [None, "hidden", "sink"])


def node_model(opset: int, element: int = TensorProto.FLOAT, mask: str | None = None, **settings: Any) -> ModelProto:
    kinds = dict.fromkeys(("query", "key", "value"), element)
    kinds |= {"landmarks": TensorProto.INT32, "landmark_bias": TensorProto.FLOAT}
    if mask is not None:
        kinds["key_mask"] = TensorProto.INT32
        settings["sink"] = int(mask == "sink")
    settings = {"scale": 0.25, "exact_rows": 1, **settings}
    return one_node_model(FAST_NYSTROM_ATTENTION, kinds, {"out": element}, opset, element, **settings)


def make_inputs(count: int, element: int = TensorProto.FLOAT, mask: str | None = None) -> dict[str, Any]:
    """37 tokens, of which `count` are landmarks."""
    generator = np.random.default_rng(count)
    arrays = {name: generator.standard_normal((2, 3, 37, 16)) for name in ("query", "key", "value")}
    inputs: dict[str, Any] = {name: array.astype(NUMPY[element]) for name, array in arrays.items()}
    inputs["landmarks"] = np.stack([generator.permutation(37)[:count] for _ in range(2)]).astype(np.int32)
    inputs["landmark_bias"] = generator.random((2, count), np.float32)
    if mask is not None:
        inputs["key_mask"] = (generator.random((1, 37)) < 0.2).astype(np.int32)
    return inputs


def twin(inputs: dict[str, Any], mask: str | None = None, steps: ChebyshevSteps | None = STEPS) -> Any:
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return fast_nystrom_attention(
        *(tensors[name].float() for name in ("query", "key", "value")), tensors["landmarks"],
        landmark_bias=tensors["landmark_bias"], scale=0.25, exact_rows=True, chebyshev=steps,
        key_mask=tensors.get("key_mask"), sink=mask == "sink",
    ).numpy()  # fmt: skip


@every_mask
@pytest.mark.parametrize("opset", OPSETS)
def test_the_body_equals_pytorch_inlined_or_not(opset: int, mask: str | None) -> None:
    for element, count in ((TensorProto.FLOAT, 9 if opset % 2 else 1), (TensorProto.FLOAT16, 21)):
        inputs = make_inputs(count, element, mask)
        model = node_model(opset, element, mask, **CHEBYSHEV)
        for form in (model, lower(model, "portable")):
            (out,) = run(form, inputs)
            assert out.dtype == NUMPY[element]
            np.testing.assert_allclose(out, twin(inputs, mask), rtol=0, atol=TOLERANCE[element])


@every_mask
@pytest.mark.parametrize("opset", [18, 23, 24])
def test_the_fused_body_equals_pytorch(opset: int, mask: str | None) -> None:
    for element, count in ((TensorProto.FLOAT, 9), (TensorProto.FLOAT16, 21), (TensorProto.FLOAT, 1)):
        inputs = make_inputs(count, element, mask)
        fused = lower(node_model(opset, element, mask, **CHEBYSHEV), "fused")
        assert sum(node.op_type == "Attention" for node in fused.graph.node) == 2
        np.testing.assert_allclose(run(fused, inputs)[0], twin(inputs, mask), rtol=0, atol=TOLERANCE[element])


@pytest.mark.parametrize("steps", [ChebyshevSteps(1, 0.3), ChebyshevSteps(10, 0.03)])
def test_steps_and_low_are_those_of_the_node(steps: ChebyshevSteps) -> None:
    model = node_model(18, core="chebyshev", steps=steps.steps, low=steps.low)
    (node,) = fna_nodes(model.graph)
    assert core_of(node_attributes(node)) == steps  # although the file holds `low` in fp32
    inputs = make_inputs(9)
    expected = twin(inputs, steps=steps)
    np.testing.assert_allclose(run(model, inputs)[0], expected, rtol=0, atol=2e-5)
    for other in (STEPS, None):
        assert np.abs(expected - twin(inputs, steps=other)).max() > 1e-3


@pytest.mark.parametrize(
    ("mask", "settings", "versions"),
    [
        (None, {}, (1, "1")),
        ("hidden", {}, (2, "2")),
        (None, CHEBYSHEV, (5, "3")),
        ("sink", CHEBYSHEV, (5, "3")),
        (None, {"core": "newton_schulz"}, (5, "3")),
    ],
)
def test_only_nodes_that_name_a_core_have_the_version_that_knows_it(
    mask: str | None, settings: dict[str, Any], versions: tuple[int, str]
) -> None:
    model = node_model(18, mask=mask, **settings)
    (node,) = fna_nodes(lower(model, "plugin").graph)
    imported = {entry.domain: entry.version for entry in model.opset_import}
    assert (imported[DOMAIN], node_attributes(node)["plugin_version"]) == versions
    assert ("core" in node_attributes(node)) == ("core" in settings)
    inputs = make_inputs(9, mask=mask)
    expected = twin(inputs, mask, STEPS if settings == CHEBYSHEV else None)
    np.testing.assert_allclose(run(model, inputs)[0], expected, rtol=0, atol=2e-5)


def test_nodes_of_all_versions_live_in_one_file(tmp_path: Path) -> None:
    """A chain of four, each the next one's query: without a core and with one, without a mask and with one."""
    kinds = [(None, {}), ("hidden", {}), (None, CHEBYSHEV), ("hidden", CHEBYSHEV)]
    model = node_model(18, mask="hidden")
    inputs = make_inputs(9, mask="hidden")
    del model.graph.node[:]
    query, expected = "query", inputs
    for place, (mask, settings) in enumerate(kinds):
        names = [query, "key", "value", "landmarks", "landmark_bias", *(["key_mask"] if mask else [])]
        query = "out" if place == 3 else f"middle_{place}"
        node = FAST_NYSTROM_ATTENTION.make_node(names, [query], f"{place}", scale=0.25, exact_rows=1, **settings)
        model.graph.node.append(node)
        seen = {name: array for name, array in expected.items() if mask or name != "key_mask"}
        expected = inputs | {"query": twin(seen, mask, STEPS if settings else None)}
    attach_functions(model, TensorProto.FLOAT)
    assert len({function.overload for function in model.functions}) == 4
    onnx.save(model, tmp_path / "chain.onnx")
    for form in (onnx.load(tmp_path / "chain.onnx"), lower(model, "portable")):
        np.testing.assert_allclose(run(form, inputs)[0], expected["query"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"core": "cholesky"}, "core is 'cholesky', but newton_schulz or chebyshev is needed"),
        ({"core": "chebyshev"}, "steps 0, but 1 to 64"),
        ({"core": "chebyshev", "steps": 8, "low": 1.5}, "low 1.5"),
        ({"steps": 8}, "has no attribute steps"),
    ],
)
def test_a_core_that_there_is_not_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        node_model(18, **settings)


def test_pytorchs_exporter_writes_the_core_of_the_call() -> None:

    class Attend(torch.nn.Module):
        def __init__(self, chebyshev: ChebyshevSteps | None, masked: bool) -> None:
            super().__init__()
            self.chebyshev, self.masked = chebyshev, masked

        def forward(self, query: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
            landmarks = torch.arange(0, 37, 5)[None].int()
            mask = key_mask if self.masked else None
            return fast_nystrom_attention(query, query, query, landmarks, chebyshev=self.chebyshev, key_mask=mask)

    query, key_mask = torch.randn(1, 2, 37, 8), (torch.rand(1, 37) < 0.2).int()
    for chebyshev, masked in ((None, False), (STEPS, False), (STEPS, True)):
        module = Attend(chebyshev, masked).eval()
        program = torch.onnx.export(
            module, (query, key_mask), dynamo=True, custom_translation_table=translation_table(), opset_version=18
        )
        assert program is not None
        model = program.model_proto
        attach_functions(model, TensorProto.FLOAT)
        (node,) = fna_nodes(model.graph)
        assert core_of(node_attributes(node)) == chebyshev
        assert ("iterations" in node_attributes(node)) == (chebyshev is None)
        feeds = {
            name.name: array for name, array in zip(model.graph.input, (query.numpy(), key_mask.numpy()), strict=False)
        }
        np.testing.assert_allclose(run(model, feeds)[0], module(query, key_mask).numpy(), rtol=0, atol=2e-5)
