"""Measure the Llama-7B shape (bf16, random weights) on one GPU: resident, all pages resident, and streamed with k=2,
m=1.

    python examples/benchmark_llama.py [--layers 32] [--json results.json]

Everything happens in one process, so that the figures share one machine state:

* *resident*: the ordinary model on the GPU under torch.compile (Inductor, whole graph);
* *k=all*: the same segments as the streamed run, every page resident; the reference for bit-equality;
* *streamed*: k=2, m=1; every layer crosses the link once per iteration;
* *link*: the streamed run's own pages copied back to back, nothing else running.

The floor of a streamed iteration is max(resident iteration, bytes moved / link rate). Times are medians of CUDA events
around whole iterations after warm-up; memory is ``torch.cuda.max_memory_allocated`` over the timed iterations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import spcompile
from spcompile.runtime.store import PageStore, find_store

CASES = {"1 token": (1, 1), "8 x 2048 tokens": (8, 2048)}
ITERATIONS = {"1 token": 15, "8 x 2048 tokens": 15}
WARM_UP = 3


@dataclass
class Measured:
    """One line of the table."""

    milliseconds: float
    peak_bytes: int
    first_call_s: float
    logits: Tensor


def build(layers: int) -> transformers.LlamaForCausalLM:
    """The Llama-7B shape on the GPU with random bf16 weights."""
    config = transformers.LlamaConfig(num_hidden_layers=layers, dtype="bfloat16")
    with torch.device("cuda"), torch.random.fork_rng(["cuda"]):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    return model


def logits_of(call: Callable[..., Any], tokens: Tensor) -> Tensor:
    """Those of the last token."""
    with torch.no_grad():
        logits: Tensor = call(tokens, use_cache=False, logits_to_keep=1).logits
    return logits


def timer() -> Any:
    """A CUDA event that keeps time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def measure(call: Callable[[], Tensor], iterations: int) -> Measured:
    """Median iteration time and peak memory of a call, after its first (compiling) call."""
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    first_call_s = time.perf_counter() - started
    for _ in range(WARM_UP):
        logits = call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [timer() for _ in range(iterations + 1)]
    events[0].record()
    for event in events[1:]:
        logits = call()
        event.record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in itertools.pairwise(events)]
    return Measured(statistics.median(times), torch.cuda.max_memory_allocated(), first_call_s, logits.clone())


def measure_link(store: PageStore, plan: spcompile.Plan) -> float:
    """Bytes per second of the plan's own pages, copied back to back from where they lie into two slots."""
    slots = torch.empty(2, max(page.slot_bytes for page in plan.pages), dtype=torch.uint8, device="cuda")
    rates: list[float] = []
    for _ in range(5):
        start, end = timer(), timer()
        start.record()
        for index, interval in enumerate(plan.intervals):
            for offset_bytes, source in store.pieces(plan.pages[interval.page]):
                slots[index % 2, offset_bytes : offset_bytes + source.numel()].copy_(source, non_blocking=True)
        end.record()
        torch.cuda.synchronize()
        rates.append(plan.bytes_moved / (start.elapsed_time(end) / 1e3))
    return statistics.median(rates)


def measure_all(model: transformers.LlamaForCausalLM, options: dict[str, Any] | None) -> dict[str, Measured]:
    """Every case with the ordinary compiler (options None) or with the superpipeline backend."""
    results = {}
    for case, shape in CASES.items():
        torch._dynamo.reset()
        if options is None:
            fast = torch.compile(model, dynamic=False)
        else:
            fast = torch.compile(model, backend="superpipeline", options=options, dynamic=False)
        torch.manual_seed(1)
        tokens = torch.randint(0, model.config.vocab_size, shape, device="cuda")
        results[case] = measure(partial(logits_of, fast, tokens), ITERATIONS[case])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()

    model = build(arguments.layers)
    resident = measure_all(model, None)
    started = time.perf_counter()
    model = spcompile.offload(model)
    offload_s = time.perf_counter() - started
    torch.cuda.empty_cache()
    streamed = measure_all(model, {"k": 2, "m": 1})
    store = find_store(model.parameters())
    assert store is not None
    plan: spcompile.Plan = store.runtimes()[-1].plan
    link = measure_link(store, plan)
    every = measure_all(model, {"k": len(plan.pages)})

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"weights {plan.weights_bytes / 1e9:.2f} GB, moved {plan.bytes_moved / 1e9:.2f} GB per iteration,", end=" ")
    print(f"link {link / 1e9:.1f} GB/s, offload {offload_s:.1f} s")
    print(f"{'case':18}{'run':12}{'ms':>9}{'/ floor':>9}{'/ resident':>12}{'peak GB':>9}{'first s':>9}  equal k=all")
    rows = []
    for case in CASES:
        floor_ms = max(resident[case].milliseconds, plan.bytes_moved / link * 1e3)
        for name, result in (("resident", resident[case]), ("k=all", every[case]), ("k=2, m=1", streamed[case])):
            equal = torch.equal(result.logits, every[case].logits)
            ratio = result.milliseconds / resident[case].milliseconds
            print(
                f"{case:18}{name:12}{result.milliseconds:9.2f}{result.milliseconds / floor_ms:9.3f}{ratio:12.3f}"
                f"{result.peak_bytes / 1e9:9.2f}{result.first_call_s:9.1f}  {'bit for bit' if equal else 'no'}"
            )
            fields = {key: value for key, value in asdict(result).items() if key != "logits"}
            rows.append({"case": case, "run": name, "floor_ms": floor_ms, "bit_equal": equal, **fields})
    if arguments.json:
        figures = {"rows": rows, "link_bytes_per_s": link, "bytes_moved": plan.bytes_moved}
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
