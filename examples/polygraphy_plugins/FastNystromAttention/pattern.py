"""What `polygraphy plugin match --plugin-dir examples/polygraphy_plugins` asks: where is attention that FNA can replace.

Polygraphy takes a folder for each plugin and calls these functions. They may look for what they like; this one asks the matcher
of `fna graft`, because a fixed chain of operators would miss most spellings of attention and take masked ones for plain.
"""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from fna.export.surgery.graft import inspect_graph


def get_plugin_metadata() -> dict[str, str]:
    """Name of this folder, and of the operator."""
    return {"name": "FastNystromAttention", "op": "FastNystromAttention"}


def get_matching_subgraphs(graph: gs.Graph) -> list[dict[str, Any]]:
    """Every block that `fna inspect` calls eligible: its inputs, its output, its scale."""
    return [
        {
            "inputs": [operand.tensor for operand in row.attention.operands],
            "outputs": [row.attention.result.tensor],
            "attributes": {"scale": float(row.attention.scale)},
        }
        for row in inspect_graph(graph)
        if row.attention is not None
    ]


def replace_with_plugin(graph: gs.Graph, **_: Any) -> bool:
    """Left to `fna graft`, which adds the landmarks that the operator needs and proves each block."""
    return False
