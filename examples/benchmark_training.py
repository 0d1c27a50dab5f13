"""Measure training: forward and backward of 16 layers of the Llama-7B shape, streamed, against all of it resident.

    python -m examples.benchmark_training [--layers 16] [--only speed,exact,host] [--json results.json]

* *speed*: forward and backward of 2 x 1024 tokens in bf16, k=2, m=1, against the same with every page resident, and the
  floor of the link: the gradients' bytes each way at the rate that both directions share, the rest up alone;
* *exact*: losses and weights after 20 iterations with an optimizer on the host, against every page resident
  (deterministic algorithms, as the gradient of the embedding is a sum in any order otherwise);
* *host*: host memory while training with AdamW on the host, against weights, gradients and state.

Each part runs in a process of its own. Times are medians; whatever is compared is measured in turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import spcompile
from examples.benchmark_llama import build, measure_link
from examples.benchmark_ways import Figures, compiled, host_bytes, in_a_process, in_turns, store_of

ROWS, POSITIONS = 2, 1024

N_EXACT = 20


def main() -> None:
    parts: dict[str, Callable[[int], Figures]] = {"speed": speed, "exact": exact, "host": host}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--only", default=",".join(parts), help="parts to run, with commas between them")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    results: dict[str, Figures] = {}
    for part in arguments.only.split(","):
        results[part] = in_a_process(parts[part], arguments.layers)
        print(f"\n{part}")
        for name, value in results[part].items():
            print(f"  {name:<58}{value:>16,.3f}" if isinstance(value, float) else f"  {name:<58}{value:>16}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


# The parts.


def speed(layers: int) -> Figures:
    """One forward and backward, the optimizer left out."""
    resident_model, model = _trainable(layers), spcompile.offload(_trainable(layers).cpu())
    others_bytes = torch.cuda.memory_allocated()
    resident, fast = compiled(resident_model, None), compiled(model, {"k": 2, "m": 1})
    calls = {
        "resident": partial(_forward_backward, resident_model, resident),
        "streamed": partial(_forward_backward, model, fast),
    }
    times = in_turns(calls, 5)
    resident_model.zero_grad()  # or the device holds its gradients
    torch.cuda.reset_peak_memory_stats()
    calls["streamed"]()
    torch.cuda.synchronize()
    peak_bytes = torch.cuda.max_memory_allocated() - others_bytes
    plan = spcompile.plan(fast)
    assert plan.machine is not None
    link = measure_link(store_of(model), plan)
    # While gradients go down, as much comes up at the rate that both directions share; the rest comes up alone.
    alone_bytes = plan.bytes_moved - plan.gradients_bytes
    link_ms = (plan.gradients_bytes / plan.machine.both_bytes_per_s + alone_bytes / link) * 1e3
    floor_ms = max(times["resident"], link_ms)
    return {
        "resident, ms": times["resident"],
        "k=2, m=1, ms": times["streamed"],
        "floor, both directions busy, ms": floor_ms,
        "/ floor (asked: <= 1.10)": times["streamed"] / floor_ms,
        "peak, GB (asked: <= 6)": peak_bytes / 1e9,
        "predicted peak, GB": (plan.peak_bytes() - plan.other_bytes) / 1e9,
        "up, GB": plan.bytes_moved / 1e9,
        "down, GB": plan.gradients_bytes / 1e9,
    }


def exact(layers: int) -> Figures:
    """Iterations with SGD, whose step is the same arithmetic wherever it is done."""
    torch.use_deterministic_algorithms(True)
    options: dict[str, dict[str, Any]] = {"resident": {"k": 1000}, "streamed": {"k": 2, "m": 1}}
    losses: dict[str, list[float]] = {}
    weights: dict[str, list[Tensor]] = {}
    for name, each in options.items():
        torch._dynamo.reset()
        model = spcompile.offload(_trainable(layers).cpu())
        fast = torch.compile(model, backend="superpipeline", options=each)
        optimizer = torch.optim.SGD(spcompile.host_parameters(model), lr=1e-3, momentum=0.9, fused=True)
        losses[name] = []
        for seed in range(N_EXACT):
            losses[name].append(float(_forward_backward(model, fast, seed)))
            optimizer.step()
            optimizer.zero_grad()
        weights[name] = [parameter.detach().cpu().clone() for parameter in spcompile.host_parameters(model)]
        del model, fast, optimizer
    pairs = zip(weights["resident"], weights["streamed"], strict=True)
    return {
        "iterations": N_EXACT,
        "first loss": losses["streamed"][0],
        "last loss": losses["streamed"][-1],
        "losses that differ": sum(one != other for one, other in zip(*losses.values(), strict=True)),
        "weights that differ": sum(not torch.equal(*pair) for pair in pairs),
    }


def host(layers: int) -> Figures:
    """Host memory beside what any training must keep."""
    before_bytes = host_bytes()
    model = spcompile.offload(_trainable(layers))
    fast = torch.compile(model, backend="superpipeline", options={"k": 2, "m": 1})
    parameters = spcompile.host_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    compiled_bytes = 0
    for seed in range(3):
        _forward_backward(model, fast, seed)
        if not seed:  # what torch itself takes for compiling is none of training's
            gradients_bytes = sum(each.grad.nbytes for each in parameters if each.grad is not None)
            weights_bytes = sum(each.nbytes for each in parameters)
            compiled_bytes = host_bytes() - before_bytes - weights_bytes - gradients_bytes
        optimizer.step()
        optimizer.zero_grad()
    state_bytes = sum(
        each.nbytes for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor)
    )
    needed_bytes = weights_bytes + gradients_bytes + state_bytes
    return {
        "weights, gradients and state, GB": needed_bytes / 1e9,
        "torch and what it has compiled, GB": compiled_bytes / 1e9,
        "host memory / needed (asked: <= 1.03)": (host_bytes() - before_bytes - compiled_bytes) / needed_bytes,
    }


def _trainable(layers: int) -> transformers.LlamaForCausalLM:
    return build(layers).train().requires_grad_(True)


def _forward_backward(model: nn.Module, fast: Callable[..., Any], seed: int = 0) -> Tensor:
    """The loss; gradients are left where they are made, those of the call before are gone."""
    model.zero_grad()
    tokens = torch.randint(0, 32000, (ROWS, POSITIONS), generator=torch.Generator().manual_seed(seed)).cuda()
    loss: Tensor = fast(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


if __name__ == "__main__":
    main()
