"""Files are read with errors in one line, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from fna import files
from fna.errors import BuildError, InputFileError
from fna.files import check_writable, load_onnx, save_model, write_text, written_whole


def make_model(rows: int = 64) -> onnx.ModelProto:
    weight = onnx.numpy_helper.from_array(np.arange(rows * 8, dtype=np.float32).reshape(rows, 8), "weight")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "g",
        [info("x", onnx.TensorProto.FLOAT, [1, rows])],
        [info("y", onnx.TensorProto.FLOAT, [1, 8])],
        [weight],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


def run(path: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path)).run(None, {"x": np.ones((1, 64), np.float32)})[0]


def test_large_models_keep_their_tensors_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(make_model(), tmp_path / "small.onnx")
    monkeypatch.setattr(files, "LARGEST_SINGLE_FILE", 1000)
    save_model(make_model(), tmp_path / "large.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data", "small.onnx"]
    assert (tmp_path / "large.onnx.data").stat().st_size >= 64 * 8 * 4
    np.testing.assert_array_equal(run(tmp_path / "large.onnx"), run(tmp_path / "small.onnx"))


@pytest.mark.parametrize("limit", [1000, 10**9], ids=["external data", "one file"])
def test_a_model_that_fails_the_checker_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(files, "LARGEST_SINGLE_FILE", limit)
    model = make_model()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(BuildError, match="NoSuchOperator"):
        save_model(model, tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def write_half() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["x.txt"]


def test_a_missing_external_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST_SINGLE_FILE", 1000)
    save_model(make_model(), tmp_path / "x.onnx")
    (tmp_path / "x.onnx.data").unlink()
    with pytest.raises(InputFileError, match=r"x\.onnx"):
        load_onnx(tmp_path / "x.onnx")
    assert load_onnx(tmp_path / "x.onnx", tensors=False).graph.node


@pytest.mark.parametrize("refuse", [check_writable, lambda path: write_text(path, "text")], ids=["check", "write"])
def test_a_path_that_cannot_be_written_is_named_as_it_was_given(tmp_path: Path, refuse: Callable[[Path], None]) -> None:
    with pytest.raises(InputFileError) as caught:
        refuse(tmp_path / "missing" / "x.engine")
    assert str(caught.value).startswith(f"{tmp_path}/missing/x.engine cannot be written: No such file or directory")
    with pytest.raises(InputFileError, match="it is a folder; give a file name"):
        refuse(tmp_path)


def test_checking_a_path_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "x.engine")
    assert list(tmp_path.iterdir()) == []
