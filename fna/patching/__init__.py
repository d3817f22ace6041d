"""FNA inside PyTorch's vision models.

`patch` sets a model up by a plan and `unpatch` undoes all of it. No module is replaced and no weight touched: each chosen
attention module is told its part of the plan. A model of transformers has its attention implementation switched to `fna`; in any
other one, the module's calls of PyTorch's attention function are answered by the plan. Hooks on the layers choose landmarks from
the hidden states where a sampler needs them.
"""

from fna.patching.apply import is_patched, patch, unpatch
from fna.patching.attention import exact_attention_forward, make_mask
from fna.patching.blocks import find_attention_blocks
from fna.patching.record import AttentionBlock

__all__ = [
    "AttentionBlock",
    "exact_attention_forward",
    "find_attention_blocks",
    "is_patched",
    "make_mask",
    "patch",
    "unpatch",
]
