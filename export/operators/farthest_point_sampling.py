"""FarthestPointSampling: the sampler `fps` in ONNX."""

from __future__ import annotations

from fna.export.operators.builder import Builder
from fna.export.operators.record import FormalAttribute, FormalParameter, Operator

_LARGEST = 3.0e38
"""Stands for an infinite distance; finite, because some builders fold infinities away."""
_CHOSEN = -1.0


def _body(op: Builder, features: str, *, num_landmarks: int) -> str:  # [B, N, C] T -> [B, S] int32
    """Write a loop: the token farthest from those chosen before, by squared distance; ties go to the lowest index."""
    points = op.Cast(features, to="FLOAT")
    size = op.Shape(features)
    batch = op.Gather(size, [0])
    point_shape = op.Concat(batch, [1], op.Gather(size, [2]), axis=0)
    marks = op.Expand(_CHOSEN, op.Concat(batch, [1], axis=0))
    start = op.Expand(_LARGEST, op.Gather(size, [0, 1]))

    def step(op: Builder, _number: str, going: str, distance: str) -> tuple[str, str, str]:
        index = op.ArgMax(distance, axis=1, keepdims=1, select_last_index=0)
        row = op.Expand(op.Unsqueeze(index, axes=[2]), point_shape)
        offset = op.Sub(points, op.GatherElements(points, row, axis=1))
        nearer = op.Min(distance, op.ReduceSumSquare(offset, axes=[2], keepdims=0))
        next_distance = op.ScatterElements(nearer, index, marks, axis=1)
        return op.Identity(going), next_distance, op.Cast(op.Squeeze(index, axes=[1]), to="INT32")

    body = op.subgraph(
        step,
        inputs={"number": ("INT64", []), "going": ("BOOL", []), "distance": ("FLOAT", ["batch_size", "num_tokens"])},
        outputs=[("BOOL", []), ("FLOAT", ["batch_size", "num_tokens"]), ("INT32", ["batch_size"])],
    )
    _, picks = op.Loop(num_landmarks, op.Cast(num_landmarks, to="BOOL"), start, body=body, outputs=2)
    return str(op.Transpose(picks, perm=[1, 0]))


FARTHEST_POINT_SAMPLING = Operator(
    "FarthestPointSampling",
    inputs=(FormalParameter("features"),),
    outputs=(FormalParameter("landmarks", "INT32"),),
    attributes=(FormalAttribute("num_landmarks"),),
    body=_body,
    torch_operators={"farthest_point_sampling": None},
    plugin=True,
)
