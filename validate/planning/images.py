"""The photographs that plans are made on where the user gives none: never those that they are verified on."""

from __future__ import annotations

from PIL import Image

PLANNING = ("camera", "coins", "stereo_motorcycle", "rocket", "clock", "grass", "hubble_deep_field")


def planning_photographs() -> list[tuple[str, Image.Image]]:
    """Return eight photographs that scikit-image and matplotlib carry in their packages; `bundled_photographs` are others."""
    from matplotlib.cbook import get_sample_data
    from skimage import data

    photographs = []
    for name in PLANNING:
        pixels = getattr(data, name)()
        photographs.append((name, Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")))
    portrait = get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(portrait) as image:
        photographs.append(("grace_hopper", image.convert("RGB")))
    return photographs
