"""Find the CUDA kernels of `fna`'s operators: installed packages offer them under the entry point group `fna.cuda_kernels`.

`fna` itself imports no kernel package; it looks once, when the first CUDA tensor arrives at an operator that has no kernel.
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points

ENTRY_POINT_GROUP = "fna.cuda_kernels"


@functools.cache
def load_cuda_kernels() -> bool:
    """Call every entry point of the group, once; return whether one of them registered kernels.

    An entry point is a function without arguments that returns whether it registered kernels for `fna`'s operators.
    """
    registered = [point.load()() for point in entry_points(group=ENTRY_POINT_GROUP)]
    return any(registered)
