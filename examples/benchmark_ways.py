"""Measure what it costs to use a Llama-7B shape (bf16, random weights) in each of the ways in which a model may come.

    python -m examples.benchmark_ways [--layers 32] [--only first-call,offload,...] [--json results.json]

Each part runs in a process of its own:

* *first-call*: one token, with an empty compile cache: the ordinary compiler and the superpipeline backend (k=2, m=1)
  in turns, twice, in a fresh process each, once everything that they import has been read from the disk;
* *offload*: ``spcompile.offload`` of a model in ordinary host memory: rate, growth and peak of the process's host
  memory, device memory;
* *resident*, *resident-batch*: every page resident, in turns with the ordinary compiler, one token and 8 x 2048;
* *ways*: a model on the GPU with half of its pages evicted; one token streamed (k=2, m=1) for an offloaded model,
  another (k, m) of it, and the same for a model on the CPU;
* *generate*: ``generate()`` with a static cache, k=2, m=1, per token, against the floor;
* *recording*: what it costs to record, with everything streamed (k=2, m=1) and with everything resident.

Times are medians; whatever is compared is measured in turns in one process, the first calls excepted.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

import spcompile
from examples.benchmark_llama import build, logits_of, measure_link, timer
from spcompile import capture
from spcompile.runtime.store import PageStore, find_store

Figures = dict[str, float | int | str]
STREAMED: dict[str, Any] = {"k": 2, "m": 1}
NEW_TOKENS = 64


def main() -> None:
    parts: dict[str, Callable[[int], Figures]] = {
        "first-call": first_call,
        "offload": offload,
        "resident": resident,
        "resident-batch": resident_batch,
        "ways": ways,
        "generate": generate,
        "recording": recording,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
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


def in_a_process(part: Callable[..., Figures], *arguments: object) -> Figures:
    """Run a part in a fresh process with an empty compile cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(TORCHINDUCTOR_CACHE_DIR=f"{cache}/inductor", TRITON_CACHE_DIR=f"{cache}/triton")
        context = multiprocessing.get_context("spawn")
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sending, part, *arguments))
        process.start()
        sending.close()
        try:
            figures: Figures = receiving.recv()
        except EOFError:
            figures = {"failed": "see above"}
        process.join()
    return figures


def _send(sending: Any, part: Callable[..., Figures], *arguments: object) -> None:
    sending.send(part(*arguments))


# What the parts share.


def forward(fast: Callable[..., Any], device: str = "cuda", shape: tuple[int, int] = (1, 1)) -> Callable[[], Tensor]:
    """A call of one token, or of ``shape`` (batch, sequence), that returns the logits of the last."""
    return partial(logits_of, fast, torch.ones(shape, dtype=torch.int64, device=device))


def compiled(model: torch.nn.Module, options: dict[str, Any] | None) -> Callable[..., Any]:
    """The model under the ordinary compiler (options None) or under the superpipeline backend."""
    if options is None:
        return torch.compile(model, dynamic=False)
    return torch.compile(model, backend="superpipeline", options=options, dynamic=False)


def milliseconds(call: Callable[[], object]) -> float:
    """One iteration between CUDA events that also count the host's part, as a following iteration would see it."""
    start, end = timer(), timer()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, measured in turns, in runs of five back-to-back iterations."""

    def five(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for _ in range(5)]

    for call in calls.values():
        five(call)()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(milliseconds(five(call)) / 5)
    return {name: statistics.median(each) for name, each in times.items()}


def store_of(model: torch.nn.Module) -> PageStore:
    """The page store of a model that was compiled."""
    store = find_store(model.parameters())
    assert store is not None
    return store


def host_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak_host_bytes() -> Iterator[list[int]]:
    """The list holds the highest resident memory seen while the block runs."""
    peak, stop = [host_bytes()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], host_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


# The parts.


def first_call(layers: int) -> Figures:
    """Each compiler in processes of its own, with empty caches; but for the files that are imported, which the first of
    several processes reads from a cold disk."""
    in_a_process(_first_call, 1, None)
    times = [[in_a_process(_first_call, layers, options)["seconds"] for options in (None, STREAMED)] for _ in range(2)]
    ordinary, streamed = (statistics.mean(map(float, each)) for each in zip(*times, strict=True))
    return {
        "resident, whole-model compile: first call, s": ordinary,
        "k=2, m=1: first call, s": streamed,
        "ratio (asked: <= 0.5)": streamed / ordinary,
    }


def _first_call(layers: int, options: dict[str, Any] | None) -> Figures:
    model: torch.nn.Module = build(layers)
    if options is not None:
        model = spcompile.offload(model)
    call = forward(compiled(model, options))
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - started}


def offload(layers: int) -> Figures:
    """Host memory and time of `spcompile.offload`."""
    model = build(layers).cpu()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    weights = [parameter.nbytes for parameter in model.parameters()]
    before, before_device = host_bytes(), torch.cuda.memory_allocated()
    with peak_host_bytes() as peak:
        started = time.perf_counter()
        spcompile.offload(model)
        seconds = time.perf_counter() - started
    after = host_bytes()
    others = before - sum(weights)  # interpreter, libraries, the build
    return {
        "weights, GB": sum(weights) / 1e9,
        "host memory of weights afterwards / weights (asked: <= 1.02)": (after - others) / sum(weights),
        "peak above weights, MB": (peak[0] - others - sum(weights)) / 1e6,
        "two largest tensors, MB (asked: no more)": sum(sorted(weights)[-2:]) / 1e6,
        "device memory for weights, MB (asked: 0)": (torch.cuda.max_memory_allocated() - before_device) / 1e6,
        "rate, GB/s (asked: >= 3)": sum(weights) / 1e9 / seconds,
    }


def resident(layers: int) -> Figures:
    """One token, every page resident."""
    return _resident(layers, "1 token", (1, 1), rounds=60, asked=1.00)


def resident_batch(layers: int) -> Figures:
    """8 x 2048 tokens, every page resident."""
    return _resident(layers, "8 x 2048 tokens", (8, 2048), rounds=5, asked=1.02)


def _resident(layers: int, name: str, shape: tuple[int, int], rounds: int, asked: float) -> Figures:
    plain, model = build(layers), build(layers)
    fast = {"resident": compiled(plain, None), "k = all": compiled(model, {"k": 1000})}
    times = in_turns({each: forward(function, shape=shape) for each, function in fast.items()}, rounds)
    return {
        f"{name}, resident whole-model compile, ms": times["resident"],
        f"{name}, k = all, ms": times["k = all"],
        f"{name}, k = all / resident (asked: <= {asked:.2f})": times["k = all"] / times["resident"],
    }


def ways(layers: int) -> Figures:
    """A model that comes on the GPU, offloaded, and on the CPU."""
    model = build(layers)
    figures = _evict_half(model)
    spcompile.offload(model)
    offloaded = forward(compiled(model, STREAMED))
    offloaded()
    figures |= _second_window(model)
    on_cpu = build(layers).cpu()
    rehomed = forward(compiled(on_cpu, STREAMED), "cpu")
    times = in_turns({"offloaded": offloaded, "on the CPU": rehomed}, 3)
    assert torch.equal(offloaded().cpu(), rehomed())
    figures |= {
        "1 token, k=2, m=1, offloaded, ms": times["offloaded"],
        "1 token, k=2, m=1, CPU model, ms": times["on the CPU"],
        "CPU model / offloaded (asked: <= 1.05)": times["on the CPU"] / times["offloaded"],
    }
    return figures


def _evict_half(model: torch.nn.Module) -> Figures:
    """Compile a model that is on the GPU so that about half of its pages are evicted.

    Until a budget can be given, free memory decides, so it is made to look small.
    """
    weights_bytes = sum(parameter.nbytes for parameter in model.parameters())
    before = torch.cuda.memory_allocated()
    # What is placed already is added to what is free; together they shall be room for residents and two slots.
    free_bytes = int(weights_bytes * 0.62 - weights_bytes)
    with mock.patch.object(capture, "free_device_bytes", return_value=free_bytes):
        forward(compiled(model, {}))()
    torch.cuda.synchronize()
    store = store_of(model)
    plan = store.runtimes()[-1].plan
    evicted_bytes = sum(plan.pages[each.page].nbytes for each in plan.intervals)
    fallen_bytes = before + store.arena.memory.numel() - torch.cuda.memory_allocated()
    torch._dynamo.reset()
    return {
        "on the GPU: pages": len(plan.pages),
        "on the GPU: pages evicted": len(plan.intervals),
        "evicted, GB": evicted_bytes / 1e9,
        "allocated memory fell by, GB, without the arena": fallen_bytes / 1e9,
        "difference (asked: < 1 %), %": abs(fallen_bytes / evicted_bytes - 1) * 100,
    }


def _second_window(model: torch.nn.Module) -> Figures:
    store = store_of(model)
    segments, places = len(store.segments), [weight.host.data_ptr() for weight in store.weights.values()]
    started = time.perf_counter()
    forward(compiled(model, {"k": 4, "m": 2}))()
    torch.cuda.synchronize()
    moved = sum(one != other.host.data_ptr() for one, other in zip(places, store.weights.values(), strict=True))
    return {
        "second (k, m): segments compiled (asked: 0)": len(store.segments) - segments,
        "second (k, m): weights copied on the host (asked: 0)": moved,
        "second (k, m): first call, s": time.perf_counter() - started,
    }


def generate(layers: int) -> Figures:
    """Tokens of `generate` with a static cache."""
    model = build(layers)
    prompt = torch.ones(1, 16, dtype=torch.int64, device="cuda")
    arguments = {"do_sample": False, "cache_implementation": "static", "disable_compile": True, "pad_token_id": 0}

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(prompt, **arguments, max_new_tokens=count, min_new_tokens=count)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def milliseconds_per_token() -> float:
        """Of the tokens after the first two, which belong to the prompt and to compilation."""
        return (seconds(NEW_TOKENS) - seconds(NEW_TOKENS // 2)) / (NEW_TOKENS - NEW_TOKENS // 2) * 1e3

    forward = model.forward
    model.forward = torch.compile(forward, dynamic=False)
    seconds(NEW_TOKENS)
    resident_ms = milliseconds_per_token()
    torch._dynamo.reset()
    spcompile.offload(model)
    model.forward = torch.compile(forward, backend="superpipeline", options=STREAMED, dynamic=False)
    seconds(NEW_TOKENS)
    streamed_ms = milliseconds_per_token()
    store = store_of(model)
    plan = store.runtimes()[-1].plan
    floor_ms = max(resident_ms, plan.bytes_moved / measure_link(store, plan) * 1e3)
    return {
        "resident, ms per token": resident_ms,
        "k=2, m=1, ms per token": streamed_ms,
        "floor, ms per token": floor_ms,
        "/ floor (asked: <= 1.05)": streamed_ms / floor_ms,
        "graphs": len(store.runtimes()),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def recording(layers: int) -> Figures:
    """Iterations with and without a recording, in turns."""
    figures: Figures = {}
    model = build(layers)
    cases = (("k=2, m=1", STREAMED, 5), ("k = all", {"k": 1000}, 60))
    for name, options, rounds in cases:
        torch._dynamo.reset()
        fast = compiled(model, options)
        call = forward(fast)
        call()

        def recorded(fast: Callable[..., Any] = fast, call: Callable[[], object] = call) -> float:
            with spcompile.record(fast):
                return milliseconds(lambda: [call() for _ in range(5)]) / 5

        def plain(call: Callable[[], object] = call) -> float:
            torch.cuda.synchronize()
            return milliseconds(lambda: [call() for _ in range(5)]) / 5

        pairs = [(plain(), recorded()) for _ in range(rounds)]
        plain_ms, recorded_ms = (statistics.median(each) for each in zip(*pairs, strict=True))
        print(spcompile.explain(fast))
        figures |= {
            f"1 token, {name}, ms": plain_ms,
            f"1 token, {name}, recorded, ms": recorded_ms,
            f"1 token, {name}, recorded / not (asked: <= 1.01)": recorded_ms / plain_ms,
        }
    return figures


if __name__ == "__main__":
    main()
