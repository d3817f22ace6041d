"""The C++ library in TensorRT-RTX: its registry, the builder's loader and the parser."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fna.export.operators.registry import attach_functions
from fna.export.passes.lower import lower

from .conftest import Programs

REGISTRY = """
import sys
import numpy as np
import tensorrt_rtx as trt

def fields(**values):
    kinds = {np.dtype("float32"): trt.PluginFieldType.FLOAT32, np.dtype("int32"): trt.PluginFieldType.INT32}
    return trt.PluginFieldCollection([trt.PluginField(n, v, kinds[v.dtype]) for n, v in values.items()])

logger = trt.Logger(trt.Logger.INFO)
registry = trt.get_plugin_registry()
registry.load_library(sys.argv[1])
attention = registry.get_creator("FastNystromAttention", "1", "")
sampling = registry.get_creator("FarthestPointSampling", "1", "")
masked = registry.get_creator("FastNystromAttention", "2", "")
scale, six, count = np.array([0.125], np.float32), np.array([6], np.int32), np.array([64], np.int32)
sink = np.array([1], np.int32)
assert masked.plugin_version == "2"
assert masked.create_plugin("m", fields(scale=scale, sink=sink), trt.TensorRTPhase.BUILD) is not None
assert attention.create_plugin("a", fields(scale=scale, iterations=six), trt.TensorRTPhase.BUILD) is not None
assert sampling.create_plugin("s", fields(num_landmarks=count), trt.TensorRTPhase.BUILD) is not None
assert attention.create_plugin("a", fields(iterations=six), trt.TensorRTPhase.BUILD) is None
print("created")
"""

PARSER = """
import sys
import tensorrt_rtx as trt

logger = trt.Logger(trt.Logger.INFO)
trt.get_plugin_registry().load_library(sys.argv[1])
network = trt.Builder(logger).create_network()
trt.OnnxParser(network, logger).parse(open(sys.argv[2], "rb").read())
"""


def needs_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")


def test_the_registry_of_tensorrt_rtx_creates_all_plugins(programs: Programs) -> None:
    needs_tensorrt_rtx()
    command = [sys.executable, "-c", REGISTRY, str(programs.library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["created"], done.stdout + done.stderr
    assert "scale (kFLOAT32), which is missing" in done.stdout + done.stderr


LOADING = """
import sys
from pathlib import Path
import tensorrt_rtx as trt
from fna.engines.flavours import load_plugins
from fna.errors import MissingCapabilityError

operators = [("FarthestPointSampling", "1"), ("FastNystromAttention", "1")]
for _ in range(2):  # a library that is loaded already is not loaded again
    load_plugins(trt, Path(sys.argv[1]), operators)
try:
    load_plugins(trt, Path(sys.argv[1]), [*operators, ("Later", "1")])
except MissingCapabilityError as error:
    print(error)
"""


def test_the_builders_loader_loads_the_library_once_and_names_what_it_lacks(programs: Programs) -> None:
    needs_tensorrt_rtx()
    command = [sys.executable, "-c", LOADING, str(programs.library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "did not bring Later version 1" in done.stdout


REGISTERING = """
import ctypes
import sys
import tensorrt_rtx

(rtx,) = {line.split()[-1] for line in open("/proc/self/maps") if "/libtensorrt_rtx.so" in line}
ctypes.CDLL(rtx, mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[1])
print(tensorrt_rtx.get_plugin_registry().get_creator("FastNystromAttention", "1", ""))
"""


def test_self_registration_without_tensorrt_says_so(programs: Programs) -> None:
    library = str(programs.folder / "libfna_plugin_register.so")
    command = [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "no TensorRT plugin registry" in done.stderr


def test_self_registration_leaves_the_registry_of_another_major_version_alone(programs: Programs) -> None:
    """Its functions have moved in the virtual table, so calling it would crash the host; TensorRT-RTX has the newer one."""
    needs_tensorrt_rtx()
    library = str(programs.folder / "libfna_plugin_register.so")
    command = [sys.executable, "-c", REGISTERING, library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "None\n")
    assert "runs another major version" in done.stderr


def plugin_lowered_model(node: str, domain: str) -> bytes:
    """As `fna.export.passes.lower` writes it (domain fna), or as someone might by hand (the default domain)."""
    from onnx import TensorProto, helper

    version = "2" if node == "with a mask" else "1"
    common = {"plugin_version": version, "plugin_namespace": "", "domain": domain, "name": "block7/fna"}
    if node == "FarthestPointSampling":
        made = helper.make_node(node, ["features"], ["landmarks"], num_landmarks=48, **common)
        inputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT16, [1, 100, 64])]
        outputs = [helper.make_tensor_value_info("landmarks", TensorProto.INT32, [1, 48])]
        constants = []
    else:
        names = ["query", "key", "value", "landmarks", "bias", *(["key_mask"] if version == "2" else [])]
        common |= {"sink": 1} if version == "2" else {}
        made = helper.make_node(
            "FastNystromAttention", names, ["out"], scale=0.25, iterations=5, exact_rows=1, **common
        )
        inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [1, 2, 100, 64]) for n in names[:3]]
        outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT16, [1, 2, 100, 64])]
        constants = [
            helper.make_tensor("landmarks", TensorProto.INT32, [1, 8], list(range(8))),
            helper.make_tensor("bias", TensorProto.FLOAT, [1, 8], [0.0] * 8),
            *([helper.make_tensor("key_mask", TensorProto.INT32, [1, 100], [0] * 100)] * (version == "2")),
        ]
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    graph = helper.make_graph([made], "g", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    if domain:
        attach_functions(model, TensorProto.FLOAT16)
        model = lower(model, "plugin")
    return model.SerializeToString()


@pytest.mark.parametrize("domain", ["fna", ""])
@pytest.mark.parametrize(
    ("node", "fields"),
    [
        ("FastNystromAttention", "FastNystromAttention created: scale=0.25 iterations=5 exact_rows=1 version=1"),
        ("with a mask", "FastNystromAttention created: scale=0.25 iterations=5 exact_rows=1 sink=1 version=2"),
        ("FarthestPointSampling", "FarthestPointSampling created: num_landmarks=48"),
    ],
)
def test_the_parser_of_tensorrt_rtx_creates_the_plugin_with_the_files_attributes(
    programs: Programs, tmp_path: Path, node: str, fields: str, domain: str
) -> None:
    """TensorRT-RTX has no plugin layers: it ends the process after creating the plugin, so only the log can tell."""
    needs_tensorrt_rtx()
    model = tmp_path / "model.onnx"
    model.write_bytes(plugin_lowered_model(node, domain))
    command = [sys.executable, "-c", PARSER, str(programs.library), str(model)]
    env = {**os.environ, "FNA_PLUGIN_VERBOSE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert fields in done.stdout + done.stderr
    created = "FarthestPointSampling" if node == "FarthestPointSampling" else "FastNystromAttention"
    assert f"Successfully created plugin: {created}" in done.stdout + done.stderr
