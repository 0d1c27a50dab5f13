"""Training of random models: bit for bit that with every page resident, whatever the plan, the way, the optimizer.

What is drawn: blocks of `tests.models` and norms and dropout, in any order and with repeats, of different widths, with
skip connections over several of them, a head that may be tied to the embedding, and parameters that are frozen; k and
m or a budget; the way in which the model comes; an optimizer; micro-batches of equal or different sizes.

The odd case: a budget or a k that is too small is refused. It is then raised until it is taken, so that small ones are
met often.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spcompile.runtime.store import find_store
from tests.backend.test_training import RESIDENT, WAYS, Seen, assert_same, compile_as
from tests.models import BLOCKS, KINDS
from tests.running import moved_by_plan

N_ITERATIONS = 20

TOKENS = 11


class Dropout(nn.Module):
    """A matrix and what of it is left."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(torch.relu(self.fc(x)))
        return y


class BatchNorm(nn.Module):
    """Statistics that every call updates in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


ALL_KINDS: dict[str, type[nn.Module]] = {**KINDS, "dropout": Dropout, "batch_norm": BatchNorm}

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, foreach=False),
    "SGD, fused": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, fused=True),
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.02),
}


@dataclass(frozen=True)
class Spec:
    """A drawn model: it prints as what hypothesis found.

    Attributes:
        blocks: kind and width of each; they run in ``order``, which may repeat or leave out some.
        skips: places in the order that add the oldest activations of their width.
        frozen: indices of parameters that are not trained.
    """

    blocks: tuple[tuple[str, int], ...]
    order: tuple[int, ...]
    skips: frozenset[int]
    frozen: frozenset[int]
    embedding: bool
    tied: bool
    dtype: torch.dtype

    def build(self) -> nn.Module:
        """The module, with the same weights each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Drawn(self).to(self.dtype)
        for index, parameter in enumerate(list(model.parameters())[:-1]):  # the last one is the bias of the head
            parameter.requires_grad_(index not in self.frozen)
        return model

    def inputs(self, rows: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.embedding:
            return torch.randint(0, TOKENS, (rows,), generator=generator)
        return torch.randn(rows, self.blocks[self.order[0]][1], generator=generator).to(self.dtype)


class Drawn(nn.Module):
    """The model of a `Spec`, with a matrix wherever the width changes."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        widths = [spec.blocks[index][1] for index in spec.order]
        self.embed = nn.Embedding(TOKENS, widths[0]) if spec.embedding else None
        self.blocks = nn.ModuleList(ALL_KINDS[kind](width) for kind, width in spec.blocks)
        self.bridges = nn.ModuleList(
            nn.Identity() if one == other else nn.Linear(one, other)
            for one, other in zip((widths[0], *widths), widths, strict=False)
        )
        self.head = nn.Linear(widths[-1], TOKENS)
        if spec.tied and self.embed is not None and widths[0] == widths[-1]:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        oldest: dict[int, Tensor] = {x.shape[-1]: x}
        for place, index in enumerate(self.spec.order):
            x = self.blocks[index](self.bridges[place](x))
            if place in self.spec.skips:
                x = x + oldest.get(x.shape[-1], x)
            oldest.setdefault(x.shape[-1], x)
        loss: Tensor = self.head(x).float().square().mean()
        return loss


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """A strategy for models of one to six blocks."""
    kinds = st.sampled_from((*BLOCKS, "dropout", "batch_norm"))
    blocks = draw(st.lists(st.tuples(kinds, st.sampled_from((8, 8, 8, 5, 24))), min_size=1, max_size=6).map(tuple))
    natural = tuple(range(len(blocks)))
    order = draw(st.just(natural) | st.lists(st.sampled_from(natural), min_size=1, max_size=8).map(tuple))
    return Spec(
        blocks=blocks,
        order=order,
        skips=draw(st.frozensets(st.integers(0, 7), max_size=3)),
        frozen=draw(st.just(frozenset[int]()) | st.frozensets(st.integers(0, 20), max_size=12)),
        embedding=draw(st.booleans()),
        tied=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16))),
    )


@dataclass(frozen=True)
class Memory:
    """How much a model may keep on the device: a window, or a part of the bytes of its weights and some more."""

    k: int
    m: int
    part: float | None

    def options(self, weights_bytes: int) -> dict[str, Any]:
        if self.part is None:
            return {"k": self.k, "m": min(self.k, self.m)}
        return {"budget": 1 + int(self.part * 2 * weights_bytes)}


MEMORIES = st.builds(
    Memory, k=st.integers(1, 6), m=st.integers(1, 6), part=st.none() | st.floats(0, 1, allow_subnormal=False)
)


@dataclass(frozen=True)
class Loop:
    """A training loop: an optimizer, and the rows of each micro-batch."""

    optimizer: str
    rows: tuple[int, ...]


LOOPS = st.builds(
    Loop,
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    rows=st.sampled_from(((4,), (4, 4), (4, 4, 4), (4, 7), (3, 6, 4))),
)


def eased(options: dict[str, Any], refusal: ValueError) -> dict[str, Any]:
    """Options that ask for a little more memory than the refused ones.

    Raises:
        ValueError: the refusal itself, where it is about something else.
    """
    needed = re.search(r"option 'k' must be at least (\d+) for this model", str(refusal))
    if needed is not None and "k" in options:
        return {**options, "k": int(needed[1])}
    if "is too little: the smallest that can be kept is" in str(refusal) and "budget" in options:
        return {**options, "budget": int(options["budget"] * 1.3) + 64}
    raise refusal


def train(spec: Spec, way: str, loop: Loop, seed: int, options: dict[str, Any]) -> tuple[Seen, nn.Module, Any]:
    """Losses, gradients of every tenth iteration, and weights and buffers at the end; the model, and what runs it."""
    model = spec.build()
    fast = compile_as(way, model, seed=seed, **options)
    optimizer = OPTIMIZERS[loop.optimizer](list(model.parameters()))
    seen: list[tuple[str, Tensor | None]] = []
    torch.manual_seed(seed)
    for iteration in range(N_ITERATIONS):
        for place, rows in enumerate(loop.rows):
            loss = fast(spec.inputs(rows, 10 * iteration + place))
            loss.backward()
            seen.append((f"loss {iteration}", loss.detach()))
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            seen.append((f"gradient {iteration} of {name}", gradient if gradient is None else gradient.clone()))
        optimizer.step()
        optimizer.zero_grad()
        seen += [(f"weight {iteration} {name}", each.clone()) for name, each in model.state_dict().items()]
    return seen, model, fast


def train_in_little(
    spec: Spec, way: str, loop: Loop, seed: int, options: dict[str, Any]
) -> tuple[Seen, nn.Module, Any]:
    """`train` with the options, or the next larger ones that are not refused."""
    while True:
        try:
            return train(spec, way, loop, seed, options)
        except ValueError as refusal:
            options = eased(options, refusal)
            event("refused at first")


@settings(max_examples=12)
@given(spec=specs(), memory=MEMORIES, way=st.sampled_from(WAYS), loop=LOOPS, seed=st.integers(0, 2**16))
def test_training_is_exact(spec: Spec, memory: Memory, way: str, loop: Loop, seed: int) -> None:
    weights_bytes = sum(each.nbytes for each in spec.build().parameters())
    seen, model, fast = train_in_little(spec, way, loop, seed, memory.options(weights_bytes))
    assert_moved_as_planned(model)
    del fast
    expected, _, _ = train(spec, way, loop, seed, dict(RESIDENT))
    assert_same(seen, expected)
    event(way)


def assert_moved_as_planned(model: nn.Module) -> None:
    """What a plan streams has been streamed, and nothing else."""
    store = find_store(model.parameters())
    assert store is not None
    plans = moved_by_plan(store)
    assert plans
    for plan, bytes_moved in plans:
        assert (bytes_moved > 0) == (plan.bytes_moved > 0)
    event("streamed" if any(plan.intervals for plan, _ in plans) else "resident")
