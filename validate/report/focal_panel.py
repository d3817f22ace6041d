"""The keys of one tile of focal attention, drawn on a photograph."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from fna.focal_keys import FAR_BELOW, focal_keys
from fna.plan import FocalBlockPlan

TILE, NEAR, FAR = (255, 255, 255), (194, 65, 12), (37, 99, 235)


def draw_focal_keys(
    photograph: Image.Image, block: FocalBlockPlan, patches: tuple[int, int], prefix_tokens: int
) -> Image.Image:
    """A copy with the middle tile outlined, its near keys small and its sampled ones larger, the more patches one stands for.

    Hot keys are not drawn: they differ from head to head. Prefix tokens have no place in the image.
    """
    picture = photograph.copy()
    draw = ImageDraw.Draw(picture)
    rows, columns = patches
    across, down = picture.width / columns, picture.height / rows
    lists = focal_keys(patches, prefix_tokens, block.tile, block.levels, block.seed)
    tile = len(lists.queries) // 2
    for key, bias in zip(lists.keys[tile], lists.bias[tile], strict=True):
        if key < prefix_tokens or bias <= np.float32(FAR_BELOW):
            continue
        row, column = divmod(int(key) - prefix_tokens, columns)
        x, y = (column + 0.5) * across, (row + 0.5) * down
        radius = min(across, down) * (0.2 + 0.09 * float(bias))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=FAR if bias > 0 else NEAR)
    where = [divmod(int(token) - prefix_tokens, columns) for token in lists.queries[tile]]
    top, left = (min(place[axis] for place in where) for axis in (0, 1))
    bottom, right = (max(place[axis] for place in where) + 1 for axis in (0, 1))
    draw.rectangle((left * across, top * down, right * across, bottom * down), outline=TILE, width=2)
    return picture
