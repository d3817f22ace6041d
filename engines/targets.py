"""The devices that engines are built for."""

from __future__ import annotations

from dataclasses import dataclass

from fna.errors import InvalidArgumentError


@dataclass(frozen=True)
class Target:
    """A device family.

    Attributes:
        name: as given to `--target`.
        capabilities: CUDA compute capabilities times ten, 86 for 8.6.
        devices: which products these are, for people.
    """

    name: str
    capabilities: tuple[int, ...]
    devices: str


TARGETS = (
    # Compute capabilities: NVIDIA's CUDA GPU list. TensorRT for RTX 1.7 also names 7.5, but refuses every fp32 matrix product
    # there ("FP32 GEMM is not supported"), and FNA computes in fp32 inside, so Turing is not a target.
    Target("rtx-ampere", (80, 86), "GeForce RTX 30, RTX A-series, A100"),
    Target("rtx-ada", (89,), "GeForce RTX 40, RTX Ada"),
    Target("rtx-blackwell", (120,), "GeForce RTX 50, RTX PRO Blackwell"),
)
TARGET_NAMES = (*(target.name for target in TARGETS), "all")


def find_targets(name: str) -> tuple[Target, ...]:
    """Return the targets of one name; `all` is every one of them.

    Raises:
        InvalidArgumentError: for a name that is not in the table.
    """
    chosen = TARGETS if name == "all" else tuple(target for target in TARGETS if target.name == name)
    if not chosen:
        raise InvalidArgumentError(f"target {name!r} is not known; choose one of {', '.join(TARGET_NAMES)}")
    return chosen
