"""How one layer of a recipe goes over another: `extends`, and the short forms that both may use."""

from __future__ import annotations

from dataclasses import replace

from tokenprune.recipe.text.node import Node
from tokenprune.registry import ROLES

OWN = frozenset({"version", "name", "summary", "differences", "variants", "extends"})
"""Keys that speak of one file: a recipe that extends another does not inherit them."""


def inherit(base: Node, own: Node) -> Node:
    """`own` over the recipe that it extends."""
    inherited = {key: node for key, node in base.mapping.items() if key not in OWN}
    return merge(replace(base, value=inherited), own)


def merge(base: Node, over: Node) -> Node:
    """`over` on top of `base`: mappings key by key, lists of named items by name, everything else replaced.

    A part whose type changes, and a budget, are replaced as a whole: what was set for the old one never leaks in.
    """
    if isinstance(base.value, dict) and isinstance(over.value, dict):
        if _other_type(base, over):
            return over
        entries = dict(base.value)
        for key, node in over.value.items():
            known = entries.get(key)
            entries[key] = node if known is None or key == "budget" else merge(known, node)
        return replace(over, value=entries)
    names, others = _names(base), _names(over)
    if names is None or others is None:
        return over
    items = dict(zip(names, base.items, strict=True))
    for name, node in zip(others, over.items, strict=True):
        items[name] = merge(items[name], node) if name in items else node
    return replace(over, value=list(items.values()))


def expand(root: Node) -> Node:
    """The recipe with parts in their long form: ``sampler: top_k`` is ``sampler: {type: top_k}``."""
    stages = root.mapping.get("stages")
    if stages is None or not isinstance(stages.value, list):
        return root
    return root.with_entries(stages=replace(stages, value=[_expand_stage(stage) for stage in stages.value]))


def expand_part(node: Node) -> Node:
    """A part given by its name alone, in its long form."""
    if not isinstance(node.value, str):
        return node
    return Node({"type": Node(node.value, node.at, node.at)}, node.at, node.key)


def _expand_stage(stage: Node) -> Node:
    parts = {role: expand_part(stage.mapping[role]) for role in ROLES if role in stage.mapping}
    return stage.with_entries(**parts) if parts else stage


def _other_type(base: Node, over: Node) -> bool:
    old, new = base.mapping.get("type"), over.mapping.get("type")
    return old is not None and new is not None and old.value != new.value


def _names(node: Node) -> list[str] | None:
    """The names of a list's items, None unless all have one and no two the same."""
    if not isinstance(node.value, list):
        return None
    names = [item.mapping["name"].value for item in node.value if "name" in item.mapping]
    texts = [name for name in names if isinstance(name, str)]
    return texts if len(texts) == len(set(texts)) == len(node.value) else None
