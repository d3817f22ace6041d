"""From one file to another: lowering, precision, quantisation."""

from __future__ import annotations

from typing import Literal, get_args

Lowering = Literal["portable", "fused", "plugin"]
LOWERINGS: tuple[Lowering, ...] = get_args(Lowering)
"""The forms that a file can be given; see `fna.export.passes.lower`."""
