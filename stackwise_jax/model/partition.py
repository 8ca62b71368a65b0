"""Cutting a stack's parameters into what may learn and what is fixed for good, and putting them together again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from stackwise_jax.model.spec import Params
from stackwise_jax.model.stack import Stack, block_name


def split_fixed(stack: Stack, params: Params) -> tuple[Params, Params]:
    """(learnable, fixed) of a stack's tree, or of any tree of the same shape (shardings, say); absent branches dropped.

    Fixed is what `Block.fixed` names: frozen up-projections, random matrices of kernels. Every leaf is in exactly one
    of the two.
    """
    alike = stack.block_alike
    learnable, fixed = {}, {}
    for i, block in enumerate(stack.blocks[:1] if alike else stack.blocks):
        name = "blocks" if alike else block_name(i)
        learnable[name] = dict(params[name])
        for branch, part in block.fixed:
            rest = dict(learnable[name][branch])
            fixed.setdefault(name, {}).setdefault(branch, {})[part] = rest.pop(part)
            learnable[name][branch] = rest
    return learnable, fixed


def split_names(tree: Params, names: Collection[str]) -> tuple[Params, Params]:
    """(branches and leaves with one of these names, the rest) of nested dicts; absent branches dropped."""
    picked, rest = {}, {}
    for name, branch in tree.items():
        if name in names:
            picked[name] = branch
        elif isinstance(branch, dict):
            for part, inner in zip((picked, rest), split_names(branch, names), strict=True):
                if inner:
                    part[name] = inner
        else:
            rest[name] = branch
    return picked, rest


def combine(a: Params, b: Params) -> Params:
    """The union of two trees of nested dicts that share no leaf.

    Raises:
        ValueError: both hold a leaf at the same place.
    """
    merged: dict[str, Any] = dict(a)
    for name, branch in b.items():
        if name not in merged:
            merged[name] = branch
        elif isinstance(branch, dict) and isinstance(merged[name], dict):
            merged[name] = combine(merged[name], branch)
        else:
            raise ValueError(f"both trees hold '{name}'")
    return merged
