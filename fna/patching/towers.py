"""Names of a model's towers: stacks of attention blocks that are numbered apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fna.block_numbers import format_layers

_GENERAL = {"model", "module", "encoder", "layers", "layer", "blocks", "resblocks", "transformer", "trunk", "stages"}
"""Parts of a stack's path that say nothing of what it is for."""


def name_towers(paths: Iterable[str]) -> dict[str, str]:
    """Return a name for each stack by its path: the shortest end of the path, general words left out, that no other has."""
    distinct = list(dict.fromkeys(paths))
    telling = {path: [part for part in path.split(".") if part not in _GENERAL] or path.split(".") for path in distinct}
    for count in range(1, max((len(parts) for parts in telling.values()), default=0) + 1):
        names = {path: "_".join(parts[-count:]) for path, parts in telling.items()}
        if len(set(names.values())) == len(distinct):
            return names
    return {path: path.replace(".", "_") for path in distinct}


def number_towers(names: Sequence[str]) -> dict[str, str]:
    """Return each tower's block numbers, as `parse_layers` reads them, from the tower's name of each block; none for one tower."""
    distinct = list(dict.fromkeys(names))
    if len(distinct) < 2:
        return {}
    return {tower: format_layers(number for number, name in enumerate(names) if name == tower) for tower in distinct}


def describe_towers(towers: Mapping[str, str]) -> str:
    """Say which towers there are: `vision (blocks 0-11), depth (blocks 12-23)`."""
    return ", ".join(f"{name} (blocks {numbers})" for name, numbers in towers.items()) or "no name (it has one)"
