"""How AOTAutograd's joint graph becomes a forward and a backward graph.

torch's min-cut partitioner chooses which values forward saves for backward. Left alone it saves what derives from
weights, too: transposed views, casts under autocast. A saved view would alias a slot that is long somebody else's
when backward runs; a saved cast is a second copy of the weight. Both are recomputed from the page instead, so they
are marked before the partitioner sees the graph (design.md, decision 7).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy

from spcompile.cuda_decompositions import flatten_single_batches
from spcompile.graph import is_cast, is_view

Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


def partition(
    compiler: str,
    is_weight: Callable[[fx.Node], bool],
    planned: Callable[[fx.GraphModule, fx.GraphModule], None],
    for_cuda: bool = False,
) -> Partition:
    """The partition function for a compiler of `spcompile.options.COMPILERS`.

    Args:
        compiler: what the segments are compiled with.
        is_weight: whether a placeholder carries a weight.
        planned: is handed the forward and the backward graph.
        for_cuda: whether CPU tensors stand for those of a GPU that is not here.
    """

    def run(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        mark_weight_derived(joint, is_weight)
        forward, backward = split(joint, joint_inputs, **kwargs)
        planned(forward, backward)
        return forward, backward

    def split(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        if compiler != "inductor":
            return min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)
        from torch._inductor.compile_fx import partition_fn  # it lowers dropout in the joint graph first

        if for_cuda:
            flatten_single_batches(joint.graph)
        # Whether products are padded is decided by timing them. Here that would make the plan depend on a measurement;
        # Inductor decides once more when it compiles the segments.
        with torch._inductor.config.patch(shape_padding=False):
            return partition_fn(joint, joint_inputs, **kwargs)

    return run


def mark_weight_derived(joint: fx.GraphModule, is_weight: Callable[[fx.Node], bool]) -> None:
    """Mark views and casts of weights as never saved."""
    derived = {node for node in joint.graph.find_nodes(op="placeholder") if is_weight(node)}
    for node in joint.graph.nodes:
        inputs = node.all_input_nodes
        if len(inputs) == 1 and inputs[0] in derived and (is_view(node) or is_cast(node)):
            derived.add(node)
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
