"""The PTX that the build keeps beside the kernel table, with the hash of the image that each became."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from fna.errors import InputFileError, MissingCapabilityError
from fna.plugins.launch_plan import KernelVariant
from fna.plugins.ptx.kernel import Kernel


@dataclass(frozen=True)
class PtxImage:
    """The PTX of one variant for one chip and what a launch of it needs. `sm` 0 is the fallback, whose image is its PTX."""

    variant: str
    sm: int
    path: Path
    image_sha256: str
    symbol: str
    shared: int
    warps: int
    layout: str

    def text(self) -> str:
        """The PTX."""
        return zlib.decompress(self.path.read_bytes()).decode()


@dataclass
class PtxImages:
    """All of a build, and the kernels translated so far."""

    by_name: dict[tuple[str, int], PtxImage]
    _kernels: dict[tuple[str, int, bool], Kernel] = field(default_factory=dict)

    def chips(self) -> list[int]:
        """The chips in it."""
        return sorted({sm for _, sm in self.by_name})

    def image(self, variant: str, sm: int) -> PtxImage:
        """The PTX of a variant for a chip."""
        if (variant, sm) not in self.by_name:
            raise MissingCapabilityError(
                f"the build has no PTX of {variant} for sm_{sm}; rebuild it: fna plugin --sm {sm},0"
            )
        return self.by_name[variant, sm]

    def kernel(self, variant: KernelVariant, sm: int, *, profile: bool = False) -> Kernel:
        """The kernel of a variant, translated once."""
        key = variant.name, sm, profile
        if key not in self._kernels:
            image = self.image(variant.name, sm)
            self._kernels[key] = Kernel(image.text(), image.shared, image.variant, profile=profile)
        return self._kernels[key]

    def with_kernel(self, image: PtxImage, kernel: Kernel) -> PtxImages:
        """The same with another kernel in an image's place."""
        return PtxImages(self.by_name, {**self._kernels, (image.variant, image.sm, False): kernel})

    def of_image(self, sha256: str) -> PtxImage:
        """The PTX of the image with this hash."""
        for image in self.by_name.values():
            if image.image_sha256 == sha256:
                return image
        raise MissingCapabilityError(
            f"no PTX is kept of the image with SHA-256 {sha256[:16]}; rebuild the table: fna plugin"
        )


def load_images(folder: Path) -> PtxImages:
    """Read ptx.json in the folder of a kernel table."""
    try:
        rows = json.loads((folder / "ptx.json").read_text())["kernels"]
        images = [PtxImage(path=folder / row.pop("file"), **row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputFileError(
            f"{folder / 'ptx.json'} cannot be read ({error}); build it: fna plugin -o {folder}"
        ) from error
    return PtxImages({(image.variant, image.sm): image for image in images})
