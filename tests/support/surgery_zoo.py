"""Small models whose attention is known by construction: what a matcher has to recognise, and what it has to leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

DIM, HEADS, IMAGE, PATCH = 32, 4, 32, 8
HEAD = DIM // HEADS
GRID = IMAGE // PATCH
TOKENS = GRID * GRID + 1


def randomise(module: nn.Module, seed: int = 0, spread: float = 0.15) -> nn.Module:
    """Random weights with biases that are not zero, so that a bias that is lost shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * spread
        norm_weight = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = (noise + 1.0 if norm_weight else noise).to(parameter.dtype)
    return module.eval()


class Block(nn.Module):
    def __init__(self, attention: nn.Module, post_norm: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = attention
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.post_norm = post_norm

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = self.norm1(x + self.attn(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Patches, class token, position embedding, blocks of any attention, a head."""

    def __init__(
        self, make: Callable[[], nn.Module], depth: int = 2, *, classes: bool = True, post_norm: bool = False
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, DIM)) if classes else None
        self.pos = nn.Parameter(torch.zeros(1, TOKENS - (0 if classes else 1), DIM))
        self.blocks = nn.ModuleList(Block(make(), post_norm) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.pos
        for block in self.blocks:
            x = block(x)
        return torch.softmax(self.head(self.norm(x)[:, 0]), dim=-1)


class Separate(nn.Module):
    """Separate projections; everything that varies between hand-written attentions is an argument."""

    def __init__(self, scale: str = "scores_mul", key_bias: bool = True, core: str = "matmul") -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM, bias=key_bias), nn.Linear(DIM, DIM)
        self.out = nn.Linear(DIM, DIM)
        self.scale, self.core = scale, core
        self.factor = HEAD**-0.5

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, HEAD).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.scale == "q_early":
            q = q * self.factor
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        if self.scale == "q":
            q = q * self.factor
        if self.scale == "q_div":
            q = q / math.sqrt(HEAD)
        if self.scale == "k":
            k = k * self.factor
        if self.scale == "root":
            q, k = q * self.factor**0.5, k * self.factor**0.5
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))

    def scaled(self, scores: Tensor) -> Tensor:
        if self.scale == "scores_mul":
            return scores * self.factor
        if self.scale == "scores_div":
            return scores / math.sqrt(HEAD)
        return scores

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.core == "einsum":
            weights = self.scaled(torch.einsum("bhid,bhjd->bhij", q, k)).softmax(-1)
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        if self.core == "sdpa":
            return functional.scaled_dot_product_attention(q, k, v)
        if self.core == "rank3":
            b = q.shape[0]
            q, k, v = (t.reshape(b * HEADS, -1, HEAD) for t in (q, k, v))
            return torch.bmm(self.scaled(torch.bmm(q, k.transpose(1, 2))).softmax(-1), v).view(b, HEADS, -1, HEAD)
        if self.core == "transposed_scores":
            weights = self.scaled(k @ q.transpose(-2, -1)).softmax(-2)
            return weights.transpose(-2, -1) @ v
        if self.core == "value_first":
            weights = self.scaled(q @ k.transpose(-2, -1)).softmax(-1)
            return (v.transpose(-2, -1) @ weights.transpose(-2, -1)).transpose(-2, -1)
        if self.core == "spelt_softmax":
            scores = self.scaled(q @ k.transpose(-2, -1))
            powers = torch.exp(scores - scores.amax(-1, keepdim=True))
            return (powers / powers.sum(-1, keepdim=True)) @ v
        if self.core == "float_softmax":
            weights = self.scaled(q @ k.transpose(-2, -1)).softmax(-1, dtype=torch.float32).to(q.dtype)
            return functional.dropout(weights, 0.1, self.training) @ v
        if self.core == "nan_guard":
            weights = self.scaled(q @ k.transpose(-2, -1)).softmax(-1)
            weights = torch.where(torch.isnan(weights), torch.zeros_like(weights), weights)
            return weights @ v
        if self.core == "zero_mask":
            mask = torch.zeros(q.shape[0], 1, q.shape[2], q.shape[2], dtype=q.dtype)
            return (self.scaled(q @ k.transpose(-2, -1)) + mask).softmax(-1) @ v
        if self.core == "true_mask":
            keep = torch.arange(q.shape[2])[None, :] >= 0
            scores = self.scaled(q @ k.transpose(-2, -1)).masked_fill(~keep, float("-inf"))
            return scores.softmax(-1) @ v
        return self.scaled(q @ k.transpose(-2, -1)).softmax(-1) @ v


class Packed(nn.Module):
    """One projection for q, k and v, taken apart in one of the usual ways."""

    def __init__(self, split: str = "timm", heads: int = HEADS) -> None:
        super().__init__()
        self.count = heads
        self.size = DIM // heads if DIM % heads == 0 else HEAD
        self.qkv, self.proj = nn.Linear(DIM, 3 * self.count * self.size), nn.Linear(self.count * self.size, DIM)
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        h, d = self.count, self.size
        packed = self.qkv(x)
        if self.split == "timm":
            q, k, v = packed.reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.split == "index":
            packed = packed.reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4)
            q, k, v = packed[0], packed[1], packed[2]
        elif self.split == "chunk":
            q, k, v = (t.view(b, n, h, d).transpose(1, 2) for t in packed.chunk(3, dim=-1))
        elif self.split == "slice":
            w = h * d
            q, k, v = (
                t.view(b, n, h, d).transpose(1, 2)
                for t in (packed[..., :w], packed[..., w : 2 * w], packed[..., 2 * w :])
            )
        elif self.split == "per_head":
            q, k, v = packed.view(b, n, h, 3 * d).transpose(1, 2).split(d, dim=-1)
        elif self.split == "last":
            q, k, v = packed.view(b, n, h, d, 3).permute(4, 0, 2, 1, 3).unbind(0)
        else:
            q, k, v = packed.view(b, n, 3, h, d).transpose(1, 3).unbind(2)
        weights = ((q * d**-0.5) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, h * d))


class Rotary(Separate):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angle = torch.arange(q.shape[2], dtype=torch.float32)[:, None] * torch.tensor([[1.0, 0.1, 0.01, 0.001]])
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

        def turn(x: Tensor) -> Tensor:
            half = x.shape[-1] // 2
            return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

        return super().attend(turn(q), turn(k), v)


class NormedHeads(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(HEAD), nn.LayerNorm(HEAD)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.q_norm(q), self.k_norm(k), v)


class Cosine(Separate):
    """Cosine attention with one learned temperature."""

    def __init__(self) -> None:
        super().__init__("none")
        self.temperature = nn.Parameter(torch.ones(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        return (q @ k.transpose(-2, -1) * self.temperature.exp()).softmax(-1) @ v


class LowRank(Separate):
    """A projection with a low-rank addition (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(DIM, 2, bias=False), nn.Linear(2, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(t) for t in (self.q(x) + self.up(self.down(x)), self.k(x), self.v(x)))
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))


class Maps(nn.Module):
    """Attention over a feature map by 1 x 1 convolutions, channels first, as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(DIM, 3 * DIM, 1), nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x.transpose(1, 2)[..., None]).view(b, HEADS, 3 * HEAD, n).split(HEAD, 2)
        weights = (q.transpose(-2, -1) @ k * HEAD**-0.5).softmax(-1)
        return self.out((v @ weights.transpose(-2, -1)).reshape(b, DIM, n, 1))[..., 0].transpose(1, 2)


class Positioned(Separate):
    """q and k from x + position, v from x."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, TOKENS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        placed = x + self.position
        q, k, v = self.heads(self.q(placed)), self.heads(self.k(placed)), self.heads(self.v(x))
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))


class Parallel(nn.Module):
    """q, k, v and the MLP from one product, as in ViT-22B."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.out = nn.Linear(DIM, 5 * DIM), nn.Linear(3 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, mlp = self.all(x).split([DIM, DIM, DIM, 2 * DIM], dim=-1)
        q, k, v = (t.view(x.shape[0], -1, HEADS, HEAD).transpose(1, 2) for t in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.out(torch.cat([out, functional.gelu(mlp)], -1))


class TorchAttention(nn.Module):
    """torch.nn.MultiheadAttention; `first` is the sequence-first layout."""

    def __init__(self, first: bool = False, weights: bool = False) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=not first)
        self.first, self.weights = first, weights

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = x.transpose(0, 1)
        out, _ = self.attn(x, x, x, need_weights=self.weights)
        return out.transpose(0, 1) if self.first else out


# ---------------------------------------------------------------- what must be refused


class Altered(Separate):
    """Attention that is not plain, by one alteration."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.bias = nn.Parameter(torch.zeros(1, HEADS, TOKENS, TOKENS))
        self.mix, self.mix_after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kind = self.kind
        if kind == "channel":
            weights = (functional.normalize(q, dim=2).transpose(-2, -1) @ functional.normalize(k, dim=2)).softmax(-1)
            return (weights @ v.transpose(-2, -1)).transpose(-2, -1)
        if kind == "causal_sdpa":
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = self.scaled(q @ k.transpose(-2, -1))
        n = scores.shape[-1]
        if kind == "causal":
            scores = scores.masked_fill(torch.triu(torch.ones(n, n, dtype=torch.bool), 1), float("-inf"))
        elif kind == "bias":
            scores = scores + self.bias
        elif kind == "softcap":
            scores = 5.0 * torch.tanh(scores / 5.0)
        elif kind == "talking_before":
            scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif kind == "temperature":
            scores = scores * self.temperature
        elif kind == "data_mask":
            scores = scores.masked_fill((v.sum(-1) > 0)[:, :, None, :], -1e9)
        elif kind == "data_temperature":
            scores = scores * q.mean(dim=(-1, -2), keepdim=True)
        elif kind == "length_scale":
            scores = scores * math.log(n) if isinstance(n, int) else scores
        elif kind == "top":
            scores = functional.relu(scores)
        axis = {"softmax_queries": -2, "softmax_heads": 1}.get(kind, -1)
        weights = scores.softmax(axis)
        if kind == "talking_after":
            weights = self.mix_after(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if kind == "power":
            weights = weights * weights
        return weights @ v


class FlippedKeys(Separate):
    """The same tokens in another order are other tokens to landmarks."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x.flip(1))), self.heads(self.v(x.flip(1)))
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))


class Grouped(nn.Module):
    """Fewer key heads than query heads, repeated by expand."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.groups = groups
        self.q, self.kv, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * groups * HEAD), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, HEADS, HEAD).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.groups, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = (
            t[:, :, None].expand(b, self.groups, HEADS // self.groups, n, HEAD).reshape(b, HEADS, n, HEAD)
            for t in (k, v)
        )
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, DIM))


class Windowed(Separate):
    """Swin's windows without their bias: 4 x 4 tokens in 2 x 2 windows."""

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        half = GRID // 2
        windows = x.view(b, 2, half, 2, half, DIM).permute(0, 1, 3, 2, 4, 5).reshape(b * 4, half * half, DIM)
        out = super().forward(windows)
        return out.view(b, 2, 2, half, half, DIM).permute(0, 1, 3, 2, 4, 5).reshape(b, GRID * GRID, DIM)


class HiddenWindows(Separate):
    """Windows that look like heads: `[B * windows * heads, tokens, channels]`."""

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        q, k, v = (layer(x).view(b * 4, GRID * GRID // 4, HEADS, HEAD) for layer in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2).reshape(b * 4 * HEADS, -1, HEAD) for t in (q, k, v))
        out = (self.scaled(q @ k.transpose(-2, -1)).softmax(-1) @ v).view(b * 4, HEADS, -1, HEAD)
        return self.out(out.transpose(1, 2).reshape(x.shape))


class SwappedImages(Separate):
    """Cross-attention between the two halves of a doubled sequence, of equal lengths."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[:, :8], x[:, 8:16]
        q, k, v = self.heads(self.q(left)), self.heads(self.k(right)), self.heads(self.v(right))
        out = self.attend(q, k, v).transpose(1, 2).reshape(left.shape)
        return self.out(torch.cat([out, right, x[:, 16:]], 1))


class WideValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (
            nn.Linear(a, b) for a, b in ((DIM, DIM), (DIM, DIM), (DIM, 2 * DIM), (2 * DIM, DIM))
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) * HEAD**-0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class LearnedQuery(nn.Module):
    """Attention pooling: one learned query, and as many again as tokens."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, queries, DIM))
        self.attn = Separate()

    def forward(self, x: Tensor) -> Tensor:
        a = self.attn
        q = a.heads(self.query.expand(x.shape[0], -1, -1))
        out = a.attend(q, a.heads(a.k(x)), a.heads(a.v(x))).transpose(1, 2).flatten(2)
        return out if out.shape[1] == x.shape[1] else x + out


class ReducedKeys(Separate):
    """PVT: keys and values of a pooled sequence."""

    def forward(self, x: Tensor) -> Tensor:
        small = functional.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)
        q, k, v = self.heads(self.q(x)), self.heads(self.k(small)), self.heads(self.v(small))
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))


@dataclass(frozen=True)
class Case:
    """A model, and how many of its attention blocks are plain."""

    name: str
    make: Callable[[], nn.Module]
    replaced: int
    refused: int = 0
    reason: str = ""
    classes: bool = True


def plain(name: str, make: Callable[[], nn.Module], **settings: Any) -> Case:
    return Case(name, lambda: Vit(make, **settings), 2, classes=settings.get("classes", True))


def refused(name: str, make: Callable[[], nn.Module], reason: str, **settings: Any) -> Case:
    return Case(name, lambda: Vit(make, **settings), 0, 2, reason)


SCALES = ("scores_mul", "scores_div", "q", "q_early", "q_div", "k", "root", "none")
SPLITS = ("timm", "index", "chunk", "slice", "per_head", "last", "middle")
PLAIN = [
    *(plain(f"scale_{kind}", lambda kind=kind: Separate(kind)) for kind in SCALES),
    plain("key_without_bias", lambda: Separate(key_bias=False)),
    *(
        plain(f"core_{core}", lambda core=core: Separate(core=core))
        for core in (
            "einsum", "sdpa", "rank3", "transposed_scores", "value_first", "spelt_softmax", "float_softmax", "nan_guard",
            "zero_mask", "true_mask",
        )
    ),
    *(plain(f"packed_{kind}", lambda kind=kind: Packed(kind)) for kind in SPLITS),
    plain("packed_three_heads", lambda: Packed("timm", heads=3)),
    plain("packed_one_head", lambda: Packed("timm", heads=1)),
    plain("rotary", Rotary),
    plain("normed_heads", NormedHeads),
    plain("positioned", Positioned),
    plain("cosine", Cosine),
    plain("low_rank", LowRank),
    plain("maps", Maps),
    plain("parallel", Parallel),
    plain("torch_mha", TorchAttention),
    plain("torch_mha_sequence_first", lambda: TorchAttention(first=True)),
    plain("torch_mha_with_weights_unread", lambda: TorchAttention(weights=True)),
    plain("post_norm", Separate, post_norm=True),
    plain("no_class_token", Separate, classes=False),
]  # fmt: skip

REFUSED = [
    refused("causal", lambda: Altered("causal"), "causal"),
    refused("causal_sdpa", lambda: Altered("causal_sdpa"), "causal"),
    refused("position_bias", lambda: Altered("bias"), "position bias"),
    refused("softcap", lambda: Altered("softcap"), "softcap"),
    refused("talking_before", lambda: Altered("talking_before"), "head mixing before"),
    refused("talking_after", lambda: Altered("talking_after"), "head mixing after"),
    refused("temperature_per_head", lambda: Altered("temperature"), "temperature"),
    refused("mask_from_data", lambda: Altered("data_mask"), "depends on data"),
    refused("temperature_from_data", lambda: Altered("data_temperature"), "depends on data"),
    refused("relu_scores", lambda: Altered("top"), "altered by Relu"),
    refused("softmax_over_queries", lambda: Altered("softmax_queries"), "another axis"),
    refused("softmax_over_heads", lambda: Altered("softmax_heads"), "heads or the batch"),
    refused("weights_squared", lambda: Altered("power"), "attention weights"),
    refused("channel_attention", lambda: Altered("channel"), "channels"),
    refused("flipped_keys", FlippedKeys, "cross-attention"),
    refused("grouped_heads", Grouped, "grouped"),
    refused("multi_query", lambda: Grouped(1), "grouped"),
    refused("windows", Windowed, "windowed", classes=False),
    refused("windows_as_heads", HiddenWindows, "windowed", classes=False),
    refused("cross_of_equal_length", SwappedImages, "cross-attention"),
    refused("wide_values", WideValues, "head size"),
    refused("learned_query", lambda: LearnedQuery(1), "learned query"),
    refused("learned_queries_as_many", lambda: LearnedQuery(TOKENS), "learned query"),
    refused("reduced_keys", ReducedKeys, "queries but"),
]
