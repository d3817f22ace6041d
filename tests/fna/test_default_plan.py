"""What `fna export` makes of a model when it is given no plan and no setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from fna import default_plan
from fna.chebyshev import default_core
from fna.cli import main
from fna.default_plan import plan_without_photographs
from fna.files import load_onnx


def test_more_patches_mean_coarser_cells_and_few_patches_stay_exact() -> None:
    small, medium, large = (plan_without_photographs(4, {2}, (side, side), 1) for side in (16, 37, 73))
    assert small[0].replaced_blocks == []
    assert "stays exact: at 256 patches nothing pays" in small[1]
    for made, levels in ((medium[0], ((1, 0), (2, 2))), (large[0], ((1, 0), (2, 2), (4, 12)))):
        assert [block.block for block in made.focal] == [0, 1]
        assert {block.levels for block in made.focal} == {levels}
        assert len({block.seed for block in made.focal}) == 2
        assert [(block.block, block.landmarks) for block in made.blocks] == [(3, 128)]
        assert made.chebyshev_of(made.blocks[0]) == default_core(128, "weighted")
        assert made.patches is not None


def test_a_model_without_a_patch_grid_stays_exact() -> None:
    made, said = plan_without_photographs(4, set(), None, 1)
    assert made.replaced_blocks == []
    assert "not on a grid that is known" in said


@pytest.mark.parametrize(
    ("fewest", "arguments", "attention", "said"),
    [
        (4, [], {"FocalAttention", "FastNystromAttention"}, "the first half of its blocks focal"),
        (900, [], set(), "stays exact"),
        (4, ["--landmarks", "5"], {"FastNystromAttention"}, ""),
        (4, ["--method", "published", "--landmarks", "5"], {"FastNystromAttention"}, ""),
    ],
)
def test_export_without_options_takes_it_and_any_option_is_meant(
    fewest: int,
    arguments: list[str],
    attention: set[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(default_plan, "FEWEST_PATCHES", fewest)
    monkeypatch.setattr(default_plan, "TILE", 2)
    monkeypatch.setattr(default_plan, "HOT", (2, 2))
    monkeypatch.setattr(default_plan, "LANDMARKS", 5)
    path = tmp_path / "model.onnx"
    assert main(["export", "tiny_files:make_tiny_dinov2", "-o", str(path), *arguments]) == 0
    assert {node.op_type for node in load_onnx(path).graph.node if node.domain == "fna"} == attention
    out = " ".join(capsys.readouterr().out.split())
    assert said in out
    assert ("note:" in out) == bool(said)
