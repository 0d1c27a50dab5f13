"""Measure what a budget or a slowdown buys, and how good the predictions are.

    python -m examples.benchmark_budget [--only planning,half,slowdown,peaks] [--json results.json]

* *planning*: time to place Llamas of 20, 40, 80 and 160 layers, tracing apart (needs no GPU);
* *half*: the Llama-7B shape (bf16), one token, with a budget of half its weights, against the floor
  max(resident compiled iteration, (weights - budget left after activations, workspace and two slots) / link);
* *slowdown*: the same with 8 x 2048 tokens and ``max_slowdown=1.02``;
* *peaks*: four models with three budgets each: the predicted peak against ``torch.cuda.max_memory_allocated``.

Each part runs in a process of its own. Times are medians; whatever is compared is measured in turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn

import spcompile
from examples.benchmark_llama import build, measure_link
from examples.benchmark_ways import Figures, compiled, forward, in_a_process, in_turns, store_of
from spcompile import dry_run, pipeline
from spcompile.ir import Plan
from spcompile.passes import make_schedule

LAYERS = (20, 40, 80, 160)
BUDGETS = (0.3, 0.5, 0.8)
"""Where between the smallest plan and everything resident the budgets of *peaks* lie."""


def main() -> None:
    parts: dict[str, Callable[[], Figures]] = {
        "planning": planning,
        "half": half,
        "slowdown": slowdown,
        "peaks": peaks,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(parts), help="parts to run, with commas between them")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    results: dict[str, Figures] = {}
    for part in arguments.only.split(","):
        results[part] = in_a_process(parts[part])
        print(f"\n{part}")
        for name, value in results[part].items():
            print(f"  {name:<58}{value:>16,.3f}" if isinstance(value, float) else f"  {name:<58}{value:>16}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


# The parts.


def planning() -> Figures:
    """Seconds in ``make_schedule``: pages, costs, placement and slots."""
    figures: Figures = {}
    for layers in LAYERS:
        config = transformers.LlamaConfig(num_hidden_layers=layers, dtype="bfloat16")
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
        tokens = torch.ones(1, 128, dtype=torch.int64, device="meta")
        seconds: list[float] = []
        nodes: list[int] = []

        def timed(program: Any, seconds: list[float] = seconds, nodes: list[int] = nodes) -> None:
            started = time.perf_counter()
            make_schedule.make_schedule(program)
            seconds.append(time.perf_counter() - started)
            nodes.append(len(program.graph.nodes))

        last = pipeline.PLANNING[-1]
        planned = (*pipeline.PLANNING[:-1], type(last)(timed, together=True))
        with torch.no_grad(), mock.patch.object(dry_run, "PLANNING", planned):
            keywords = {"input_ids": tokens, "use_cache": False}
            spcompile.plan(model, (), keywords, device="cuda", budget="6GB", machine="h100")
        figures[f"{layers} layers, {nodes[0]} nodes: placed in, s"] = seconds[0]
    return figures


def half() -> Figures:
    """One token with a budget of half the weights."""
    resident_model, model = build(32), spcompile.offload(build(32).cpu())
    weights_bytes = sum(parameter.nbytes for parameter in model.parameters())
    others_bytes = torch.cuda.memory_allocated()  # the resident model, which stays for the comparison
    fast = compiled(model, {"budget": weights_bytes // 2 + others_bytes})
    calls = {"resident": forward(compiled(resident_model, None)), "half": forward(fast)}
    times = in_turns(calls, 7)
    torch.cuda.reset_peak_memory_stats()
    calls["half"]()
    torch.cuda.synchronize()
    peak_bytes = torch.cuda.max_memory_allocated() - others_bytes
    plan = _plan_of(fast)
    link = measure_link(store_of(model), plan)
    two_slots_bytes = 2 * max(page.slot_bytes for page in plan.pages)
    left_bytes = weights_bytes // 2 - plan.activations_bytes - plan.workspace_bytes - two_slots_bytes
    floor_ms = max(times["resident"], (weights_bytes - left_bytes) / link * 1e3)
    return {
        "resident, ms": times["resident"],
        "half of the weights, ms": times["half"],
        "floor, ms": floor_ms,
        "/ floor (asked: <= 1.02)": times["half"] / floor_ms,
        "peak, GB": peak_bytes / 1e9,
        "budget, GB": weights_bytes / 2e9,
        "residents": len(plan.residents),
    }


def slowdown() -> Figures:
    """8 x 2048 tokens in the least memory that is fast enough."""
    resident_model, model = build(32), spcompile.offload(build(32).cpu())
    others_bytes = torch.cuda.memory_allocated()
    fast = compiled(model, {"max_slowdown": 1.02})
    shape = (8, 2048)
    calls = {"resident": forward(compiled(resident_model, None), shape=shape), "lean": forward(fast, shape=shape)}
    times = in_turns(calls, 5)
    torch.cuda.reset_peak_memory_stats()
    calls["lean"]()
    torch.cuda.synchronize()
    peak_bytes = torch.cuda.max_memory_allocated() - others_bytes
    return {
        "resident, ms": times["resident"],
        "max_slowdown=1.02, ms": times["lean"],
        "ratio (asked: <= 1.02)": times["lean"] / times["resident"],
        "peak, GB (asked: <= 2.5)": peak_bytes / 1e9,
        "predicted peak, GB": (_plan_of(fast).peak_bytes() - others_bytes) / 1e9,
    }


def peaks() -> Figures:
    """Predicted and measured peaks."""
    figures: Figures = {}
    for name in MODELS:
        figures |= in_a_process(_peaks_of, name)
    return figures


def _peaks_of(name: str) -> Figures:
    figures: Figures = {}
    model, keywords = MODELS[name]()
    spcompile.offload(model)
    with torch.no_grad():
        curve = spcompile.plan(model, (), keywords, k=2).tradeoff()
    smallest, largest = curve[0].peak_bytes, curve[-1].peak_bytes
    for part in BUDGETS:
        torch._dynamo.reset()
        budget = int(smallest + part * (largest - smallest))
        fast = compiled(model, {"budget": budget})
        with torch.no_grad():
            fast(**keywords)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            fast(**keywords)
            torch.cuda.synchronize()
        measured_bytes = torch.cuda.max_memory_allocated()
        ratio = _plan_of(fast).peak_bytes() / measured_bytes
        figures[f"{name}, budget {budget / 1e9:.2f} GB: predicted / measured"] = ratio
        figures[f"{name}, budget {budget / 1e9:.2f} GB: measured, GB"] = measured_bytes / 1e9
    return figures


def _plan_of(fast: Callable[..., Any]) -> Plan:
    plan = spcompile.plan(fast)
    assert isinstance(plan, Plan)
    return plan


def _on_gpu(kind: Any, config: Any) -> nn.Module:
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model: nn.Module = kind(config).eval()
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def _llama() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    )
    tokens = torch.ones(4, 1024, dtype=torch.int64, device="cuda")
    return _on_gpu(transformers.LlamaForCausalLM, config), {
        "input_ids": tokens,
        "use_cache": False,
        "logits_to_keep": 1,
    }


def _vit() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ViTConfig(
        hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14
    )
    pixels = torch.randn(32, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    return _on_gpu(transformers.ViTModel, config), {"pixel_values": pixels}


def _t5() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.T5Config(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16)
    tokens = torch.ones(8, 256, dtype=torch.int64, device="cuda")
    return _on_gpu(transformers.T5Model, config), {"input_ids": tokens, "decoder_input_ids": tokens, "use_cache": False}


def _convnext() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ConvNextConfig(hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3])
    pixels = torch.randn(16, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    return _on_gpu(transformers.ConvNextModel, config), {"pixel_values": pixels}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "Llama 1.1B, 4 x 1024": _llama,
    "ViT-H, 32 images": _vit,
    "T5-large, 8 x 256": _t5,
    "ConvNeXt-L, 16 images": _convnext,
}


if __name__ == "__main__":
    main()
