"""The one onnxruntime session."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

from fna.errors import InputFileError
from fna.runtime import open_session, run_session

ROOT = Path(__file__).parents[2]

COUNTS_FOREVER = onnx.parser.parse_model(
    """<ir_version: 8, opset_import: ["" : 17]>
    counting (int64 trips, int64[1] start) => (int64[1] end) {
        yes = Constant <value = bool {1}> ()
        end = Loop (trips, yes, start) <body = step (int64 number, bool before, int64[1] old) => (bool after, int64[1] new) {
            after = Identity (before)
            new = Add (old, number)
        }>
    }"""
)


def test_nothing_else_opens_sessions() -> None:
    """But the stand-in for Triton's backend, which runs in Triton's own Python and can import nothing of this project."""
    folders = ("fna", "export", "plugins", "engines", "validate", "studies")
    files = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert {str(path.relative_to(ROOT)) for path in files if "InferenceSession" in path.read_text()} == {
        "fna/runtime.py",
        "engines/serving/onnxruntime_backend.py",
    }


def test_inputs_are_cast_and_those_it_does_not_take_are_left_out() -> None:
    session = open_session(COUNTS_FOREVER)
    feeds = {"trips": np.array(5, np.int32), "start": np.array([7.0]), "other": np.zeros(3)}
    assert run_session(session, feeds)["end"].tolist() == [17]


def test_a_run_ends_after_its_longest_time() -> None:
    session = open_session(COUNTS_FOREVER, once=True)
    feeds = {"trips": np.array(2**62), "start": np.array([0])}
    with pytest.raises(InputFileError, match="counting does not run on onnxruntime: .*terminate"):
        run_session(session, feeds, name="counting", longest_s=0.3)


def test_what_cannot_be_loaded_is_said_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(InputFileError, match=r"x\.onnx cannot be loaded by onnxruntime: "):
        open_session(tmp_path / "x.onnx")
    with pytest.raises(InputFileError, match="the export cannot be loaded by onnxruntime: "):
        open_session(tmp_path / "x.onnx", name="the export")


def test_in_the_files_order_a_tensor_is_let_go_once_it_was_measured() -> None:
    """Forty tensors of 4 MB in turn, each measured behind the node that makes it; in another order all are held to the end."""
    steps = 40
    nodes = []
    for step in range(steps):
        nodes.append(helper.make_node("Neg", [f"t{step}"], [f"t{step + 1}"]))
        nodes.append(helper.make_node("ReduceMax", [f"t{step + 1}"], [f"most{step}"], keepdims=0))
        nodes.append(helper.make_node("Reshape", [f"most{step}", "flat"], [f"measured{step}"]))
    names = [f"t{steps}", *(f"measured{step}" for step in range(steps))]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    inputs = [helper.make_tensor_value_info("t0", TensorProto.FLOAT, ["N"])]
    flat = helper.make_tensor("flat", TensorProto.INT64, [1], [-1])
    graph = helper.make_graph(nodes, "measured", inputs, outputs, [flat])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    code = (
        "import re, sys, numpy, onnx; from fna.runtime import open_session, run_session;"
        "peak = lambda: int(re.search('VmHWM: *([0-9]+)', open('/proc/self/status').read().replace('\\t', ' '))[1]);"
        "session = open_session(onnx.load_from_string(sys.stdin.buffer.read()), optimise=False, in_file_order=True);"
        "run_session(session, {'t0': numpy.ones(1, numpy.float32)});"
        "before = peak();"
        "run_session(session, {'t0': numpy.ones(1 << 20, numpy.float32)});"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=model.SerializeToString(), capture_output=True, check=True
    )
    assert int(done.stdout) < 60_000  # kilobytes
