"""Train a character language model on Python's own documentation, with its weights and optimizer in host memory.

    python examples/train_characters.py [--iterations 400] [--k 2] [--seed 0]

The model is offloaded, so its weights lie in host memory, and the optimizer is made of `spcompile.host_parameters`: the
CPU updates the weights where they lie, and the optimizer's state stays beside them.

The same loop runs twice from one seed: with a plain model, as PyTorch runs it without a compiler, and with the
offloaded one, of which k pages are on the device at a time, in forward and again in backward. One sees the mean loss of
each stretch of the training for both and the largest difference of any two losses in it; then the loss on text that was
held back, what was moved, how few bytes of weights the device held at a time, and some text that the model makes up.

Without a GPU every loss and, at the end, every weight must be equal in every bit: with ``compiler="eager"`` the
segments run the kernels of plain PyTorch. With a GPU the plain model's optimizer computes there and the other one on
the CPU, which rounds differently: then no two losses may be further than 0.01 apart. (Inductor, the default, adds up
the gradients of an embedding in no fixed order unless torch.use_deterministic_algorithms says otherwise: with it no two
runs are equal in every bit.) Ends with exit code 1 if the losses differ by more, or if that of the held-back text is
above 1.9 nats per character, which needs the default number of iterations.

Takes about a minute on two CPU cores, where the CPU stands in for the GPU (the *emulated device*); with a GPU it uses
that. The text is in the standard library: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spcompile

CONTEXT = 64  # characters that the model sees at a time
BATCH = 32
LEARNING_RATE = 6e-3
STRETCH = 50  # iterations that are printed as one line
ASKED_NATS = 1.9  # per character of text that was held back
NEAR = 0.01  # nats: what rounding may make of a loss


# The model. Nothing in it knows of superpipeline.


class Block(nn.Module):
    """A decoder block: [rows, characters, width] to the same; no character sees those after it."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_1 = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm_1(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return out

    def attend(self, x: Tensor) -> Tensor:
        heads = self.queries_keys_values(x).unflatten(-1, (3, self.n_heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)  # each [rows, heads, characters, width of a head]
        seen = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        out: Tensor = self.mixed(seen.transpose(1, 2).flatten(2))
        return out


class LanguageModel(nn.Module):
    """Characters [rows, CONTEXT] to logits of the ones after them; where those are given too, to their mean loss."""

    def __init__(self, n_characters: int, width: int = 64, n_blocks: int = 6, n_heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_characters, width)
        self.positions = nn.Parameter(0.1 * torch.randn(CONTEXT, width))
        self.blocks = nn.ModuleList(Block(width, n_heads) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_characters)

    def forward(self, characters: Tensor, following: Tensor | None = None) -> Tensor:
        x = self.embed(characters) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits if following is None else F.cross_entropy(logits.flatten(0, 1), following.flatten())


# The data.


@dataclass(frozen=True)
class Text:
    """Text as numbers."""

    alphabet: str
    train: Tensor
    held_back: Tensor
    """The last tenth."""

    def decode(self, characters: Tensor) -> str:
        return "".join(self.alphabet[each] for each in characters.tolist())


def load() -> Text:
    text = " ".join(" ".join(topics.values()).split())  # tables and indented code would be spaces for the most part
    alphabet = "".join(sorted(set(text)))
    number = {character: index for index, character in enumerate(alphabet)}
    numbers = torch.tensor([number[character] for character in text])
    n_train = len(numbers) * 9 // 10
    return Text(alphabet, numbers[:n_train], numbers[n_train:])


def batches(numbers: Tensor, count: int, seed: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Stretches of the text from anywhere in it, and the same stretches one character later: [BATCH, CONTEXT] each."""
    windows = numbers.unfold(0, CONTEXT + 1, 1)
    places = torch.Generator().manual_seed(seed)
    for _ in range(count):
        rows = windows[torch.randint(len(windows), (BATCH,), generator=places)].to(device)
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# Training: one loop for both ways.


@dataclass
class Run:
    """A model that is being trained."""

    model: nn.Module
    call: Callable[..., Tensor]
    """The model as it is called: itself, or what torch.compile made of it."""

    parameters: list[nn.Parameter]
    """What the optimizer works on."""

    losses: list[float] = field(default_factory=list)
    """One per iteration."""


def plain(model: nn.Module, device: str) -> Run:
    """All weights on the device, and no compiler."""
    model.to(device)
    return Run(model, model, list(model.parameters()))


def streamed(model: nn.Module, k: int) -> Run:
    """Weights and optimizer in host memory; at most k pages on the device."""
    spcompile.offload(model)
    fast = torch.compile(model, backend="superpipeline", options={"k": k, "m": 1, "compiler": "eager"})
    return Run(model, fast, spcompile.host_parameters(model))


def train(run: Run, text: Text, n_iterations: int, seed: int, device: str) -> None:
    """A plain loop, as in any tutorial: a tenth of it to warm up, then slower and slower."""
    optimizer = torch.optim.AdamW(run.parameters, lr=LEARNING_RATE, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=n_iterations, pct_start=0.1)
    for characters, following in batches(text.train, n_iterations, seed, device):
        loss = run.call(characters, following)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(run.parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())


@torch.no_grad()
def held_back_loss(run: Run, text: Text, device: str) -> float:
    """Nats per character."""
    return mean([run.call(*batch).item() for batch in batches(text.held_back, 20, 0, device)])


@torch.no_grad()
def write(run: Run, text: Text, n_characters: int, seed: int, device: str) -> str:
    """How the model goes on from the first words of the text, which are included."""
    dice = torch.Generator().manual_seed(seed)
    characters = text.train[:CONTEXT]
    for _ in range(n_characters):
        logits = run.call(characters[None, -CONTEXT:].to(device))[0, -1].cpu()
        chosen = torch.multinomial((logits / 0.7).softmax(0), 1, generator=dice)
        characters = torch.cat([characters, chosen])
    return text.decode(characters)


# What came of it.


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def print_curves(reference: Run, run: Run) -> None:
    print("iterations   plain loss   streamed loss   largest difference")
    for start in range(0, len(run.losses), STRETCH):
        expected, losses = (each.losses[start : start + STRETCH] for each in (reference, run))
        difference = largest_difference(expected, losses)
        print(f"{start:>6} ...{mean(expected):>13.4f}{mean(losses):>16.4f}{difference:>21.3g}")


def print_traffic(run: Run, plans: Any) -> None:
    """Of a training iteration, from its plan, or its plans where forward and backward have one each."""
    graphs = plans if isinstance(plans, tuple) else (plans,)
    weights_bytes = sum(each.nbytes for each in run.model.parameters())
    peak_bytes = max(each.peak_weight_bytes for each in graphs)
    moved_bytes = sum(each.bytes_moved for each in graphs)
    print(f"  weights in total                       {weights_bytes / 1e6:>8.2f} MB")
    print(f"  most weight bytes on the device        {peak_bytes / 1e6:>8.2f} MB")
    print(f"  bytes moved per iteration              {moved_bytes / 1e6:>8.2f} MB")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=400, help="batches to train on (default: %(default)s)")
    parser.add_argument("--k", type=int, default=2, help="most pages on the device (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    asked = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = load()
    print(f"{len(text.train):,} characters to train on, {len(text.alphabet)} different ones\n")

    torch.manual_seed(asked.seed)
    reference = plain(LanguageModel(len(text.alphabet)), device)
    torch.manual_seed(asked.seed)
    run = streamed(LanguageModel(len(text.alphabet)), asked.k)
    for each in (reference, run):
        train(each, text, asked.iterations, asked.seed, device)
    plans = spcompile.plan(run.call)  # before other texts, which have graphs and plans of their own
    print_curves(reference, run)

    difference = largest_difference(reference.losses, run.losses)
    is_equal = difference == 0 and equal_weights(reference.model, run.model)
    nats = held_back_loss(run, text, device)
    print(f"\nlanguage model on {torch.cuda.get_device_name() if device == 'cuda' else 'the emulated device'}")
    print_traffic(run, plans)
    print(f"  nats per character of held-back text   {nats:>8.3f}")
    print(f"  largest difference of two losses       {difference:>8.3g}")
    print(f"  losses and weights equal bit by bit    {'yes' if is_equal else 'no':>8}")
    print(f"\n{write(run, text, 300, asked.seed, device)}")
    same = is_equal if device == "cpu" else difference <= NEAR
    return 0 if same and nats <= ASKED_NATS else 1


if __name__ == "__main__":
    sys.exit(main())
