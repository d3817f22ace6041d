"""Plans for the tiny models of `model_families`, and what a model is made of."""

from __future__ import annotations

from typing import Any

from model_families import FAMILIES
from torch import nn

from fna.patching import find_attention_blocks
from fna.plan import Plan, uniform_plan

LANDMARKS = 12
BY_NAME = {family.name: family for family in FAMILIES}


def make_plan(model: nn.Module, layers: str = "all", **settings: Any) -> Plan:
    feature = settings.pop("feature", "input")
    plan = uniform_plan(
        len(find_attention_blocks(model)), layers=layers, **{"landmarks": LANDMARKS, "sampler": "fps", **settings}
    )
    return plan.model_copy(
        update={"blocks": tuple(block.model_copy(update={"feature": feature}) for block in plan.blocks)}
    )


def snapshot(model: nn.Module) -> list[tuple[str, Any]]:
    """Everything about the modules and configs that a patch could leave behind; not the weights."""
    state: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        state.append((name, sorted(module.__dict__)))
        state.append((name, (len(module._forward_pre_hooks), len(module._forward_hooks))))
        config = getattr(module, "config", None)
        if config is not None:
            state.append((name, (config._attn_implementation, config.to_dict())))
    return state
