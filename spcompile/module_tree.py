"""Which modules are layers, told by the names and sizes of the weights alone.

Children of one module that are numbered (``layers.0``, ``block1``) and hold alike weights are layers. The search goes
from the root down and stops at the first such group, so experts inside a layer do not split it, while stages of
differing width (ConvNeXt, Swin) and towers of many layers are entered and their blocks found.

Names suffice: classes tell little more, and names are all that is left of a model that was captured elsewhere.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

SIMILAR = 0.5
"""Numbered siblings are layers when two of them share at least this part of their weights (relative name and bytes).
The first T5 block has one weight more than the others, the first block of a ResNet stage a projection: 0.5 keeps
both."""

SMALL_FRACTION = 64
"""Numbered siblings with names (``norm1``, ``norm2``) that together hold less than this part of the weights beside them
are no layers. Items of a list always may be."""

Signature = frozenset[tuple[str, int]]


def canonical_path(path: str) -> str:
    """A place in the module tree as Dynamo names it, in one spelling: ``L['self'].layers.0.fc.weight``.

    Sources spell ``._modules['layers']``; a module that changed an attribute, ``.__dict__['_modules']['layers']``; a
    forward behind a decorator of ``(*args, **kwargs)`` calls itself ``L['args'][0]``; a module of torch's own that is
    compiled itself (a Sequential), ``L['fn']``; a plain list of modules, ``[0]``.
    """
    path = re.sub(r"^L\['(?:args'\]\[0|fn')\]", "L['self']", path)
    path = re.sub(r"\.__dict__\['_(?:modules|parameters|buffers)'\]\['([^']*)'\]", r".\1", path)
    path = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", path)
    return re.sub(r"\[(\d+)\]", r".\1", path)


def readable_path(path: str) -> str:
    """A path of the module tree without Dynamo's ``L['self'].`` or ``G['...']``."""
    return re.sub(r"^[LG]\['(?:self'\]\.)?", "", path).replace("']", "")


def layer_of(path: str, layer_paths: frozenset[str]) -> str | None:
    """The layer that a path lies in; None outside the layers."""
    parts = path.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return next((prefix for prefix in prefixes if prefix in layer_paths), None)


def find_layer_paths(weights: Iterable[tuple[str, int]]) -> frozenset[str]:
    """Paths of the layers in a module tree that is given as (path of a weight, its bytes)."""
    return frozenset(_search(sorted(set(weights)), ""))


def _search(weights: Sequence[tuple[str, int]], prefix: str) -> set[str]:
    """``weights`` are those below ``prefix``, with paths relative to it."""
    children: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for path, nbytes in weights:
        child, dot, rest = path.partition(".")
        if dot:
            children[child].append((rest, nbytes))
    groups: dict[str, list[str]] = defaultdict(list)
    for child in children:
        match = re.fullmatch(r"(.*?)(\d+)", child)
        if match:
            groups[match[1]].append(child)
    layers: set[str] = set()
    for stem, members in groups.items():
        if _are_layers(stem, [children[member] for member in members], sum(nbytes for _, nbytes in weights)):
            layers.update(members)
    found: set[str] = set()
    for child, below in children.items():
        path = f"{prefix}{child}"
        found |= {path} if child in layers else _search(below, f"{path}.")
    return found


def _are_layers(stem: str, members: Sequence[Sequence[tuple[str, int]]], siblings_bytes: int) -> bool:
    """Whether these numbered siblings are layers. ``stem`` is what their names begin with, "" for items of a list."""
    signatures = [frozenset(member) for member in members]
    if len(signatures) == 1:  # a list of one block (ALBERT, or a model shrunk to one layer); a lone leaf is no layer
        return stem == "" and any("." in name for name, _ in signatures[0])
    if not _alike(signatures):
        return False
    if stem == "":
        return True
    if any(len(_search(member, "")) > len(members) for member in members):  # towers: few, of many layers each
        return False
    return sum(nbytes for member in members for _, nbytes in member) * SMALL_FRACTION >= siblings_bytes


def _alike(signatures: Sequence[Signature]) -> bool:
    distinct = list(dict.fromkeys(signatures))
    if len(distinct) < len(signatures):
        return True
    return any(_similar(one, other) for index, one in enumerate(distinct) for other in distinct[index + 1 :])


def _similar(one: Signature, other: Signature) -> bool:
    """Two layers of one kind share most of all weights; two of different kinds (one with experts, say), most of what
    the smaller one has outside of lists."""
    if len(one & other) >= SIMILAR * len(one | other):
        return True
    own_one, own_other = _outside_lists(one), _outside_lists(other)
    return len(own_one & own_other) >= SIMILAR * max(1, min(len(own_one), len(own_other)))


def _outside_lists(signature: Signature) -> Signature:
    return frozenset((name, nbytes) for name, nbytes in signature if not re.search(r"(^|\.)\d+\.", name))
