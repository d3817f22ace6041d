"""Names of a model's towers."""

from __future__ import annotations

import pytest

from fna.patching.towers import name_towers, number_towers


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["blocks"], ["blocks"]),
        (["vision_model.encoder.layers"], ["vision_model"]),
        (
            [
                "depth_pro.encoder.patch_encoder.model.encoder.layer",
                "depth_pro.encoder.image_encoder.model.encoder.layer",
            ],
            ["patch_encoder", "image_encoder"],
        ),
        (["left.vit.blocks", "right.vit.blocks"], ["left_vit", "right_vit"]),
        (["aggregator.frame_blocks", "aggregator.global_blocks"], ["frame_blocks", "global_blocks"]),
        (["blocks", "model.blocks"], ["blocks", "model_blocks"]),
    ],
)
def test_towers_have_the_shortest_names_that_tell_them_apart(paths: list[str], names: list[str]) -> None:
    assert list(name_towers(paths).values()) == names


def test_blocks_that_take_turns_are_numbered_in_each_tower() -> None:
    assert number_towers(["a", "b", "a", "b"]) == {"a": "0,2", "b": "1,3"}
    assert number_towers(["a", "a"]) == {}
