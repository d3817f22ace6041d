"""Attention in an ONNX graph, from a script of your own: find it, look at it with onnx-graphsurgeon, replace it, go on editing.

    python examples/graph_surgery.py MODEL.onnx OUT.onnx

Polygraphy finds the same blocks: polygraphy plugin match MODEL.onnx --plugin-dir examples/polygraphy_plugins -o blocks.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from fna.export.surgery.graft import GraftOptions, graft_graph, inspect_graph, open_graph


def main(source: Path, output: Path) -> int:
    """Replace every plain attention block by FNA with 16 landmarks, and name the softmaxes that are left.

    Returns:
        How many blocks are FNA now.
    """
    # Any gs.Graph will do; open_graph does not load weights that lie in files beside the model.
    graph = open_graph(source)
    tensors = graph.tensors()

    for row in inspect_graph(graph):
        print(f"block {row.block}: {row.node}, {row.family}, {row.decision.value} {row.reason}")
        if row.attention is not None:
            for name, operand in zip(("query", "key", "value"), row.attention.operands, strict=True):
                writer = tensors[operand.tensor].inputs
                print(f"    {name}: {operand.tensor}, written by {writer[0].op if writer else 'an input'}")

    result = graft_graph(graph, GraftOptions(landmarks=16))
    print(result.describe_proof())

    # What comes back is a gs.Graph again, so your own edits go on from here.
    grafted = result.graph
    for node in grafted.nodes:
        if node.op == "Softmax":
            print(f"still exact: {node.name}")
    grafted.cleanup().toposort()
    onnx.save(gs.export_onnx(grafted), output)
    return result.replaced


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
