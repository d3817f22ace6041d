"""The photographs that plans are made on where the user gives none: never those that they are verified on."""

from __future__ import annotations

from PIL import Image

PLANNING = ("camera", "coins", "stereo_motorcycle", "rocket", "clock", "grass")


def planning_photographs() -> list[tuple[str, Image.Image]]:
    """Return six photographs that scikit-image carries in its package; `bundled_photographs` are others."""
    from skimage import data

    found = []
    for name in PLANNING:
        pixels = getattr(data, name)()
        found.append((name, Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")))
    return found
