"""Finding attention by watching a model run once: every call of PyTorch's attention functions, and who made it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from fna.errors import ModelSourceError, first_line

SURVEY_BATCH = 2
"""Images in the run: more than one, so that the batch is told from sizes of one."""

Example: TypeAlias = Tensor | tuple[Any, ...] | None
"""What a model is called with: its only input, all of them, or None for images of the size that its attributes name."""

_USUAL_SIZE = 224
_SOFTMAX = {torch.softmax, torch.nn.functional.softmax, Tensor.softmax}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum}
_PASSED = {
    torch.nn.functional.dropout,
    Tensor.to,
    Tensor.type,
    Tensor.type_as,
    Tensor.float,
    Tensor.half,
    Tensor.reshape,
}
_PASSED |= {Tensor.view, Tensor.contiguous, Tensor.flatten, Tensor.mul, Tensor.__mul__, torch.mul}
_CONVOLUTIONS = {torch.conv2d, torch.nn.functional.conv2d}


@dataclass(frozen=True)
class CallSite:
    """One place in a model that computes attention.

    Attributes:
        path: of the innermost module whose forward makes the call.
        ordinal: which of the calls in one forward of that module, from 0.
        calls: how often it ran.
        query: shape `[B, H, N, D]`.
        key: shape, likewise.
        refusal: why it is not plain self-attention over all tokens of its sequence, by its arguments; None if it is.
        patches: rows and columns of the feature map that the last convolution before it wrote; None where there was none.
        images: feature maps in that convolution's batch, or images in the input's; None for an input of no images.
    """

    path: str
    ordinal: int
    calls: int
    query: tuple[int, ...]
    key: tuple[int, ...]
    refusal: str | None
    patches: tuple[int, int] | None
    images: int | None


@dataclass
class Survey:
    """What one run showed.

    Attributes:
        sites: attention, in the order in which it first ran.
        entered: the shape of the first tensor that each module was given, by the module's path.
        called: PyTorch's functions by the path of the module that called them.
        image: height and width of what the model was called with; None where it was no images.
    """

    sites: list[CallSite] = field(default_factory=list)
    entered: dict[str, tuple[int, ...]] = field(default_factory=dict)
    called: dict[str, Counter[str]] = field(default_factory=dict)
    image: tuple[int, int] | None = None


def survey(model: nn.Module, example: Example = None) -> Survey:
    """Run a model once and note what computes attention in it; the model is left as it was.

    The run is one of shapes alone, without arithmetic, where the model allows it.

    Args:
        model: takes a batch of images, or what `example` says.
        example: what the model is called with; None is images of the size that the model's attributes name, else 224.

    Raises:
        ModelSourceError: if it does not run on that.
    """
    arguments = (guess_input(model),) if example is None else example if isinstance(example, tuple) else (example,)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            return _run(model, tuple(fake.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
    except Exception:  # shapes alone do not do for a model that looks at values: run it
        pass
    try:
        return _run(model, arguments)
    except Exception as error:  # the user's code may raise anything
        shapes = ", ".join(f"[{', '.join(map(str, x.shape))}]" for x in arguments if isinstance(x, Tensor))
        raise ModelSourceError(
            f"{type(model).__name__} does not run on an input of shape {shapes}: {first_line(error)}; "
            "call fna.patch with the example input that it takes"
        ) from error


def guess_input(model: nn.Module) -> Tensor:
    """Return images `[2, 3, H, W]`, or what a module of ours says in `example_shape`, of the size that a model's attributes name."""
    shape = getattr(model, "example_shape", None)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if shape is None:
        height, width = next(_named_sizes(model), (_USUAL_SIZE, _USUAL_SIZE))
        shape = (3, height, width)
    return torch.zeros(SURVEY_BATCH, *shape, dtype=parameter.dtype, device=parameter.device)


def _named_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name in ("img_size", "image_size"):
                size = getattr(holder, name, None)
                if isinstance(size, int) and size > 0:
                    yield size, size
                elif isinstance(size, (tuple, list)) and len(size) == 2:
                    yield int(size[0]), int(size[1])


def _run(model: nn.Module, arguments: tuple[Any, ...]) -> Survey:
    training = [module for module in model.modules() if module.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in training:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), _watched(model, arguments) as watcher:
            watcher.note_uses(model(*arguments))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True
    return watcher.finish()


@contextmanager
def _watched(model: nn.Module, arguments: tuple[Any, ...]) -> Iterator[_Watcher]:
    watcher = _Watcher(model, arguments)
    with ExitStack() as stack:
        for path, module in model.named_modules():
            entered = module.register_forward_pre_hook(watcher.enter(path), with_kwargs=True, prepend=True)
            left = module.register_forward_hook(watcher.leave, always_call=True)
            stack.callback(entered.remove)
            stack.callback(left.remove)
        stack.enter_context(watcher)
        yield watcher


@dataclass
class _Running:
    """A module whose forward is under way, and what it was given."""

    path: str
    module: nn.Module | None
    tensors: list[Tensor]
    calls: int = 0


class _Watcher(TorchFunctionMode):
    """Sees PyTorch's functions before they run, and knows which module calls them."""

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        images = next((x for x in arguments if isinstance(x, Tensor) and x.dim() >= 4), None)
        self.images = None if images is None else images.shape[:-3].numel()
        self.patches: tuple[int, int] | None = None
        self.running = [_Running("", None, [])]
        self.sites: dict[tuple[str, int], dict[str, Any]] = {}
        self.weights: dict[int, tuple[Tensor, Tensor]] = {}
        self.returned: dict[int, tuple[Tensor, dict[str, Any]]] = {}
        self.result = Survey(image=None if images is None else (int(images.shape[-2]), int(images.shape[-1])))

    def finish(self) -> Survey:
        """Return what was seen."""
        self.result.sites = [CallSite(path, ordinal, **seen) for (path, ordinal), seen in self.sites.items()]
        return self.result

    def enter(self, path: str) -> Any:
        """Make the hook of a module that is about to run."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if tensors and path not in self.result.entered:
                self.result.entered[path] = tuple(tensors[0].shape)
            self.running.append(_Running(path, module, tensors))

        return hook

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Hook of a module that has run, or raised."""
        self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.note_uses((args, kwargs))
        if func is scaled_dot_product_attention:
            self._note_sdpa(*args, **kwargs)
        elif func is multi_head_attention_forward:
            seen = self._note_multi_head(inspect.signature(func).bind(*args, **kwargs).arguments)
            result = func(*args, **kwargs)
            if result[1] is not None:
                self.returned[id(result[1])] = (result[1], seen)
            return result
        elif func in _PRODUCTS:
            self._note_product(args)
        result = func(*args, **kwargs)
        if func in _SOFTMAX and result.dim() >= 3 and result.shape[-1] > 1:
            self.weights[id(result)] = (result, result)
        elif func in _PASSED and isinstance(result, Tensor) and args and id(args[0]) in self.weights:
            self.weights[id(result)] = (result, self.weights[id(args[0])][1])
        elif func in _CONVOLUTIONS and result.dim() == 4 and not _is_depthwise(*args[:2], **kwargs):
            self.patches = (int(result.shape[2]), int(result.shape[3]))
            self.images = int(result.shape[0])
        self._note_function(func)
        return result

    def note_uses(self, values: Any) -> None:
        """Refuse attention whose weights, as `nn.MultiheadAttention` returned them, are among values that a model goes on with."""
        for value in tree_leaves(values) if self.returned else ():
            if id(value) in self.returned:
                seen = self.returned[id(value)][1]
                seen["refusal"] = seen["refusal"] or "its attention weights are used, which FNA does not compute"

    def _note_function(self, func: Any) -> None:
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        counted = self.result.called.setdefault(self.running[-1].path, Counter())
        counted[name.removeprefix("torch.").removeprefix("nn.functional.")] += 1

    def _note(self, query: tuple[int, ...], key: tuple[int, ...], refusal: str | None) -> dict[str, Any]:
        running = self.running[-1]
        seen = self.sites.setdefault(
            (running.path, running.calls),
            {
                "calls": 0,
                "query": query,
                "key": key,
                "refusal": refusal,
                "patches": self.patches,
                "images": self.images,
            },
        )
        seen["calls"] += 1
        seen["refusal"] = seen["refusal"] or refusal
        running.calls += 1
        return seen

    def _note_sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        refusal = refuse_arguments(query, key, value, attn_mask, is_causal)
        if refusal is None and _is_cross(self.running[-1].tensors):
            refusal = "it is cross-attention: its module is given several sequences"
        self._note(tuple(query.shape), tuple(key.shape), refusal)

    def _note_multi_head(self, given: dict[str, Any]) -> dict[str, Any]:
        query, key, heads = given["query"], given["key"], given["num_heads"]
        module = self.running[-1].module
        refusal = None
        if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not nn.MultiheadAttention.forward:
            refusal = "it calls multi_head_attention_forward outside torch.nn.MultiheadAttention"
        elif query.dim() != 3:
            refusal = "it is called without a batch"
        elif given.get("bias_k") is not None or given.get("add_zero_attn"):
            refusal = "it adds a key of its own (add_bias_kv or add_zero_attn)"
        shapes = [(x.shape[1], heads, x.shape[0], x.shape[2] // heads) for x in (query, key) if x.dim() == 3]
        if refusal is None:
            refusal = _refuse_multi_head_call(given)
        if refusal is None and (shapes[0] != shapes[1] or _is_other(query, key, self.running[-1].tensors)):
            refusal = "it is cross-attention: its query and its key are two tensors"
        return self._note(shapes[0] if shapes else (), shapes[-1] if shapes else (), refusal)

    def _note_product(self, args: tuple[Any, ...]) -> None:
        left = args[1][0] if args and isinstance(args[0], str) and isinstance(args[1], (tuple, list)) else None
        left = left if left is not None else args[1] if args and isinstance(args[0], str) else args[0]
        known = self.weights.pop(id(left), None)
        if known is None:
            return
        *batch, rows, columns = known[1].shape
        shape = (*batch, rows, 0)
        self._note(
            shape,
            (*batch, columns, 0),
            "it computes softmax(q @ k.T) @ v by itself and not by torch.nn.functional.scaled_dot_product_attention; "
            "export the model to ONNX and use fna graft, or have it call that function",
        )


def refuse_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> str | None:
    """Say why a call of `scaled_dot_product_attention` is not plain, full self-attention; None if it is."""
    if attn_mask is not None:
        kind = "an attention mask" if attn_mask.dtype == torch.bool else "a position bias or mask"
        return f"it adds {kind} of shape {list(attn_mask.shape)} to the scores"
    if query.dim() != 4:
        return f"its query has {query.dim()} dimensions, but [B, H, N, D] is needed (windows, groups, or heads in the batch)"
    if is_causal:
        return "it is causal"
    if key.shape[1] != query.shape[1]:
        return "its key and value heads are grouped"
    if key.shape != query.shape:
        return f"it is cross-attention: {query.shape[2]} queries, {key.shape[2]} keys"
    if value.shape != query.shape:
        return f"its values have head size {value.shape[-1]}, its queries {query.shape[-1]}"
    return None


def _refuse_multi_head_call(given: dict[str, Any]) -> str | None:
    if given.get("is_causal"):
        return "it is causal"
    for name in ("attn_mask", "key_padding_mask"):
        if given.get(name) is not None:
            return f"it adds an attention mask of shape {list(given[name].shape)} to the scores ({name})"
    return None


def _is_depthwise(input: Tensor, weight: Tensor, **_: Any) -> bool:
    """Whether a convolution mixes no channels: one that encodes positions, maybe within windows, and makes no patches."""
    return weight.shape[1] == 1 < input.shape[1]


def _is_cross(tensors: list[Tensor]) -> bool:
    """Whether a module is given two different sequences of features."""
    features = [x for x in tensors if x.is_floating_point() and x.dim() >= 3]
    return any(
        x is not features[0] and x.dim() == features[0].dim() and x.shape[-1] == features[0].shape[-1]
        for x in features[1:]
    )


def _is_other(query: Tensor, key: Tensor, given: list[Tensor]) -> bool:
    """Whether query and key are two tensors, in the module's own arguments where it may have transposed them."""
    return given[0] is not given[1] if len(given) > 1 else query is not key
