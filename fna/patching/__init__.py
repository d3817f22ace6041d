"""FNA inside transformers' vision models, by their own switch: the attention implementation named `fna`.

`patch` sets a model up by a plan and `unpatch` undoes all of it. No module is replaced and no weight touched: each chosen
attention module is told its part of the plan, the vision config's attention implementation becomes `fna`, and hooks on the
layers choose landmarks from the hidden states where a sampler needs them.
"""

from fna.patching.apply import is_patched, patch, unpatch
from fna.patching.attention import exact_attention_forward, make_mask
from fna.patching.blocks import AttentionBlock, find_attention_blocks

__all__ = [
    "AttentionBlock",
    "exact_attention_forward",
    "find_attention_blocks",
    "is_patched",
    "make_mask",
    "patch",
    "unpatch",
]
