"""The model of the tutorial, for the pages that go on from there."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        y: Tensor = x + self.down(hidden)
        return y


class Model(nn.Module):
    def __init__(self, n_blocks: int = 6, width: int = 128, n_words: int = 1000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(n_blocks))
        self.head = nn.Linear(width, n_words)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def make() -> tuple[Model, Tensor]:
    """A model in fp32 on the CPU, and words for it, int64 ``[1, 16]``."""
    torch.manual_seed(0)
    return Model().eval(), torch.randint(1000, (1, 16))
