"""Model sources: folders, factories and ids; and what is said when a model cannot be had."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from called_models import OwnViT
from called_models import build as build_own
from model_families import FAMILIES, IMAGE, REFUSED, SIZES, Family, build_tiny, sample_pixels, siglip2_inputs
from torch import nn

import fna
from fna.errors import FnaError, MissingCapabilityError, ModelSourceError, UnsupportedAttentionError
from fna.export.sources import loading, transformers_models
from fna.export.sources.loading import BUILT_IN, check_resolution, load_model, wrap_model
from fna.export.sources.vision_modules import VisionOutputs, antialiased_bilinear
from fna.patching import find_attention_blocks

BY_NAME = {family.name: family for family in FAMILIES}


def refuse(name: str, *reasons: str) -> str:
    """Load a model that must be refused in one line that holds `reasons`, within seconds."""
    start = time.monotonic()
    with pytest.raises(ModelSourceError) as caught:
        load_model(name)
    message = str(caught.value)
    assert time.monotonic() - start < 10
    assert "\n" not in message
    for reason in reasons:
        assert reason in message
    return message


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder by `save_pretrained` (safetensors) for every family."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for number, family in enumerate(FAMILIES):
        made[family.name] = root / str(number)
        build_tiny(family).save_pretrained(made[family.name])
    return made


@pytest.fixture
def vit_folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A ViT's folder that a test may damage."""
    return Path(shutil.copytree(folders["ViT"], tmp_path / "vit"))


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Folders


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_saved_folder_loads_with_its_own_weights(family: Family, folders: dict[str, Path]) -> None:
    loaded = load_model(str(folders[family.name]))
    assert loaded.output_names == family.outputs
    assert loaded.patch_size == 4
    assert loaded.native_resolution == 32
    assert loaded.any_resolution is family.any_resolution
    assert loaded.num_blocks == (4 if family.name == "Depth Anything" else 3)
    assert loaded.map_outputs == (("predicted_depth",) if family.name == "Depth Anything" else ())
    tower = family.vision(build_tiny(family))
    pixels = sample_pixels()
    with torch.inference_mode():
        outputs = dict(zip(loaded.output_names, loaded.module(pixels), strict=True))
        if "SigLIP 2" in family.name:
            expected = tower(**siglip2_inputs(pixels))
        else:
            expected = tower(pixels)
    shared = [name for name in outputs if name in expected]
    if family.name != "ViT, classifier":
        assert shared
    for name in shared:
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-5)


def test_llavas_projected_tokens_are_what_its_language_model_is_given(folders: dict[str, Path]) -> None:
    loaded = load_model(str(folders["LLaVA"]))
    model = build_tiny(BY_NAME["LLaVA"])
    pixels = sample_pixels()
    with torch.inference_mode():
        features = loaded.module(pixels)[loaded.output_names.index("image_features")]
        given = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    assert features.shape == (2, 64, 32)
    torch.testing.assert_close(features, given, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (64, 48), (12, 16)])
def test_siglip2_takes_images_of_any_one_size_as_its_own_processor_cuts_them(
    folders: dict[str, Path], height: int, width: int
) -> None:
    loaded = load_model(str(folders["SigLIP 2 vision"]))
    model = build_tiny(BY_NAME["SigLIP 2 vision"])
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        tokens, pooled = loaded.module(pixels)
        expected = model(**siglip2_inputs(pixels))
    torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=1e-4, atol=1e-4)


def test_patches_are_cut_as_siglip2s_image_processor_cuts_them() -> None:
    processor = transformers.Siglip2ImageProcessor(
        patch_size=4, max_num_patches=64, do_normalize=False, do_rescale=False, do_resize=False
    )
    image = torch.randint(0, 255, (3, 32, 32), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    cut = processor(images=[image], return_tensors="pt", input_data_format="channels_first")
    torch.testing.assert_close(cut["pixel_values"].float(), siglip2_inputs(image[None].float())["pixel_values"])


@pytest.mark.parametrize(("size", "new_size"), [(16, 16), (16, 37), (16, 9), (5, 1)])
def test_resize_weights_are_pytorchs(size: int, new_size: int) -> None:
    signal = torch.randn(1, 1, 1, size, generator=torch.Generator().manual_seed(6))
    expected = F.interpolate(signal, size=(1, new_size), mode="bilinear", antialias=True)
    torch.testing.assert_close(antialiased_bilinear(size, new_size) @ signal[0, 0, 0], expected[0, 0, 0])


def test_preprocessing_is_read_from_the_folder(vit_folder: Path) -> None:
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "resample": 2}
    (vit_folder / "preprocessor_config.json").write_text(json.dumps(settings))
    preprocessing = load_model(str(vit_folder)).preprocessing
    assert preprocessing.mean == (0.5, 0.4, 0.3)
    assert preprocessing.std == (0.1, 0.2, 0.3)
    assert preprocessing.resize == "bilinear"


@pytest.mark.parametrize("text", ["not json", json.dumps({"image_std": [0, 0, 0]})])
def test_bad_preprocessing_is_an_error_not_a_default(vit_folder: Path, text: str) -> None:
    (vit_folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(FnaError, match=r"preprocessor_config\.json"):
        load_model(str(vit_folder))


def test_a_pytorch_bin_loads_as_weights_only(vit_folder: Path) -> None:
    expected = load_model(str(vit_folder)).module(sample_pixels())
    (vit_folder / "model.safetensors").unlink()
    torch.save(build_tiny(BY_NAME["ViT"]).state_dict(), vit_folder / "pytorch_model.bin")
    torch.testing.assert_close(load_model(str(vit_folder)).module(sample_pixels()), expected)


class Exploit:
    """Unpickling this runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(vit_folder: Path, writer: Any, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (vit_folder / "model.safetensors").unlink()
    writer({"cls_token": Exploit(marker)}, vit_folder / "pytorch_model.bin")
    message = refuse(str(vit_folder), str(vit_folder), "more than tensors", "safetensors")
    assert "weights_only" not in message
    assert not marker.exists()


def test_code_in_a_model_folder_is_not_run(vit_folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (vit_folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((vit_folder / "config.json").read_text())
    config.update(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    (vit_folder / "config.json").write_text(json.dumps(config))
    refuse(str(vit_folder))
    assert not marker.exists()


def test_an_architecture_that_is_no_model_falls_back_to_the_model_type(vit_folder: Path) -> None:
    config = json.loads((vit_folder / "config.json").read_text())
    (vit_folder / "config.json").write_text(json.dumps({**config, "architectures": ["pipeline"]}))
    assert load_model(str(vit_folder)).num_blocks == 3


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    refuse(str(tmp_path), "has no config.json", "save_pretrained")


def test_a_folder_without_weights_is_refused(vit_folder: Path) -> None:
    (vit_folder / "model.safetensors").unlink()
    refuse(str(vit_folder), str(vit_folder))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no-such-type"}'])
def test_a_broken_config_is_refused(vit_folder: Path, text: str) -> None:
    (vit_folder / "config.json").write_text(text)
    refuse(str(vit_folder))


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_corrupt_safetensors_are_refused(vit_folder: Path, size: int) -> None:
    weights = vit_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    refuse(str(vit_folder), f"model folder {vit_folder} cannot be loaded", "save_pretrained")


def test_a_checkpoint_that_lacks_weights_is_refused_by_their_names(vit_folder: Path) -> None:
    model = build_tiny(BY_NAME["ViT"])
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.attention.q_proj" not in name}
    model.save_pretrained(vit_folder, state_dict=state)
    refuse(str(vit_folder), "lacks 2 weights", "layers.1.attention.q_proj.bias", "complete checkpoint")


def test_an_untrained_pooler_is_not_exported(vit_folder: Path) -> None:
    model = build_tiny(BY_NAME["ViT"])
    state = {name: tensor for name, tensor in model.state_dict().items() if "pooler" not in name}
    model.save_pretrained(vit_folder, state_dict=state)
    assert load_model(str(vit_folder)).output_names == ("last_hidden_state",)


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    next(entry for entry in REFUSED if entry.name == "BERT (text)").build().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedAttentionError, match="BertModel has no self-attention block"):
        load_model(str(tmp_path))


# Ids


def test_an_unknown_id_is_refused_at_once_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    requests = []

    class NoNetwork:
        def head(self, *args: Any, **_: Any) -> None:
            requests.append(args)
            raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", NoNetwork)
    refuse("nobody/no-such-model", "not in the local model cache", "cannot be reached", *BUILT_IN)
    assert len(requests) == 1


@pytest.mark.parametrize("name", ["a/b/c", "./nowhere", "/no/such/folder", "", "model with spaces", "..", "x" * 200])
def test_what_cannot_be_an_id_is_refused_without_asking_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bool:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(transformers_models, "_hub_answers", fail)
    refuse(name)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    refuse(str(tmp_path / "model.onnx"), "is a file", "fna graft")


# Factories


FACTORIES = """
    import torch
    import transformers

    def vit():
        torch.manual_seed(0)
        return transformers.ViTModel(transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                                            intermediate_size=64, image_size=32, patch_size=8))

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = vit()

        def forward(self, pixel_values):
            return self.backbone(pixel_values).last_hidden_state

    class Pair(Tokens):
        def forward(self, pixel_values):
            tokens = super().forward(pixel_values)
            return tokens, tokens.mean(1)

    class Named(Tokens):
        def forward(self, pixel_values):
            tokens = super().forward(pixel_values)
            return {"strange": tokens, "heat": pixel_values.mean(1), "steps": 3, "where": tokens.argmax(1)}

    class Odd(Tokens):
        def forward(self, pixel_values):
            return {"strange": [super().forward(pixel_values)]}

    def number():
        return 3

    def broken():
        raise RuntimeError("first line\\nsecond line")

    def needs_argument(size):
        return vit()

    not_callable = 7
"""


@pytest.fixture
def factories(in_tmp: Path) -> str:
    """The name of a module with model factories in the current folder, unlike any other test's."""
    name = f"factories_{in_tmp.name}".replace("-", "_")
    (in_tmp / f"{name}.py").write_text(textwrap.dedent(FACTORIES))
    return name


def test_a_factory_is_imported_from_the_current_folder(factories: str) -> None:
    import sys

    before = list(sys.path)
    loaded = load_model(f"{factories}:vit")
    assert sys.path == before
    assert loaded.name == f"{factories}:vit"
    assert (loaded.patch_size, loaded.native_resolution, loaded.num_blocks) == (8, 32, 2)
    assert loaded.output_names == ("last_hidden_state", "pooler_output")


@pytest.mark.parametrize(("factory", "names"), [("Tokens", ("output",)), ("Pair", ("output_0", "output_1"))])
def test_a_factorys_model_may_return_plain_tensors(factories: str, factory: str, names: tuple[str, ...]) -> None:
    loaded = load_model(f"{factories}:{factory}")
    assert loaded.output_names == names
    assert loaded.module(sample_pixels())[0].shape == (2, 17, 32)
    assert loaded.any_resolution is False  # its own forward does not interpolate


def test_a_factorys_model_may_name_its_tensors_itself(factories: str) -> None:
    loaded = load_model(f"{factories}:Named")
    assert loaded.output_names == ("strange", "heat")
    assert (loaded.token_outputs, loaded.map_outputs) == (("strange",), ("heat",))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("missing", "cannot be imported"),
        ("number", "returned a int, but a torch.nn.Module is needed"),
        ("broken", "raised RuntimeError: first line"),
        ("needs_argument", "raised TypeError"),
        ("not_callable", "is a int, but a function"),
        ("", "cannot be imported"),
        ("Odd", "returns a dict without any of"),
    ],
)
def test_a_bad_factory_is_refused(factories: str, function: str, reason: str) -> None:
    refuse(f"{factories}:{function}", f"{factories}:{function}", reason)


@pytest.mark.parametrize("name", ["no_such_module:factory", ":factory", "a..b:factory", "https://example.com/model"])
def test_a_module_that_cannot_be_imported_is_refused(name: str) -> None:
    refuse(name, "cannot be imported")


def test_a_module_with_a_syntax_error_is_refused(in_tmp: Path) -> None:
    (in_tmp / "half_written.py").write_text("def factory(:\n")
    refuse("half_written:factory", "half_written:factory", "cannot be imported")


def test_a_factorys_model_without_a_vision_transformer_is_refused(
    factories: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "call_factory", lambda _: nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(UnsupportedAttentionError, match="Sequential has no self-attention block"):
        load_model(f"{factories}:vit")


def test_a_factory_takes_arguments_and_weights(factories: str, in_tmp: Path) -> None:
    (in_tmp / f"{factories}.py").write_text(
        "from called_models import OwnViT, build\ndef make(prefix=1, kind='plain'):\n    return build(OwnViT(kind, prefix=prefix))\n"
    )
    loaded = load_model(f"{factories}:make,prefix=2,kind=plain")
    assert (loaded.patch_size, loaded.native_resolution, loaded.num_blocks, loaded.any_resolution) == (4, 32, 1, False)
    assert loaded.module(sample_pixels())[0].shape == (2, 66, 32)
    assert loaded.token_outputs == loaded.output_names == ("output",)
    weights = {key: tensor + 1 for key, tensor in loaded.module.model.state_dict().items()}
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in weights.items()}}, in_tmp / "own.pth")
    again = load_model(f"{factories}:make,prefix=2,weights={in_tmp / 'own.pth'}").module.model.state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("written", ["prefix", "prefix=2,prefix=3", "2=3", ""])
def test_an_argument_that_cannot_be_read_is_refused(factories: str, written: str) -> None:
    refuse(f"{factories}:vit,{written}", "cannot be read; write", "size=518")


def test_an_argument_that_the_factory_does_not_take_is_refused(factories: str) -> None:
    refuse(f"{factories}:vit,colour=7", "raised TypeError", "colour")


def test_a_library_that_is_not_installed_or_not_usable_is_said(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        MissingCapabilityError, match=r"models of timm need the Python package timm.*install it with pip"
    ):
        load_model("timm:vit_small_patch14_dinov2")
    (in_tmp / "open_clip.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(in_tmp))
    refuse("open_clip:ViT-B-16", "open_clip cannot be imported: operator torchvision::nms does not exist")


# Resolutions


@pytest.mark.parametrize(("side", "near"), [(30, 32), (1, 4), (0, 4), (-8, 4), (33, 32)])
def test_a_resolution_off_the_patch_grid_is_refused_with_the_nearest(
    folders: dict[str, Path], side: int, near: int
) -> None:
    model = load_model(str(folders["ViT"]))
    with pytest.raises(ModelSourceError, match=rf"resolution {side} .*patch size 4; the nearest that is: {near}$"):
        check_resolution(model, side, 32)
    with pytest.raises(ModelSourceError, match=f"resolution {side} "):
        check_resolution(model, 32, side)
    check_resolution(model, 48, 64)


def test_a_model_of_one_resolution_says_so(factories: str) -> None:
    model = load_model(f"{factories}:Tokens")
    check_resolution(model, 32, 32)
    with pytest.raises(ModelSourceError, match="takes 32x32 images only, but 64x64 was asked for"):
        check_resolution(model, 64, 64)


def test_a_model_that_does_not_run_at_its_own_size_is_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SIZES, **{**IMAGE, "num_channels": 4})
    transformers.ViTModel(config).save_pretrained(tmp_path)
    refuse(str(tmp_path), "does not run on one 32x32 image")


def test_a_loaded_model_is_surveyed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = wrap_model("tests:own", build_own(OwnViT("plain", "twice")))
    fresh = find_attention_blocks(VisionOutputs(loaded.module.model, ("output",), {}, (3, 32, 32)))
    monkeypatch.setattr(fna.patching.called_blocks, "survey", None)
    twin = copy.deepcopy(loaded.module)
    for module in (loaded.module, twin):
        blocks = find_attention_blocks(module)
        assert [(block.name, block.call) for block in blocks] == [(block.name, block.call) for block in fresh]
        assert [module.get_submodule(block.name.partition("#")[0]) for block in blocks] == [
            block.attention for block in blocks
        ]
