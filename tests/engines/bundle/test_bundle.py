"""Bundles: what is in one, that the same inputs give the same bytes, and that nothing damaged or hostile is opened."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import zstandard
from onnx.reference import ReferenceEvaluator

from fna.cli import main
from fna.engines.builder.options import BatchRange
from fna.engines.bundle.format import Bundle, is_bundle, list_files, open_bundle
from fna.engines.bundle.tolerances import failures, measure
from fna.engines.bundle.write import write_archive
from fna.errors import InputFileError, InvalidArgumentError, MissingCapabilityError
from fna.export.metadata import read_metadata, write_metadata
from fna.export.operators.registry import fna_nodes
from fna.files import file_sha256, load_onnx
from fna.plugins.table.kernel_file import without_kernels
from fna.plugins.table.read import load_table
from fna.runtime import open_session, run_session

from ..conftest import make_bundle


@pytest.fixture(scope="module")
def archive(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "orin.tar.zst"
    write_archive(bundle, path)
    return path


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


def test_it_holds_what_a_device_needs(bundle: Path) -> None:
    names = list_files(bundle)
    for name in (
        "Dockerfile", "README.md", "SHA256SUMS", "build_engine.sh", "check.sh", "serve.sh", "check/input.npy",
        "check/expected.last_hidden_state.npy",
        "check/plugin_layers.fp32.txt", "manifest.json", "model.plugin.onnx", "model.portable.onnx", "model.weights",
        "model.fp16.plugin.onnx", "plugin/kernels/kernels.bin", "plugin/kernels/launch_constants.hpp", "plugin/src/common/exports.map",
        "plugin/prebuilt/aarch64/libfna_plugin.so", "runner/fna_runner.cpp", "settings.sh",
    ):  # fmt: skip
        assert name in names
    opened = open_bundle(bundle)
    assert set(opened.manifest.files) == set(names) - {"manifest.json", "SHA256SUMS"}
    assert opened.manifest.target == "jetson-agx-orin"
    assert opened.precisions == ("fp32", "fp16")
    assert opened.manifest.plugin is not None
    assert opened.manifest.plugin.prebuilt == ("aarch64", "x86_64")
    assert os.access(bundle / "check.sh", os.X_OK)


def test_the_kernels_are_those_of_the_targets_chip_and_the_ptx(bundle: Path, table: Path) -> None:
    chosen, whole = load_table(bundle / "plugin/kernels"), load_table(table)
    assert [sm for _, sm in chosen.kernels] == [0, 87, 0, 87]
    for key, kernel in chosen.kernels.items():
        assert chosen.image(kernel) == whole.image(whole.kernels[key])


@pytest.mark.parametrize("machine", ["aarch64", "x86_64"])
def test_each_library_carries_the_kernels_of_its_bundle(bundle: Path, table: Path, machine: str) -> None:
    """So that one file is all that TensorRT has to be given; the library of the table carries every chip's."""
    library = (bundle / "plugin/prebuilt" / machine / "libfna_plugin.so").read_bytes()
    own = without_kernels((table / machine / "libfna_plugin.so").read_bytes())
    assert library == own + (bundle / "plugin/kernels/kernels.bin").read_bytes()
    register = bundle / "plugin/prebuilt" / machine / "libfna_plugin_register.so"
    assert register.read_bytes() == (table / machine / register.name).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_portable_model_gives_the_recorded_outputs(bundle: Path, precision: str) -> None:
    """So the recorded outputs are those of this very model, and the weights file holds its tensors."""
    opened = open_bundle(bundle)
    outputs = run_session(open_session(opened.model("portable", precision)), opened.recorded_inputs())
    for name, expected in opened.recorded_outputs().items():
        error = np.linalg.norm(outputs[name] - expected) / np.linalg.norm(expected)
        assert error <= opened.manifest.check.tolerances[precision].relative_l2
    assert opened.model("portable", precision) != opened.model("plugin", precision)


def test_the_plugin_model_holds_custom_operators_without_functions(bundle: Path) -> None:
    opened = open_bundle(bundle)
    model = load_onnx(opened.model("plugin", "fp16"), tensors=False)
    layers = opened.manifest.plugin.layers
    assert not model.functions
    assert [node.name for node in fna_nodes(model.graph)] == [layer.name for layer in layers]
    assert [layer.precision for layer in layers] == [{"fp32": "fp32", "fp16": "fp16"}] * 2
    assert (bundle / "check/plugin_layers.fp16.txt").read_text() == "".join(f"{layer.name}\tfp16\n" for layer in layers)


def test_the_same_inputs_give_the_same_bytes(
    tiny: Path, table: Path, bundle: Path, archive: Path, tmp_path: Path
) -> None:
    again = make_bundle(tiny, tmp_path / "elsewhere", table, precisions=("fp32", "fp16"))
    assert {n: file_sha256(again / n) for n in list_files(again)} == {
        n: file_sha256(bundle / n) for n in list_files(bundle)
    }
    os.utime(again / "model.weights", (1, 1))
    packed = tmp_path / "again.tar.zst"
    write_archive(shutil.move(again, tmp_path / bundle.name), packed)
    assert packed.read_bytes() == archive.read_bytes()


@pytest.mark.parametrize("name", ["traced", "grafted"])
def test_linear_layers_in_8_bits_are_bundled_in_one_step(
    tiny: Path, tiny_file: Callable[[str], Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny if name == "traced" else tiny_file(name)
    arguments = ["--target", "t4", "--record", "1", "--int8", "--precision", "fp16"]
    assert main(["bundle", str(file), "-o", str(tmp_path / "x"), *arguments]) == 0
    assert "in int8; 100.0 % of their multiply-adds in 8 bits" in " ".join(capsys.readouterr().out.split())
    opened = open_bundle(tmp_path / "x")
    assert (opened.precisions, opened.manifest.metadata.quantized) == (("fp16",), "int8")
    check = opened.manifest.check
    tasks = {"last_hidden_state": "tokens", "pooler_output": "vector"} if name == "traced" else {"tokens": "tokens"}
    assert {output: task.task for output, task in check.tasks.items()} == tasks
    settings = (tmp_path / "x" / "settings.sh").read_text()
    first = next(iter(tasks))
    assert f"TASK_TOLERANCES=({first}=row_cosine:0.9978 " in settings
    assert (
        f"| `{first}`, tokens | row_cosine 0.9978, row_cosine_p5 0.9948, relative_l2 0.066 |"
        in (tmp_path / "x" / "README.md").read_text()
    )
    outputs = run_session(open_session(opened.model("portable")), opened.recorded_inputs())
    for output, expected in opened.recorded_outputs().items():
        assert failures(check.tolerances["fp16"], check.tasks[output], expected, outputs[output]) == []
        error = measure(expected, outputs[output])["relative_l2"]
        assert (error > 1e-5) == (name == "traced")  # a grafted file is its own reference


def test_what_a_target_has_not_and_several_precisions_are_refused_in_8_bits(
    tiny_file: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["bundle", str(tiny_file("traced")), "-o", str(tmp_path / "x"), "--target", "jetson-agx-orin"]
    assert main([*base, "--fp8"]) == 2
    assert "fp8 was asked for, but jetson-agx-orin computes in" in " ".join(capsys.readouterr().err.split())
    assert main([*base, "--int8", "--precision", "fp16,fp32"]) == 2
    assert "a bundle in 8 bits holds one model" in " ".join(capsys.readouterr().err.split())


def test_an_archive_opens_as_its_folder_does(bundle: Path, archive: Path) -> None:
    assert is_bundle(archive)
    assert is_bundle(bundle)
    with open_bundle(archive) as opened:
        root = opened.root
        assert opened.digest == open_bundle(bundle).digest
        assert sorted(opened.recorded_inputs()) == ["pixel_values"]
        assert os.access(root / "check.sh", os.X_OK)
    assert not root.exists()


def test_what_the_device_builds_is_not_part_of_it(copy: Path) -> None:
    (copy / "build").mkdir()
    (copy / "build" / "model.engine").write_text("engine")
    assert isinstance(open_bundle(copy), Bundle)


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(change((root / name).read_bytes()))


def edit_manifest(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        manifest = json.loads((root / "manifest.json").read_text())
        change(manifest)
        (root / "manifest.json").write_text(json.dumps(manifest))

    return apply


DAMAGE = {
    "one bit": (edit("model.weights", lambda data: bytes([data[0] ^ 1]) + data[1:]), "model.weights was changed"),
    "a script": (edit("build_engine.sh", lambda data: data.replace(b"euo", b"eu0")), "build_engine.sh was changed"),
    "truncated": (edit("model.plugin.onnx", lambda data: data[:-10]), r"model.plugin.onnx has \d+ bytes"),
    "gone": (lambda root: (root / "check/input.npy").unlink(), "check/input.npy is missing"),
    "one more": (lambda root: (root / "plugin/src/extra.cpp").touch(), "plugin/src/extra.cpp is not listed"),
    "a link": (lambda root: (root / "extra").symlink_to("/etc/passwd"), "extra is a link"),
    "checksums": (edit("SHA256SUMS", lambda data: data[1:]), "SHA256SUMS does not agree"),
    "no checksums": (lambda root: (root / "SHA256SUMS").unlink(), "has no SHA256SUMS"),
    "no manifest": (lambda root: (root / "manifest.json").unlink(), "has no manifest.json"),
    "another format": (edit_manifest(lambda manifest: manifest.update(version=2)), "bundle format 2, but this version of fna reads 1"),
    "an unknown key": (edit_manifest(lambda manifest: manifest.update(more=1)), "manifest.json: more"),
    "no JSON": (edit("manifest.json", lambda data: data[:-5]), "manifest.json.*JSON"),
    "a path outside": (edit_manifest(lambda m: m["files"].update({"../x": m["files"]["README.md"]})), "'../x' is not a path inside"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bundle_is_refused_by_the_files_name(
    copy: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = DAMAGE[damage]
    change(copy)
    with pytest.raises(InputFileError, match=said):
        open_bundle(copy)
    assert main(["bundle", "--verify", str(copy)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def rewrite(archive: Path, output: Path, change: Callable[[tarfile.TarFile], None]) -> Path:
    """The archive with something added."""
    data = zstandard.ZstdDecompressor().stream_reader(archive.open("rb")).read()
    buffer = io.BytesIO(data)
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        change(tar)
    output.write_bytes(zstandard.ZstdCompressor().compress(buffer.getvalue()))
    return output


def member(name: str, **settings: object) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        for key, value in settings.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(b"x" * info.size))

    return add


HOSTILE = {
    "above": (member("../outside", size=4), "'../outside' is not a path inside"),
    "above, later": (member("orin/../../outside", size=4), "not a path inside"),
    "absolute": (member("/tmp/outside", size=4), "not a path inside"),
    "beside": (member("other/file", size=4), "other/file is outside its folder orin"),
    "a link": (member("orin/extra", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "orin/extra is a link"),
    "a hard link": (member("orin/extra", type=tarfile.LNKTYPE, linkname="orin/README.md"), "orin/extra is a link"),
    "a device": (member("orin/extra", type=tarfile.CHRTYPE), "special file"),
    "unlisted": (member("orin/extra", size=4), "extra is not listed"),
    "twice": (member("orin/README.md", size=4), "README.md is in it twice"),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_archive_is_refused_and_writes_nothing_outside(
    archive: Path, tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, said = HOSTILE[attack]
    inside = tmp_path / "deep" / "tmp"
    inside.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(inside))
    hostile = rewrite(archive, tmp_path / "hostile.tar.zst", change)
    with pytest.raises(InputFileError, match=said):
        open_bundle(hostile)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "hostile.tar.zst", "tmp"]


def test_a_member_longer_than_listed_is_refused_before_it_is_written(archive: Path, tmp_path: Path) -> None:
    data = zstandard.ZstdDecompressor().stream_reader(archive.open("rb")).read()
    source, target = tarfile.open(fileobj=io.BytesIO(data)), io.BytesIO()  # noqa: SIM115
    with tarfile.open(fileobj=target, mode="w") as tar:
        for info in source:
            content = source.extractfile(info).read()
            if info.name.endswith("README.md"):
                content += b"more"
                info.size += 4
            tar.addfile(info, io.BytesIO(content))
    hostile = tmp_path / "long.tar.zst"
    hostile.write_bytes(zstandard.ZstdCompressor().compress(target.getvalue()))
    with pytest.raises(InputFileError, match=r"README.md has \d+ bytes, but its manifest.json says"):
        open_bundle(hostile)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_archive_is_refused(archive: Path, tmp_path: Path, kept: float) -> None:
    path = tmp_path / "cut.tar.zst"
    path.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * kept)])
    with pytest.raises(InputFileError, match=r"damaged or truncated|has no manifest|missing"):
        open_bundle(path)


@pytest.mark.parametrize(
    ("name", "said"), [("none", "does not exist"), ("x.txt", "is no bundle"), ("x.tar.zst", "damaged or truncated")]
)
def test_what_is_no_bundle_is_refused(tmp_path: Path, name: str, said: str) -> None:
    for file in ("x.txt", "x.tar.zst"):
        (tmp_path / file).write_text("no bundle")
    with pytest.raises(InputFileError, match=said):
        open_bundle(tmp_path / name)


def test_turing_gets_standard_operators_and_no_plugin(tiny: Path, tmp_path: Path) -> None:
    root = make_bundle(tiny, tmp_path / "t4", tmp_path / "no-table", target="t4")
    opened = open_bundle(root)
    assert opened.manifest.plugin is None
    assert opened.manifest.lowering == "decomposed"
    assert {model.lowering for model in opened.manifest.models} == {"fused", "decomposed", "portable"}
    for model in opened.manifest.models:  # one file of weights holds the tensors of all
        # onnxruntime takes no bias of attention with one row for all queries, as the fused form has it for TensorRT
        reference = ReferenceEvaluator(onnx.load(root / model.path))
        outputs = dict(zip(reference.output_names, reference.run(None, opened.recorded_inputs()), strict=True))
        for name, expected in opened.recorded_outputs().items():
            assert np.linalg.norm(outputs[name] - expected) <= 1e-4 * np.linalg.norm(expected), model.lowering
    assert not (root / "plugin").exists()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("jetson-thor", r"no kernels for sm_110 of jetson-thor; compile the kernels first: fna plugin --sm 110,0"),
        ("h100", "--sm 90,0"),
    ],
)
def test_a_plugin_target_without_its_kernels_is_refused_with_the_command(
    tiny: Path, table: Path, tmp_path: Path, target: str, said: str
) -> None:
    with pytest.raises(MissingCapabilityError, match=said):
        make_bundle(tiny, tmp_path / "out", table, target=target)
    with pytest.raises(MissingCapabilityError, match="fna plugin"):
        make_bundle(tiny, tmp_path / "out", tmp_path, target=target)
    assert not (tmp_path / "out").exists()


def test_a_precision_that_the_target_lacks_is_refused(tiny: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="bf16 was asked for, but t4 computes in"):
        make_bundle(tiny, tmp_path / "out", table, target="t4", precisions=("bf16",))


def test_a_grafted_files_outputs_are_recorded_from_onnxruntime(tiny: Path, table: Path, tmp_path: Path) -> None:
    model = load_onnx(tiny)
    write_metadata(model, read_metadata(model, "tiny").model_copy(update={"origin": "graft", "source": "any.onnx"}))
    path = tmp_path / "grafted.onnx"
    onnx.save(model, path)
    opened = open_bundle(make_bundle(path, tmp_path / "out", table))
    assert opened.manifest.check.reference == "onnxruntime"
    assert sorted(opened.recorded_outputs()) == ["last_hidden_state", "pooler_output"]


def test_weights_beside_the_file_travel_too(tiny: Path, table: Path, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    onnx.save(load_onnx(tiny), path, save_as_external_data=True, location="tiny.onnx.data", size_threshold=100)
    root = make_bundle(path, tmp_path / "out", table)
    inputs = open_bundle(root).recorded_inputs()
    expected = run_session(open_session(bundle / "model.portable.onnx"), inputs)
    outputs = run_session(open_session(root / "model.portable.onnx"), inputs)
    assert all(np.array_equal(outputs[name], expected[name]) for name in expected)
    (tmp_path / "tiny.onnx.data").unlink()
    with pytest.raises(InputFileError, match=r"tiny.onnx.data, which is not beside"):
        make_bundle(path, tmp_path / "out", table)


def test_only_a_bundle_is_replaced(tiny: Path, table: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(InputFileError, match="holds other files than a bundle"):
        make_bundle(tiny, tmp_path / "thesis", table)
    root = make_bundle(tiny, tmp_path / "out", table)
    (root / "build").mkdir()
    make_bundle(tiny, root, table, batch=BatchRange(1, 1, 1))
    assert not (root / "build").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "thesis"]


def test_the_command_makes_an_archive_and_checks_it(
    tiny: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "orin.tar.zst"
    common = ["--target", "jetson-agx-orin", "--plugin", str(table), "--record", "1"]
    assert main(["bundle", str(tiny), "-o", str(path), *common]) == 0
    assert "plugin with 2 layers, prebuilt for aarch64, x86_64" in capsys.readouterr().out
    assert main(["bundle", "--verify", str(path)]) == 0
    assert f"digest {open_bundle(path).digest}" in capsys.readouterr().out.replace("\n", " ")
    for arguments, said in (
        (["-o", str(path)], "--target is needed"),
        (["--target", "jetson-agx-orin"], "--output is needed"),
        (["-o", str(path), "--target", "voodoo"], "voodoo"),
        (["-o", str(tmp_path / "no" / "x"), *common], "make it first"),
        (["-o", str(path), *common, "--precision", "int8"], "int8"),
        (["-o", str(path), *common, "--batch", "4:1"], "batch '4:1'"),
    ):
        assert main(["bundle", str(tiny), *arguments]) == 2
        assert said in capsys.readouterr().err
