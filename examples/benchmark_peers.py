"""Measure this package beside others that run a model with its weights in host memory: the Llama-7B shape (bf16, random
weights), one token and 8 x 2048 tokens.

    python -m examples.benchmark_peers [--layers 32] [--only resident,accelerate,...] [--json results.json]

* *resident*, *resident-compiled*: all weights on the GPU, as a yardstick;
* *superpipeline*: k=2, m=1; *superpipeline-budget*: a budget of 4 GB; *superpipeline-lean*: 0.31 GB for the one token,
  1.75 GB for 8 x 2048, about what the leanest of the others take;
* *accelerate*: ``accelerate.cpu_offload``;
* *diffusers-blocks*, *diffusers-leaves*: ``diffusers.hooks.apply_group_offloading`` with a stream and pinned memory, a
  layer (the head stays on the GPU) or a leaf module at a time;
* *fsdp2*, *fsdp2-compiled*: ``torch.distributed.fsdp.fully_shard`` of each layer with ``CPUOffloadPolicy`` and prefetch
  of the next layer, one process; *compiled*: each layer with ``layer.compile()`` first;
* *deepspeed*: ZeRO stage 3 with parameters in pinned host memory (ZeRO-Inference), prefetching a layer ahead.

Each starts from the same model in host memory, in a process of its own, and is set up as its documentation advises.
With ``--json`` a run that was cut off goes on: ways whose figures the file has already are not measured again. A peer
that is not installed (``pip install '.[peers]'``) is left out and named. The floor is max(resident compiled iteration,
bytes of all weights / link rate); times are medians between CUDA events, memory is ``torch.cuda.max_memory_allocated``
over the timed iterations.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import spcompile
from examples.benchmark_llama import CASES, build, logits_of, measure, measure_link
from examples.benchmark_ways import Figures, compiled, in_a_process, store_of

Way = Callable[[transformers.LlamaForCausalLM], Any]
"""Takes the model in host memory, returns what is to be called with tokens on the GPU."""

ITERATIONS = 7
BUDGET = "4GB"
LEAN_BUDGETS = {"1 token": "310MB", "8 x 2048 tokens": "1.75GB"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", default=",".join(WAYS), help="ways to run, with commas between them")
    parser.add_argument("--json", type=Path, help="also write the figures to this file, after each way")
    arguments = parser.parse_args()
    results: dict[str, Figures] = {}
    if arguments.json and arguments.json.exists():
        results = json.loads(arguments.json.read_text())
    for name in arguments.only.split(","):
        if name in results:
            continue
        package = PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            print(f"{name}: {package} is not installed", flush=True)
            continue
        results[name] = in_a_process(run, name, arguments.layers)
        print(f"{name}: {results[name]}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    print_table(results)


def run(name: str, layers: int) -> Figures:
    """One way, both cases: milliseconds, peak, and the largest difference of a logit from the resident eager model's,
    by the largest of these."""
    model = build(layers)
    expected = {case: logits_of(model, tokens_of(model, case)).cpu() for case in CASES}
    model.cpu()
    torch.cuda.empty_cache()
    started = time.perf_counter()
    call = WAYS[name](model)
    torch.cuda.synchronize()
    figures: Figures = {"setup_s": time.perf_counter() - started}
    for case in CASES:
        tokens = tokens_of(model, case)
        measured = measure(partial(logits_of, call, tokens), ITERATIONS)
        difference = (measured.logits.cpu().float() - expected[case].float()).abs().max()
        figures |= {
            f"{case}: ms": measured.milliseconds,
            f"{case}: peak_bytes": measured.peak_bytes,
            f"{case}: first_call_s": measured.first_call_s,
            f"{case}: difference": float(difference / expected[case].abs().max()),
        }
    figures["weights_bytes"] = sum(parameter.nbytes for parameter in model.parameters())
    if name == "superpipeline":
        store = store_of(model)
        figures["link_bytes_per_s"] = measure_link(store, store.runtimes()[-1].plan)
    return figures


def tokens_of(model: transformers.LlamaForCausalLM, case: str) -> Tensor:
    """Random tokens, the same in each process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, CASES[case], generator=generator).cuda()


# The ways.


def resident(model: transformers.LlamaForCausalLM) -> Any:
    return model.cuda()


def resident_compiled(model: transformers.LlamaForCausalLM) -> Any:
    return compiled(model.cuda(), None)


def superpipeline(model: transformers.LlamaForCausalLM) -> Any:
    return compiled(spcompile.offload(model), {"k": 2, "m": 1})


def superpipeline_budget(model: transformers.LlamaForCausalLM) -> Any:
    return compiled(spcompile.offload(model), {"budget": BUDGET})


def superpipeline_lean(model: transformers.LlamaForCausalLM) -> Any:
    spcompile.offload(model)
    fast = {CASES[case]: compiled(model, {"budget": budget}) for case, budget in LEAN_BUDGETS.items()}

    def call(tokens: Tensor, **keywords: Any) -> Any:
        return fast[tokens.shape[0], tokens.shape[1]](tokens, **keywords)

    return call


def accelerate(model: transformers.LlamaForCausalLM) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cuda", 0))


def diffusers_blocks(model: transformers.LlamaForCausalLM) -> Any:
    _offload_groups(model.model, offload_type="block_level", num_blocks_per_group=1)
    model.lm_head.cuda()
    return model


def diffusers_leaves(model: transformers.LlamaForCausalLM) -> Any:
    _offload_groups(model, offload_type="leaf_level")
    return model


def _offload_groups(module: torch.nn.Module, **options: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    device = torch.device("cuda", 0)
    apply_group_offloading(module, device, use_stream=True, record_stream=True, non_blocking=True, **options)


def fsdp2(model: transformers.LlamaForCausalLM) -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

    _join_alone()
    torch.distributed.init_process_group("nccl")
    mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (1,))
    layers = list(model.model.layers)
    for part in (*layers, model.model.embed_tokens, model.lm_head, model):
        fully_shard(part, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=True), reshard_after_forward=True)
    for layer, following in itertools.pairwise(layers):
        assert isinstance(layer, FSDPModule)
        layer.set_modules_to_forward_prefetch([following])
    for buffer_owner in model.modules():
        for key, buffer in buffer_owner.named_buffers(recurse=False):
            setattr(buffer_owner, key, buffer.cuda())
    return model


def fsdp2_compiled(model: transformers.LlamaForCausalLM) -> Any:
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    return fsdp2(model)


def deepspeed(model: transformers.LlamaForCausalLM) -> Any:
    import deepspeed as package

    _join_alone()
    layer_numel = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    engine, *_ = package.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "cpu", "pin_memory": True},
                "stage3_prefetch_bucket_size": layer_numel,
                "stage3_max_live_parameters": 3 * layer_numel,
                "overlap_comm": True,
            },
        },
    )
    engine.eval()
    return engine


def _join_alone() -> None:
    """What a launcher would set, for one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    torch.cuda.set_device(0)


WAYS: dict[str, Way] = {
    "resident": resident,
    "resident-compiled": resident_compiled,
    "superpipeline": superpipeline,
    "superpipeline-budget": superpipeline_budget,
    "superpipeline-lean": superpipeline_lean,
    "accelerate": accelerate,
    "diffusers-blocks": diffusers_blocks,
    "diffusers-leaves": diffusers_leaves,
    "fsdp2": fsdp2,
    "fsdp2-compiled": fsdp2_compiled,
    "deepspeed": deepspeed,
}

PACKAGES = {
    "accelerate": "accelerate",
    "diffusers-blocks": "diffusers",
    "diffusers-leaves": "diffusers",
    "deepspeed": "deepspeed",
}
"""What a way needs beside torch and transformers."""


def print_table(results: dict[str, Figures]) -> None:
    """A line for each way and case; ratios to the floor where this run has measured it."""
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    link = results.get("superpipeline", {}).get("link_bytes_per_s")
    for case in CASES:
        print(f"\n{case:24}{'ms':>10}{'/ floor':>9}{'peak GB':>9}{'first s':>9}{'difference':>12}")
        best = results.get("resident-compiled", {}).get(f"{case}: ms")
        for name, figures in results.items():
            if f"{case}: ms" not in figures:
                print(f"{name:24}  failed")
                continue
            ms, peak, first, difference = (
                float(figures[f"{case}: {each}"]) for each in ("ms", "peak_bytes", "first_call_s", "difference")
            )
            ratio = ""
            if link and best:
                ratio = f"{ms / max(float(best), float(figures['weights_bytes']) / float(link) * 1e3):.3f}"
            print(f"{name:24}{ms:10.1f}{ratio:>9}{peak / 1e9:9.2f}{first:9.1f}{difference:12.4f}")


if __name__ == "__main__":
    main()
