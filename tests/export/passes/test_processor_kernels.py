"""FNA and focal attention as operators of the library for processors, in files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from focal_files import HEADS, PATCHES, SIZE, TOKENS, tensors, twin, two_blocks
from onnx import ModelProto, TensorProto, helper, numpy_helper
from operator_files import one_node_model, run

from fna.attention import fast_nystrom_attention
from fna.chebyshev import ChebyshevSteps
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.passes.lower import lower
from fna.export.passes.processor_kernels import PROCESSOR_DOMAIN
from fna.export.types import static_shapes
from fna.plugins.processor_library import build_processor_library


@pytest.fixture(scope="module")
def library() -> Path:
    """Another one is named where these tests run again under the compiler's sanitizers (tests/plugins/test_processor_library.py)."""
    named = os.environ.get("FNA_TEST_LIBRARY")
    return Path(named) if named else build_processor_library()


def turned(model: ModelProto, *names: str) -> ModelProto:
    """The same with heads last before some of its inputs and after its result, as models have it."""
    graph = model.graph
    for value in (*graph.input, *graph.output):
        if value.name in names:
            given = f"{value.name}_tokens"
            ends = (value.name, given) if value.name == "out" else (given, value.name)
            turn = helper.make_node("Transpose", [ends[0]], [ends[1]], perm=[0, 2, 1, 3])
            graph.node.insert(len(graph.node) if value.name == "out" else 0, turn)
            value.CopyFrom(helper.make_tensor_value_info(given, TensorProto.FLOAT, ["B", TOKENS, HEADS, SIZE]))
    return model


@pytest.mark.parametrize("instructions", ["wide", "middle", "narrow"])
@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "a mask"])
@pytest.mark.parametrize("hot", [0, 3])
@pytest.mark.parametrize("opset", [14, 18, 24])
def test_it_equals_pytorch_with_every_kind_of_instructions(
    opset: int, hot: int, mask: bool, instructions: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor takes the best it has up to the one that is named."""
    monkeypatch.setenv("FNA_INSTRUCTIONS", instructions)
    lowered = lower(two_blocks(opset, hot, mask=mask), "onnxruntime-kernels")
    assert not lowered.functions
    assert [(node.domain, node.op_type) for node in lowered.graph.node] == [(PROCESSOR_DOMAIN, "FocalAttention")] * 2
    inputs = tensors(mask)
    np.testing.assert_allclose(run(lowered, inputs, library)[0], twin(inputs, hot), rtol=0, atol=4e-6)


@pytest.mark.parametrize("instructions", ["wide", "middle", "narrow"])
@pytest.mark.parametrize("size", [1, 6, 20, 64, 100])
@pytest.mark.parametrize("tile", [1, 2, 5, 7])
def test_any_head_size_and_tile_will_do(
    tile: int, size: int, instructions: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 7 have 49 queries, and at the edge of the grid 14: no register is full of either."""
    monkeypatch.setenv("FNA_INSTRUCTIONS", instructions)
    inputs = tensors(size=size)
    found = run(lower(two_blocks(tile=tile, size=size), "onnxruntime-kernels"), inputs, library)[0]
    np.testing.assert_allclose(found, twin(inputs, 3, tile), rtol=0, atol=8e-6)


def test_queries_and_results_are_not_turned_keys_and_values_are(library: Path) -> None:
    model = turned(two_blocks(), "query", "key", "value", "out")
    lowered = lower(model, "onnxruntime-kernels")
    assert [node.op_type for node in lowered.graph.node] == ["Transpose"] * 2 + ["FocalAttention"] * 2
    first, second = (node for node in lowered.graph.node if node.domain == PROCESSOR_DOMAIN)
    assert (first.input[0], first.output[0]) == ("query_tokens", "middle")
    assert (second.input[0], second.output[0]) == ("middle", "out_tokens")
    inputs = tensors()
    given = {f"{name}_tokens": np.ascontiguousarray(array.swapaxes(1, 2)) for name, array in inputs.items()}
    found = run(lowered, given, library)[0]
    np.testing.assert_allclose(found.swapaxes(1, 2), twin(inputs, 3), rtol=0, atol=4e-6)
    np.testing.assert_array_equal(found, run(lower(model, "onnxruntime-kernels"), given, library)[0])


def test_a_turn_that_others_read_stays(library: Path) -> None:
    model = turned(two_blocks(hot=0), "query")
    model.graph.node.append(helper.make_node("Neg", ["query"], ["negative"]))
    model.graph.output.append(helper.make_tensor_value_info("negative", TensorProto.FLOAT, None))
    lowered = lower(model, "onnxruntime-kernels")
    assert sorted(node.op_type for node in lowered.graph.node) == [
        "FocalAttention",
        "FocalAttention",
        "Neg",
        "Transpose",
    ]
    inputs = tensors()
    given = inputs | {"query_tokens": np.ascontiguousarray(inputs["query"].swapaxes(1, 2))}
    del given["query"]
    np.testing.assert_allclose(run(lowered, given, library)[0], twin(inputs, 0), rtol=0, atol=4e-6)


def test_a_turn_that_is_an_output_stays(library: Path) -> None:
    model = turned(two_blocks(hot=0), "query")
    model.graph.output.append(helper.make_tensor_value_info("query", TensorProto.FLOAT, None))
    inputs = tensors()
    given = inputs | {"query_tokens": np.ascontiguousarray(inputs["query"].swapaxes(1, 2))}
    del given["query"]
    out, query = run(lower(model, "onnxruntime-kernels"), given, library)
    np.testing.assert_array_equal(query, inputs["query"])
    np.testing.assert_allclose(out, twin(inputs, 0), rtol=0, atol=4e-6)


def test_nothing_is_turned_where_a_body_could_read_it(library: Path) -> None:
    model = turned(two_blocks(hot=0), "query")
    negative = helper.make_node("Neg", ["query"], ["negative"])
    bodies = [
        helper.make_graph([node], "body", [], [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)])
        for node in (negative, helper.make_node("Identity", ["query"], ["same"]))
    ]
    choice = helper.make_tensor("choice", TensorProto.BOOL, [], [True])
    model.graph.initializer.append(choice)
    model.graph.node.append(
        helper.make_node("If", ["choice"], ["chosen"], then_branch=bodies[0], else_branch=bodies[1])
    )
    model.graph.output.append(helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None))
    inputs = tensors()
    given = inputs | {"query_tokens": np.ascontiguousarray(inputs["query"].swapaxes(1, 2))}
    del given["query"]
    out, chosen = run(lower(model, "onnxruntime-kernels"), given, library)
    np.testing.assert_array_equal(chosen, -inputs["query"])
    np.testing.assert_allclose(out, twin(inputs, 0), rtol=0, atol=4e-6)


def test_other_types_stay_in_pieces() -> None:
    lowered = lower(two_blocks(element=TensorProto.FLOAT16), "onnxruntime-kernels")
    assert {node.domain for node in lowered.graph.node} == {""}
    assert PROCESSOR_DOMAIN not in {imported.domain for imported in lowered.opset_import}


def test_the_file_itself_is_left_alone() -> None:
    model = two_blocks()
    before = model.SerializeToString(deterministic=True)
    lower(model, "onnxruntime-kernels")
    assert model.SerializeToString(deterministic=True) == before


def test_scores_of_any_size_give_numbers(library: Path) -> None:
    inputs = tensors()
    inputs["query"] *= 1e4
    inputs["key"] *= 1e4
    found = run(lower(two_blocks(hot=0), "onnxruntime-kernels"), inputs, library)[0]
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= np.abs(inputs["value"]).max() * 1.0001


def test_a_constant_value_comes_through(library: Path) -> None:
    inputs = tensors() | {"value": np.full((2, HEADS, TOKENS, SIZE), 3.5, np.float32)}
    found = run(lower(two_blocks(), "onnxruntime-kernels"), inputs, library)[0]
    np.testing.assert_allclose(found, 3.5, rtol=3e-6)


def test_images_of_a_batch_do_not_touch_one_another(library: Path) -> None:
    model, inputs = lower(two_blocks(mask=True), "onnxruntime-kernels"), tensors(mask=True)
    swapped = {name: np.ascontiguousarray(array[::-1]) for name, array in inputs.items()}
    np.testing.assert_array_equal(run(model, inputs, library)[0], run(model, swapped, library)[0][::-1])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tile_keys_0", TOKENS, "tile_keys names a token that is not there"),
        ("tile_queries_1", -1, "tile_queries names a token that is not there"),
        ("places_0", 10**6, "places names a query that no tile has"),
    ],
)
def test_lists_that_point_elsewhere_are_refused(name: str, value: int, said: str, library: Path) -> None:
    model = lower(two_blocks(known=False), "onnxruntime-kernels")
    lists = {tensor.name: tensor for tensor in two_blocks().graph.initializer}
    inputs = tensors() | {key: numpy_helper.to_array(tensor).copy() for key, tensor in lists.items()}
    run(model, inputs, library)
    inputs[name].flat[3] = value
    with pytest.raises(Exception, match=f"FocalAttention: {said}"):
        run(model, inputs, library)


def test_shapes_that_do_not_fit_are_refused(library: Path) -> None:
    model = lower(two_blocks(), "onnxruntime-kernels")
    for value in model.graph.input:
        value.type.tensor_type.shape.Clear()
    inputs = tensors()
    with pytest.raises(Exception, match="FocalAttention: places must name each patch"):
        run(model, {name: array[:, :, :-1] for name, array in inputs.items()}, library)
    with pytest.raises(Exception, match="FocalAttention: key and value must have query's shape"):
        run(model, inputs | {"key": inputs["key"][:, :2]}, library)


def test_shapes_after_the_operator_are_known() -> None:
    """onnxruntime fuses what follows only where it knows the shapes, and it cannot infer those of an operator it does not know."""
    model = two_blocks()
    model.graph.value_info.append(
        helper.make_tensor_value_info("middle", TensorProto.FLOAT, ["B", HEADS, TOKENS, SIZE])
    )
    lowered = lower(model, "onnxruntime-kernels")
    assert static_shapes(lowered.graph.value_info)["middle"] == [0, HEADS, TOKENS, SIZE]
    assert PATCHES[0] * PATCHES[1] + 1 == TOKENS


NEWTON = {"iterations": 6}
STEPS = {"core": "chebyshev", "steps": 8, "low": 0.05}


def nystrom_file(
    opset: int = 18, element: int = TensorProto.FLOAT, *, mask: bool = False, **settings: Any
) -> ModelProto:
    inputs = dict.fromkeys(("query", "key", "value"), element) | {"landmarks": TensorProto.INT32}
    inputs |= {"landmark_bias": TensorProto.FLOAT} | ({"key_mask": TensorProto.INT32} if mask else {})
    settings = {"scale": 0.25, "exact_rows": 0} | settings
    return one_node_model(FAST_NYSTROM_ATTENTION, inputs, {"out": element}, opset, element, **settings)


def landmark_tensors(count: int, size: int = SIZE, rows: int = 2) -> dict[str, Any]:
    random = np.random.default_rng(4)
    landmarks = np.stack([random.choice(TOKENS, count, replace=False) for _ in range(rows)]).astype(np.int32)
    return tensors(size=size) | {"landmarks": landmarks, "landmark_bias": random.random((rows, count), np.float32)}


def nystrom_pair(inputs: dict[str, Any], library: Path, opset: int = 18, **settings: Any) -> tuple[Any, Any]:
    """What the kernel and what PyTorch computes."""
    lowered = lower(nystrom_file(opset, **settings), "onnxruntime-kernels")
    assert not lowered.functions
    assert [(node.domain, node.op_type) for node in lowered.graph.node] == [(PROCESSOR_DOMAIN, "FastNystromAttention")]
    if settings.pop("core", None):
        settings = {
            "exact_rows": settings.get("exact_rows", 0),
            "chebyshev": ChebyshevSteps(settings["steps"], settings["low"]),
        }
    query, key, value, landmarks, bias = inputs.values()
    wanted = fast_nystrom_attention(
        *(torch.from_numpy(array) for array in (query, key, value, landmarks)),
        landmark_bias=torch.from_numpy(bias),
        scale=0.25,
        **settings,
    )
    return run(lowered, inputs, library)[0], wanted.numpy()


@pytest.mark.parametrize("instructions", ["wide", "middle", "narrow"])
@pytest.mark.parametrize("exact_rows", [0, 1])
@pytest.mark.parametrize("core", [NEWTON, STEPS], ids=["newton_schulz", "chebyshev"])
@pytest.mark.parametrize("opset", [14, 18, 24])
def test_fna_equals_pytorch_with_every_kind_of_instructions(
    opset: int, core: dict[str, Any], exact_rows: int, instructions: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FNA_INSTRUCTIONS", instructions)
    found, wanted = nystrom_pair(landmark_tensors(20), library, opset, exact_rows=exact_rows, **core)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("core", [NEWTON, STEPS], ids=["newton_schulz", "chebyshev"])
@pytest.mark.parametrize(("count", "size", "rows"), [(1, 16, 1), (2, 1, 2), (16, 64, 1), (33, 20, 2), (TOKENS, 100, 1)])
def test_any_number_of_landmarks_will_do(count: int, size: int, rows: int, core: dict[str, Any], library: Path) -> None:
    found, wanted = nystrom_pair(landmark_tensors(count, size, rows), library, **core)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-5)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_fewer_iterations_are_taken_at_their_word(iterations: int, library: Path) -> None:
    found, wanted = nystrom_pair(landmark_tensors(20), library, iterations=iterations)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_fna_with_a_key_mask_or_of_other_types_stays_standard_operators() -> None:
    for settings in ({"mask": True}, {"element": TensorProto.FLOAT16}):
        lowered = lower(nystrom_file(**NEWTON, **settings), "onnxruntime-kernels")
        assert {node.domain for node in lowered.graph.node} == {""}


@pytest.mark.parametrize("token", [-1, TOKENS])
def test_landmarks_that_are_not_there_are_refused(token: int, library: Path) -> None:
    model, inputs = lower(nystrom_file(**NEWTON), "onnxruntime-kernels"), landmark_tensors(20)
    inputs["landmarks"][1, 7] = token
    with pytest.raises(Exception, match="FastNystromAttention: landmarks names a token that is not there"):
        run(model, inputs, library)


def test_a_landmark_that_nobody_attends_to_is_not_weighted_without_bound(library: Path) -> None:
    inputs = landmark_tensors(20)
    inputs["landmark_bias"][:, 3] = -8.0
    found, wanted = nystrom_pair(inputs, library, **STEPS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_landmarks_of_another_number_of_images_are_refused(library: Path) -> None:
    model = lower(nystrom_file(**NEWTON), "onnxruntime-kernels")
    with pytest.raises(Exception, match="landmarks must have a row, or one for each image"):
        run(model, landmark_tensors(20, rows=3), library)
    inputs = landmark_tensors(20)
    with pytest.raises(Exception, match="landmark_bias must have a row, or one for each image, of all landmarks"):
        run(model, inputs | {"landmark_bias": inputs["landmark_bias"][:, :7]}, library)
