"""Landmark samplers: a file each, in this folder, which holds a record named `SAMPLER`. The folder is the only list of them.

`sampler_names` reads the names off the files (`norm_grid.py` is `norm-grid`), so that the command line offers them without
importing PyTorch. What several samplers share is in `common/`.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fna.errors import InvalidArgumentError

if TYPE_CHECKING:
    from fna.samplers.common.record import LandmarkRequest as LandmarkRequest
    from fna.samplers.common.record import Sampler as Sampler
    from fna.samplers.common.selection import select_landmarks as select_landmarks
    from fna.samplers.common.weights import landmark_bias as landmark_bias

DEFAULT_SAMPLER = "grid"
"""Static, so it costs nothing, and as close to exact attention as any other on real weights."""

_EXPORTS = {
    "LandmarkRequest": "fna.samplers.common.record",
    "Sampler": "fna.samplers.common.record",
    "select_landmarks": "fna.samplers.common.selection",
    "landmark_bias": "fna.samplers.common.weights",
}
_records: dict[str, Sampler] = {}
"""Those that were imported or registered."""

_names_of_files = tuple(
    sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if not module.ispkg)
)


def sampler_names() -> tuple[str, ...]:
    """Return the names of all samplers, those registered by `register_sampler` last; imports no PyTorch."""
    return (*_names_of_files, *(name for name in _records if name not in _names_of_files))


def find_sampler(name: str) -> Sampler:
    """Return a sampler's record.

    Raises:
        InvalidArgumentError: for a name that no sampler has, naming those that there are.
    """
    if name not in _records:
        check_sampler_name(name)
        _records[name] = import_module(f"fna.samplers.{name.replace('-', '_')}").SAMPLER
    return _records[name]


def all_samplers() -> tuple[Sampler, ...]:
    """Return every sampler's record; their PyTorch operators are registered then."""
    return tuple(find_sampler(name) for name in sampler_names())


def check_sampler_name(name: str) -> str:
    """Return the name if a sampler has it; imports no PyTorch.

    Raises:
        InvalidArgumentError: naming the samplers that there are.
    """
    if name not in sampler_names():
        raise InvalidArgumentError(f"sampler {name!r} is not known; choose one of {', '.join(sampler_names())}")
    return name


def register_sampler(sampler: Sampler) -> None:
    """Add a sampler that is not a file of this folder, for this process.

    Raises:
        InvalidArgumentError: if another sampler has its name.
    """
    if sampler.name in sampler_names():
        raise InvalidArgumentError(f"a sampler named {sampler.name!r} exists already; choose another name")
    _records[sampler.name] = sampler


def unregister_sampler(name: str) -> None:
    """Take back `register_sampler`."""
    if name not in _names_of_files:
        _records.pop(name, None)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fna.samplers' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
