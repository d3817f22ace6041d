"""Weights from local files: tensors only, all of them, under the model's names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fna.errors import InputFileError, ModelSourceError
from fna.export.sources.weights import fit_weights, read_weights

MODEL = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4)}


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"teacher": w}])
def test_tensors_are_found_in_what_torch_saved(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap({f"module.{key}": tensor for key, tensor in MODEL.items()}), tmp_path / "x.pth")
    assert {key: tensor.shape for key, tensor in read_weights(tmp_path / "x.pth").items()} == {
        key: tensor.shape for key, tensor in MODEL.items()
    }


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(MODEL, tmp_path / "x.safetensors")
    assert torch.equal(read_weights(tmp_path / "x.safetensors")["a.weight"], MODEL["a.weight"])


class Harm:
    def __reduce__(self) -> Any:
        return (print, ("harm done",))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("x.npz", b"", "of no known kind; give one of .safetensors, .pth"),
        ("gone.pth", None, "do not exist"),
        ("x.safetensors", b"{}", "cannot be read"),
        ("x.pth", b"not a zip", "pickle that holds more than tensors|cannot be read"),
        ("x.pth", [1, 2], "hold no tensors by name"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused_in_one_line(
    tmp_path: Path, file: str, content: Any, reason: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / file)
    with pytest.raises(InputFileError, match=reason) as caught:
        read_weights(tmp_path / file)
    assert "\n" not in str(caught.value)


def test_code_in_a_file_of_weights_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Harm()}, tmp_path / "x.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"a": Harm()}))
    for name in ("x.pth", "old.pth"):
        with pytest.raises(InputFileError, match="its code is never run"):
            read_weights(tmp_path / name)
    assert "harm" not in capsys.readouterr().out


def test_weights_that_do_not_fit_are_named_three_each() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abcd"})
    fit = dict(model.state_dict())
    fit_weights(model, {**fit, "mask_token": torch.zeros(1)}, Path("w.pth"), "mine")
    others = {f"x{number}": torch.zeros(1) for number in range(4)}
    with pytest.raises(ModelSourceError) as caught:
        fit_weights(model, {**{key: fit[key] for key in list(fit)[4:]}, **others}, Path("w.pth"), "mine")
    assert "4 missing (a.weight, a.bias, b.weight, ...); 4 unexpected (x0, x1, x2, ...)" in str(caught.value)
    with pytest.raises(ModelSourceError, match=r"a\.weight is \[3\], but \[2, 2\] is needed"):
        fit_weights(model, {**fit, "a.weight": torch.zeros(3)}, Path("w.pth"), "mine")
    assert torch.equal(model["a"].weight, fit["a.weight"])
