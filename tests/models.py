"""Random models, and small models with one trap each, for the tests of the backend.

`modules` draws a module together with example inputs. What is drawn covers the traps of docs/design.md: shared
blocks, tied weights, weights used twice and outside their module, branches that join, skip connections, buffers,
buffers that are updated in place, several dtypes, odd sizes, non-contiguous and empty weights, views of one flat
storage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

BLOCKS = (
    "linear",
    "residual",
    "norm",
    "gate",
    "counter",
    "double",
    "tied_pair",
    "flat",
    "transposed",
    "empty",
    "branch",
    "constant",
)


class Linear(nn.Module):
    """One matrix and a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(self.fc(x))
        return y


class Residual(nn.Module):
    """A feed-forward block with a skip connection and a hidden width that is odd."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        y: Tensor = x + self.down(hidden)
        return y


class Norm(nn.Module):
    """Small weights only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class Gate(nn.Module):
    """A weight that another module reads too (see `Drawn.forward`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate)


class Counter(nn.Module):
    """Buffers that every call updates in place: a count and a running mean."""

    count: Tensor
    mean: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        self.count.add_(1)
        self.mean.mul_(0.5).add_(y.detach().mean(0) * 0.5)
        return y + self.mean


class Double(nn.Module):
    """One weight used at two places of the block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(torch.tanh(self.fc(x)))) @ self.fc.weight.t()


class TiedPair(nn.Module):
    """Two modules that hold one parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Linear(width, width)
        self.two = nn.Linear(width, width)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(torch.relu(self.one(x)))
        return y


class Flat(nn.Module):
    """Two parameters that are views of one flat storage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        flat = torch.randn(2 * width * width) / width**0.5
        self.one = nn.Parameter(flat[: width * width].view(width, width))
        self.two = nn.Parameter(flat[width * width :].view(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.one) @ self.two


class Transposed(nn.Module):
    """A parameter that is not contiguous."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(width, width) / width**0.5).t())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


class Empty(nn.Module):
    """A parameter with no elements, next to an ordinary one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.empty(0, width))
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(torch.cat([x, self.none]))
        return y[: x.shape[0]]


class Branch(nn.Module):
    """Two towers that join."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left = nn.ModuleList(Linear(width) for _ in range(2))
        self.right = nn.ModuleList(Residual(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        left = right = x
        for one, other in zip(self.left, self.right, strict=True):
            left, right = one(left), other(right)
        return left * torch.tanh(right)


class Constant(nn.Module):
    """A tensor made of nothing, and a buffer that is only read."""

    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[0], dtype=x.dtype, device=x.device).unsqueeze(1)
        y: Tensor = self.fc(x) * self.scale + positions / 7
        return y


KINDS: dict[str, type[nn.Module]] = {
    "linear": Linear,
    "residual": Residual,
    "norm": Norm,
    "gate": Gate,
    "counter": Counter,
    "double": Double,
    "tied_pair": TiedPair,
    "flat": Flat,
    "transposed": Transposed,
    "empty": Empty,
    "branch": Branch,
    "constant": Constant,
}


@dataclass(frozen=True)
class Spec:
    """A drawn model: it prints as what hypothesis found."""

    kinds: tuple[str, ...]
    order: tuple[int, ...]
    width: int
    embedding: bool
    tied_head: bool
    skip: bool
    outside_use: bool
    dtype: torch.dtype
    seed: int

    def build(self) -> nn.Module:
        """The module, with weights that depend on ``seed`` alone."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return Drawn(self).to(self.dtype)

    def inputs(self, rows: int = 3, seed: int = 0) -> Tensor:
        """An example input: ``[rows]`` of tokens, or ``[rows, width]`` of activations."""
        generator = torch.Generator().manual_seed(seed)
        if self.embedding:
            return torch.randint(0, 11, (rows,), generator=generator)
        return torch.randn(rows, self.width, generator=generator).to(self.dtype)


class Drawn(nn.Module):
    """The model of a `Spec`: an optional embedding, blocks in some order (with repeats), an optional tied head."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(11, spec.width) if spec.embedding else None
        self.blocks = nn.ModuleList(KINDS[kind](spec.width) for kind in spec.kinds)
        self.head = nn.Linear(spec.width, 11)
        if spec.tied_head and self.embed is not None:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        first = x
        for index in self.spec.order:
            x = self.blocks[index](x)
        if self.spec.skip:
            x = x + first
        if self.spec.outside_use:
            x = x + next(self.blocks[0].parameters()).sum() / 100
        y: Tensor = self.head(x)
        return y


@st.composite
def specs(draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float64)) -> Spec:
    """A strategy for models of one to six blocks, run in order, with repeats or out of order."""
    kinds = draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5))
    natural = tuple(range(len(kinds)))
    order = draw(st.just(natural) | st.lists(st.sampled_from(natural), min_size=1, max_size=7).map(tuple))
    return Spec(
        kinds=tuple(kinds),
        order=order,
        width=draw(st.sampled_from((4, 7, 16, 33))),
        embedding=draw(st.booleans()),
        tied_head=draw(st.booleans()),
        skip=draw(st.booleans()),
        outside_use=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 3)),
    )
