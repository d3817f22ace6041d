"""Far cells of focal attention by one sampled patch, or pooled: `python -m studies.pooled_cells --resolution 518`.

One block at a time is made focal, with the far cells' key and value in one of three forms, and the model is run on to its end:

- sampled: one patch of the cell, bias log(count), as `fna.focal_attention` has it;
- mean: the mean key and value of the cell, bias log(count);
- tangent: keys and values weighted by softmax(mean query . key) over the cell, bias its log-sum-exp less the score of the pooled key.

Prints 1 - cosine of the final patch tokens to exact attention, times 10,000.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from fna.export.preprocessing import bundled_photographs
from fna.export.sources.loading import load_model
from fna.export.sources.running import run_torch
from fna.focal import find_hot_keys
from fna.focal_keys import Levels, focal_keys
from fna.observing import AttentionCall, observed
from fna.validate.metrics import cosine
from fna.validate.planning.subject import TorchSubject

FORMS = ("sampled", "mean", "tangent")
HIDDEN = -1e30


def cells_of(tokens: Tensor, side: int, columns: int, prefix: int) -> Tensor:
    """The number of each patch token's cell of `side` x `side`, row by row."""
    patch = tokens - prefix
    return patch // columns // side * -(-columns // side) + patch % columns // side


def pooled_level(
    call: AttentionCall, size: int, patches: tuple[int, int], prefix: int, form: str
) -> tuple[Tensor, ...]:
    """Key `[H, cells, D]`, value and bias `[H, cells]` of every cell of one size."""
    key, value = call.key[0, :, prefix:] * call.scale, call.value[0, :, prefix:]
    rows, columns = patches
    cell = cells_of(prefix + torch.arange(rows * columns), size, columns, prefix)
    count = int(cell.max()) + 1
    counts = torch.zeros(count).index_add(0, cell, torch.ones(rows * columns))
    mean_query = call.query[0, :, prefix:].mean(1)
    scores = torch.einsum("hd,hnd->hn", mean_query, key) if form == "tangent" else torch.zeros(key.shape[:2])
    weights = torch.exp(scores - scores.amax(1, keepdim=True))
    total = torch.zeros(len(key), count).index_add(1, cell, weights)
    shares = (weights / total[:, cell])[..., None]
    pooled = [torch.zeros(len(key), count, key.shape[2]).index_add(1, cell, tensor * shares) for tensor in (key, value)]
    if form == "mean":
        return pooled[0], pooled[1], counts.log().expand(len(key), -1)
    bias = total.log() + scores.amax(1, keepdim=True) - torch.einsum("hd,hcd->hc", mean_query, pooled[0])
    return pooled[0], pooled[1], bias


def focal_with(
    call: AttentionCall, patches: tuple[int, int], prefix: int, tile: int, levels: Levels, hot: int, form: str
) -> Tensor:
    """Focal attention `[1, H, N, D]` of one block in one of `FORMS`."""
    lists = focal_keys(patches, prefix, tile, levels, call.block)
    key, value, query = call.key[0] * call.scale, call.value[0], call.query[0]
    hottest = find_hot_keys(call.query * call.scale, call.key, torch.zeros(call.key.shape[:3]), prefix, hot)[
        0
    ]  # [H, hot]
    at_hot = hottest[..., None].expand(-1, -1, key.shape[2])
    once = torch.zeros(key.shape[:2]).scatter(1, hottest, HIDDEN)
    pooled = {
        size: pooled_level(call, size, patches, prefix, form) for size, _ in levels if size > 1 and form != "sampled"
    }
    out = call.out[0].clone()
    for queries, keys, bias in zip(*map(torch.from_numpy, (lists.queries, lists.keys, lists.bias)), strict=True):
        listed = bias > HIDDEN
        tokens, counts = keys[listed].long(), bias[listed].exp().round().int()
        parts = [(key[:, tokens], value[:, tokens], bias[listed] + once[:, tokens])]
        if form != "sampled":
            # Cells that the grid's edge cuts stay sampled.
            row, column = (tokens - prefix) // patches[1], (tokens - prefix) % patches[1]
            side = counts.float().sqrt().round().long()
            inside = (row // side * side + side <= patches[0]) & (column // side * side + side <= patches[1])
            whole = (side > 1) & (side * side == counts) & inside
            parts = [(key[:, tokens[~whole]], value[:, tokens[~whole]], (bias[listed] + once[:, tokens])[:, ~whole])]
            for size, level in pooled.items():
                cells = cells_of(tokens[whole & (side == size)], size, patches[1], prefix)
                parts.append(tuple(tensor[:, cells] for tensor in level))  # type: ignore[arg-type]
        parts.append((key.gather(1, at_hot), value.gather(1, at_hot), torch.zeros(hottest.shape)))
        keys_of, values_of, biases = (torch.cat(group, 1) for group in zip(*parts, strict=True))
        weights = torch.softmax(query[:, queries.long()] @ keys_of.mT + biases[:, None], -1)
        out[:, queries.long()] = weights @ values_of
    return out[None]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=518)
    parser.add_argument("--levels", default="1,0/2,2/4,6")
    parser.add_argument("--blocks", type=int, nargs="+", default=list(range(12)))
    parser.add_argument("--tile", type=int, default=8)
    parser.add_argument("--hot", type=int, default=16)
    parser.add_argument("--photographs", type=int, default=2)
    arguments = parser.parse_args()
    side = arguments.resolution
    subject = TorchSubject(load_model("dinov2-small-saliency"), side, side)
    layout, model = subject.layout, subject.model
    assert layout.patches is not None
    levels: Levels = tuple((int(a), int(b)) for a, b in (level.split(",") for level in arguments.levels.split("/")))
    pixels = [
        subject.preprocessing.apply(image, side, side)[None]
        for _, image in bundled_photographs()[: arguments.photographs]
    ]
    exact = [subject.tokens(run_torch(model, image)) for image in pixels]
    for block in arguments.blocks:
        losses = []
        for form in FORMS:

            def replaced(call: AttentionCall, number: int = block, form: str = form) -> Tensor | None:
                if call.block != number:
                    return None
                return focal_with(
                    call, layout.patches, layout.prefix_tokens, arguments.tile, levels, arguments.hot, form
                )  # type: ignore[arg-type]

            with observed(model.module, replaced):
                found = [subject.tokens(run_torch(model, image)) for image in pixels]
            pairs = zip(exact, found, strict=True)
            losses.append(
                1 - float(np.mean([cosine(a.astype(np.float64), b.astype(np.float64))[1:].mean() for a, b in pairs]))
            )
        print(
            f"block {block}: " + ", ".join(f"{f} {1e4 * loss:.2f}" for f, loss in zip(FORMS, losses, strict=True)),
            flush=True,
        )


if __name__ == "__main__":
    main()
