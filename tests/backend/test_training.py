"""Plain training loops on streamed models: bit for bit those with every page resident.

A *recipe* is a training loop as a user writes it, and what of it is to be compared: losses, gradients, weights. It is
run on a streamed model (k = 2, m = 1) that comes in each of the three ways, on a resident one (k = 1000), which must
agree in every bit, and on plain eager, which must be close. What a recipe asserts itself holds for all of them.

The odd case: dropout draws other numbers in plain eager, so nothing is compared with that.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from spcompile.runtime.store import find_store
from tests.running import compile_offloaded

WIDTH = 16

TOKENS = 23

N_LAYERS = 3

STREAMED: dict[str, Any] = {"k": 2, "m": 1}

RESIDENT: dict[str, Any] = {"k": 1000, "m": 1}
"""Options with which every page stays on the device."""

WAYS = ("offloaded", "on the device", "on the CPU")
"""How a model comes. On a machine without CUDA all of them run on the emulated device."""

EVERY_WAY = pytest.mark.parametrize("way", WAYS)

# Something that breaks in the middle of a compiled graph.


@dataclass
class Fuse:
    """Raises an error, once, at the n-th pass of a phase after it was lit."""

    error: BaseException | None = None
    phase: str = ""
    passes_left: int = 0

    def light(self, phase: str, passes: int, error: BaseException) -> None:
        self.phase, self.passes_left, self.error = phase, passes, error

    def burn(self, phase: str) -> None:
        if self.error is None or phase != self.phase:
            return
        self.passes_left -= 1
        if self.passes_left == 0:
            error, self.error = self.error, None
            raise error


FUSE = Fuse()
"""The fuse of all `passed_on` operators: an operator has no other place for what it should do."""


@torch.library.custom_op("spcompile_tests::pass_on", mutates_args=())
def pass_on(x: Tensor) -> Tensor:
    """What torch.compile does not look into."""
    FUSE.burn("forward")
    return x.clone()


@torch.library.custom_op("spcompile_tests::pass_back", mutates_args=())
def pass_back(gradient: Tensor) -> Tensor:
    FUSE.burn("backward")
    return gradient.clone()


@pass_on.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pass_back.register_fake
def _(gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _backward_of_pass_on(_ctx: Any, gradient: Tensor) -> Tensor:
    result: Tensor = pass_back(gradient)
    return result


pass_on.register_autograd(_backward_of_pass_on)

# Models.


class Output(NamedTuple):
    """What a model returns, of shapes ``[]``, ``[rows, positions, TOKENS]`` and ``[rows, positions, WIDTH]``."""

    loss: Tensor
    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Layout:
    """What is special about a model."""

    dropout: float = 0.0
    batch_norm: bool = False
    adapters: bool = False
    tied: bool = False
    fragile: bool = False
    checkpointed: bool = False
    autocast: bool = False
    breaks: str = ""
    """Where graphs break: "around" all layers, or "between" them, so that one graph serves them all."""

    dtype: torch.dtype = torch.float32
    trained: str = ""
    """A pattern that the names of trained parameters hold; all others are frozen."""


class Block(nn.Module):
    """A feed-forward layer with a norm, and perhaps more."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.norm = nn.BatchNorm1d(WIDTH) if layout.batch_norm else nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH + 1)
        self.down = nn.Linear(2 * WIDTH + 1, WIDTH)
        if layout.adapters:
            self.adapter = nn.Sequential(nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.transpose(1, 2)).transpose(1, 2) if self.layout.batch_norm else self.norm(x)
        y = self.down(torch.relu(self.up(y)))
        if self.layout.adapters:
            y = y + self.adapter(x)
        if self.layout.fragile:
            y = pass_on(y)
        result: Tensor = x + F.dropout(y, self.layout.dropout, self.training)
        return result


class Stack(nn.Module):
    """A small language model: tokens, or activations, to a loss. One of its modules is never used."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(Block(layout) for _ in range(N_LAYERS))
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(WIDTH, TOKENS)
        if layout.tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Output:
        around = torch.autocast("cpu", dtype=torch.bfloat16) if self.layout.autocast else nullcontext()
        hidden = x if x.is_floating_point() else self.embed(x)
        if self.layout.breaks == "around":
            torch._dynamo.graph_break()
        with around:
            for layer in self.layers:
                if self.layout.breaks == "between":
                    torch._dynamo.graph_break()
                hidden = checkpoint(layer, hidden, use_reentrant=False) if self.layout.checkpointed else layer(hidden)
            if self.layout.breaks == "around":
                torch._dynamo.graph_break()
            logits = self.head(hidden)
        return Output(self.loss_of(x, logits.float()), logits, hidden)

    def loss_of(self, x: Tensor, logits: Tensor) -> Tensor:
        if x.is_floating_point():
            return logits.square().mean()
        return F.cross_entropy(logits.flatten(0, 1), x.flatten().roll(1))


def build(layout: Layout) -> Stack:
    """A model whose weights depend on its layout alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Stack(layout).to(layout.dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(layout.trained, name) is not None)
    return model


def tokens(seed: int, rows: int = 3) -> Tensor:
    return torch.randint(0, TOKENS, (rows, 5), generator=torch.Generator().manual_seed(seed))


def activations(seed: int) -> Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


# Running and comparing.


@dataclass
class Trainee:
    """A model, how it is called, and what was seen of it."""

    model: Stack
    call: Callable[..., Any]
    seen: list[tuple[str, Tensor | None]] = field(default_factory=list)

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """What the optimizer is given, by name."""
        return dict(self.model.named_parameters())

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.named.values())

    def see(self, name: str, tensor: Tensor | None) -> None:
        self.seen.append((name, None if tensor is None else tensor.detach().clone()))

    def see_gradients(self) -> None:
        for name, parameter in self.named.items():
            gradient = parameter.grad
            if gradient is not None:
                assert type(gradient) is Tensor, name
                assert (gradient.shape, gradient.dtype) == (parameter.shape, parameter.dtype), name
                assert gradient.device == parameter.device, name
            self.see(f"gradient of {name}", gradient)

    def see_weights(self) -> None:
        for name, value in self.model.state_dict().items():
            self.see(f"weight {name}", value)

    def forward_backward(self, x: Tensor) -> None:
        loss = self.call(x).loss
        self.see("loss", loss)
        loss.backward()

    def evaluate(self, x: Tensor) -> None:
        with torch.no_grad():
            self.see("evaluation", self.call(x).logits)

    def iterate(self, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        """One iteration of the plain loop."""
        self.forward_backward(x)
        self.see_gradients()
        optimizer.step()
        optimizer.zero_grad()
        self.see_weights()


Recipe = Callable[[Trainee], None]

Seen = Sequence[tuple[str, Tensor | None]]


def compile_as(way: str, model: nn.Module, *, seed: int = 0, **options: Any) -> Callable[..., Any]:
    """Compile a model that comes in one of the `WAYS`.

    Args:
        way: one of `WAYS`.
        model: an ordinary model on the CPU.
        seed: of the emulated device; a model that is not offloaded has none before its first call.
        options: of the backend; segments are not compiled unless asked for.
    """
    options = {"compiler": "aot_eager", **options}
    if way == "offloaded":
        return compile_offloaded(model, seed=seed, **options).model
    torch._dynamo.reset()
    if way == "on the device":
        options["device"] = "cpu"
    compiled: Callable[..., Any] = torch.compile(model, backend="superpipeline", options=options)
    return compiled


def bytes_moved(model: nn.Module) -> int:
    """Since the graphs that live were compiled; 0 before the first call."""
    store = find_store(model.parameters())
    return sum(runtime.bytes_moved for runtime in store.runtimes()) if store is not None else 0


def start(layout: Layout, way: str, **options: Any) -> Trainee:
    model = build(layout)
    return Trainee(model, compile_as(way, model, **options))


def train(recipe: Recipe, trainee: Trainee, *, streams: bool) -> Seen:
    """What is seen of one recipe; the model starts from its first weights, whatever was done with it before."""
    layout, model = trainee.model.layout, trainee.model
    model.load_state_dict(build(layout).state_dict())
    model.zero_grad()
    trainee.seen = []
    before = bytes_moved(model)
    torch.manual_seed(0)
    recipe(trainee)
    assert (bytes_moved(model) > before) == streams
    return trainee.seen


def train_alone(recipe: Recipe, layout: Layout, way: str, **options: Any) -> Seen:
    """What is seen of one recipe on a model of its own."""
    options = {**STREAMED, **options}
    return train(recipe, start(layout, way, **options), streams=options["k"] != RESIDENT["k"])


def train_plain(recipe: Recipe, layout: Layout) -> Seen:
    model = build(layout)
    return train(recipe, Trainee(model, model), streams=False)


@functools.lru_cache(maxsize=1)
def resident(recipe: Recipe, layout: Layout, **options: Any) -> Seen:
    """The reference, once for all the ways, whose tests follow each other."""
    return train_alone(recipe, layout, "on the device", **RESIDENT, **options)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in every bit, NaN included."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (each.contiguous().flatten().view(torch.uint8) for each in (one, other))
    return torch.equal(first, second)


def assert_same(actual: Seen, expected: Seen) -> None:
    assert [name for name, _ in actual] == [name for name, _ in expected]
    for place, ((name, mine), (_, other)) in enumerate(zip(actual, expected, strict=True)):
        message = f"{name}, the {place}th that was seen"
        assert (mine is None) == (other is None), message
        assert mine is None or other is None or same_bits(mine, other), message


def assert_close(actual: Seen, expected: Seen, tolerance: float) -> None:
    assert [name for name, _ in actual] == [name for name, _ in expected]
    for (name, mine), (_, other) in zip(actual, expected, strict=True):
        assert (mine is None) == (other is None), name
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


# Recipes.


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def plain_loop(
    trainee: Trainee, make: Callable[..., torch.optim.Optimizer] = sgd, n_iterations: int = 4, first: int = 0
) -> None:
    optimizer = make(trainee.parameters)
    for seed in range(first, n_iterations):
        trainee.iterate(optimizer, tokens(seed))


def with_optimizer(kind: type[torch.optim.Optimizer], **options: Any) -> Recipe:
    return functools.partial(plain_loop, make=functools.partial(kind, **options))


def with_parameter_groups(trainee: Trainee) -> None:
    """Decay for matrices only, and a learning rate of its own for the head; frozen for good: the embedding."""
    named = trainee.named
    head = [each for name, each in named.items() if name.startswith("head")]
    layers = [each for name, each in named.items() if name.startswith("layers")]
    groups: list[dict[str, Any]] = [
        {"params": head, "lr": 0.3},
        {"params": [each for each in layers if each.dim() > 1], "weight_decay": 0.1},
        {"params": [each for each in layers if each.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for seed in range(3):
        trainee.iterate(optimizer, tokens(seed))
        trainee.model.zero_grad()  # the embedding has no group


def with_a_scheduler(trainee: Trainee) -> None:
    optimizer = torch.optim.AdamW(trainee.parameters, lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
    for seed in range(4):
        trainee.iterate(optimizer, tokens(seed))
        scheduler.step()
        trainee.see("learning rate", torch.tensor(scheduler.get_last_lr()))


def with_accumulation(trainee: Trainee, rows: Sequence[int] = (3, 3, 3)) -> None:
    optimizer = sgd(trainee.parameters)
    for iteration in range(3):
        held: list[Tensor | None] = []
        for index, count in enumerate(rows):
            trainee.forward_backward(tokens(10 * iteration + index, count))
            trainee.see_gradients()
            gradients = [each.grad for each in trainee.parameters]
            assert not held or all(one is other for one, other in zip(gradients, held, strict=True))
            held = gradients
        optimizer.step()
        optimizer.zero_grad()
        trainee.see_weights()


def with_clipping(trainee: Trainee) -> None:
    optimizer = sgd(trainee.parameters)
    for seed in range(3):
        trainee.forward_backward(tokens(seed))
        trainee.see("norm", clip_grad_norm_(trainee.parameters, 0.1))
        trainee.see_gradients()
        optimizer.step()
        optimizer.zero_grad()
        trainee.see_weights()


def with_zero_grad(trainee: Trainee, owner: str, set_to_none: bool) -> None:
    optimizer = sgd(trainee.parameters)
    for seed in range(3):
        trainee.forward_backward(tokens(seed))
        trainee.see_gradients()
        optimizer.step()
        (optimizer if owner == "optimizer" else trainee.model).zero_grad(set_to_none=set_to_none)
        trainee.see_gradients()
        trainee.see_weights()


def with_flips(trainee: Trainee) -> None:
    """A layer is frozen after the first iteration, thawed, and then all but the head are frozen."""
    optimizer = sgd(trainee.parameters)
    for seed, frozen in enumerate(((), ("layers.1",), (), ("layers", "embed"), ())):
        for name, parameter in trainee.model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        trainee.iterate(optimizer, tokens(seed))


def with_autocast_around(trainee: Trainee, backward_inside: bool = False) -> None:
    optimizer = sgd(trainee.parameters)
    for seed in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = trainee.call(tokens(seed)).loss
            if backward_inside:
                loss.backward()
        trainee.see("loss", loss)
        if not backward_inside:
            loss.backward()
        trainee.see_gradients()
        optimizer.step()
        optimizer.zero_grad()
        trainee.see_weights()


def with_grad_scaler(trainee: Trainee) -> None:
    """The second iteration overflows: its step is skipped, and the scale falls."""
    optimizer = sgd(trainee.parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for seed in range(4):
        before = [each.detach().clone() for each in trainee.parameters]
        loss = trainee.call(tokens(seed)).loss * (torch.inf if seed == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        trainee.see_gradients()
        trainee.see("norm", clip_grad_norm_(trainee.parameters, 1.0))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        trainee.see("scale", torch.tensor(scaler.get_scale()))
        trainee.see_weights()
        same = [torch.equal(*each) for each in zip(before, trainee.parameters, strict=True)]
        assert all(same) == (seed == 1)


def with_evaluation(trainee: Trainee, mode: bool = False) -> None:
    """Between forward and backward, and between iterations; there in ``eval()``, if asked for."""
    optimizer = sgd(trainee.parameters)
    for seed in range(3):
        loss = trainee.call(tokens(seed)).loss
        if not mode:  # batch norm in evaluation between forward and backward would be another program
            trainee.evaluate(tokens(seed + 10))
        loss.backward()
        trainee.see_gradients()
        trainee.evaluate(tokens(seed + 20))
        optimizer.step()
        optimizer.zero_grad()
        trainee.model.train(not mode)
        trainee.evaluate(tokens(seed + 30))
        trainee.evaluate(tokens(seed + 31))
        trainee.model.train()
        trainee.see_weights()


def with_two_backwards(trainee: Trainee) -> None:
    """Of one graph that is kept."""
    optimizer = sgd(trainee.parameters)
    for seed in range(3):
        loss = trainee.call(tokens(seed)).loss
        loss.backward(retain_graph=True)
        trainee.see_gradients()
        loss.backward()
        trainee.see_gradients()
        optimizer.step()
        optimizer.zero_grad()
        trainee.see_weights()


def with_two_losses(trainee: Trainee) -> None:
    """A backward for each of two outputs of one call."""
    optimizer = sgd(trainee.parameters)
    for seed in range(3):
        output = trainee.call(tokens(seed))
        output.loss.backward(retain_graph=True)
        trainee.see_gradients()
        output.hidden.square().mean().backward()
        trainee.see_gradients()
        optimizer.step()
        optimizer.zero_grad()
        trainee.see_weights()


def with_two_forwards(trainee: Trainee, reverse: bool) -> None:
    """Both before their backwards."""
    optimizer = sgd(trainee.parameters)
    for seed in range(3):
        losses = [trainee.call(tokens(10 * seed + index)).loss for index in range(2)]
        for loss in reversed(losses) if reverse else losses:
            trainee.see("loss", loss)
            loss.backward()
            trainee.see_gradients()
        optimizer.step()
        optimizer.zero_grad()
        trainee.see_weights()


def with_one_sum(trainee: Trainee) -> None:
    """Two calls in one loss, the second of them on what the first has made."""
    optimizer = sgd(trainee.parameters)
    for seed in range(3):
        first = trainee.call(activations(seed))
        second = trainee.call(first.hidden)
        loss = first.loss + second.loss
        trainee.see("loss", loss)
        loss.backward()
        trainee.see_gradients()
        optimizer.step()
        optimizer.zero_grad()
        trainee.see_weights()


def with_a_gradient_of_outputs(trainee: Trainee) -> None:
    """No loss, but a gradient for an output; another output gets none."""
    optimizer = sgd(trainee.parameters)
    for seed in range(3):
        logits = trainee.call(tokens(seed)).logits
        logits.backward(torch.linspace(-1, 1, logits.numel()).view_as(logits))
        trainee.see_gradients()
        optimizer.step()
        optimizer.zero_grad()
        trainee.see_weights()


def with_gradients_of_inputs(trainee: Trainee) -> None:
    trained = [each for each in trainee.parameters if each.requires_grad]
    optimizer = sgd(trained) if trained else None
    for seed in range(3):
        x = activations(seed).requires_grad_()
        trainee.forward_backward(x)
        trainee.see("gradient of the input", x.grad)
        assert x.grad is not None
        trainee.see_gradients()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        trainee.see_weights()


def with_autograd_grad(trainee: Trainee) -> None:
    """Of all weights, then of some: nothing lands in ``.grad``."""
    used = [each for name, each in trainee.model.named_parameters() if not name.startswith("unused")]
    for seed in range(4):
        chosen = used if seed % 2 else used[3:6]
        gradients = torch.autograd.grad(trainee.call(tokens(seed)).loss, chosen)
        with torch.no_grad():
            for parameter, gradient in zip(chosen, gradients, strict=True):
                trainee.see("gradient", gradient)
                parameter.sub_(gradient, alpha=0.1)
        assert all(each.grad is None for each in trainee.parameters)
        trainee.see_weights()


def with_chosen_inputs(trainee: Trainee) -> None:
    """``backward(inputs=...)`` fills the gradients of the parameters that it names, and no others."""
    chosen = {name: each for name, each in trainee.model.named_parameters() if name.startswith(("layers.1", "head"))}
    optimizer = sgd(trainee.parameters)
    for seed in range(3):
        trainee.call(tokens(seed)).loss.backward(inputs=list(chosen.values()))
        got = {name for name, each in trainee.model.named_parameters() if each.grad is not None}
        assert got == chosen.keys()
        trainee.see_gradients()
        optimizer.step()
        optimizer.zero_grad()
        trainee.see_weights()


def with_hooks(trainee: Trainee) -> None:
    """One hook halves a gradient before it is accumulated, one sees another gradient and changes nothing."""
    named = dict(trainee.model.named_parameters())
    handles = [
        named["layers.1.up.weight"].register_hook(lambda gradient: gradient / 2),  # type: ignore[no-untyped-call]
        named["head.bias"].register_hook(lambda gradient: trainee.see("seen by a hook", gradient)),  # type: ignore[no-untyped-call]
    ]
    optimizer = sgd(trainee.parameters)
    for seed in range(3):
        trainee.iterate(optimizer, tokens(seed))
    for handle in handles:
        handle.remove()
    trainee.iterate(optimizer, tokens(3))


def with_steps_in_hooks(trainee: Trainee) -> None:
    """The optimizer runs in backward: an own one for each parameter, whose gradient is gone afterwards."""
    optimizers = {each: sgd([each]) for each in trainee.parameters}

    def step(parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        optimizers[parameter].step()
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(step) for parameter in trainee.parameters]  # type: ignore[no-untyped-call]
    for seed in range(3):
        trainee.forward_backward(tokens(seed))
        assert all(each.grad is None for each in trainee.parameters)
        trainee.see_weights()
    for handle in handles:
        handle.remove()


def with_held_gradients(trainee: Trainee) -> None:
    """Gradients that somebody goes on holding are theirs, once ``.grad`` was set to None."""
    optimizer = sgd(trainee.parameters)
    held: list[tuple[Tensor, Tensor]] = []
    for seed in range(3):
        trainee.forward_backward(tokens(seed))
        gradients = [each.grad for each in trainee.parameters if each.grad is not None]
        held += [(gradient, gradient.clone()) for gradient in gradients]
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(*each) for each in held)
    for gradient, _ in held:
        trainee.see("held", gradient)
    trainee.see_weights()


def with_gradients_of_ones_own(trainee: Trainee) -> None:
    """What the user puts into ``.grad`` is accumulated into; so is what was edited in place; the others start anew."""
    optimizer = sgd(trainee.parameters)
    for seed in range(3):
        own = {}
        for parameter in trainee.parameters[::2]:
            own[parameter] = parameter.grad = torch.full_like(parameter, 0.25)
        trainee.forward_backward(tokens(seed))
        for parameter in trainee.parameters[1::2]:
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
        trainee.see_gradients()
        trainee.forward_backward(tokens(seed + 10))
        trainee.see_gradients()
        assert all(parameter.grad is gradient for parameter, gradient in own.items())
        optimizer.step()
        optimizer.zero_grad()
        trainee.see_weights()


def with_forwards_for_nothing(trainee: Trainee) -> None:
    """Calls with gradients whose backward never comes, held for a while or not at all."""
    optimizer = sgd(trainee.parameters)
    kept = []
    for seed in range(3):
        kept.append(trainee.call(tokens(seed + 10)))
        trainee.call(tokens(seed + 20))
        trainee.iterate(optimizer, tokens(seed))
    trainee.see("kept", kept[0].loss)


@dataclass(frozen=True)
class Case:
    """A recipe and the model that it is for.

    Attributes:
        recipe: what is done.
        layout: of the model.
        alone: on a model of its own, as the recipe needs graphs that others do not. All other recipes of a layout are
            run one after the other on one model, each from the same weights on, as compiling takes most of the time.
        tolerance: against plain eager, which is left out where this is None.
        options: of the backend.
    """

    recipe: Recipe
    layout: Layout = Layout()
    alone: bool = False
    tolerance: float | None = 1e-4
    options: tuple[tuple[str, Any], ...] = ()


CASES: dict[str, Case] = {
    # Optimizers.
    "SGD with momentum": Case(plain_loop),
    "SGD, fused": Case(with_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)),
    "AdamW": Case(with_optimizer(torch.optim.AdamW, lr=0.01, foreach=False), tolerance=1e-2),
    "AdamW, foreach": Case(with_optimizer(torch.optim.AdamW, lr=0.01, foreach=True), tolerance=1e-2),
    "AdamW, fused": Case(with_optimizer(torch.optim.AdamW, lr=0.01, fused=True), tolerance=1e-2),
    "a scheduler": Case(with_a_scheduler, tolerance=1e-1),
    "parameter groups": Case(with_parameter_groups, tolerance=1e-2),
    # Between backward and step.
    "accumulation": Case(with_accumulation),
    "accumulation, different shapes": Case(functools.partial(with_accumulation, rows=(3, 5, 2)), alone=True),
    "clipping": Case(with_clipping),
    "optimizer.zero_grad()": Case(functools.partial(with_zero_grad, owner="optimizer", set_to_none=True)),
    "optimizer.zero_grad(False)": Case(functools.partial(with_zero_grad, owner="optimizer", set_to_none=False)),
    "model.zero_grad()": Case(functools.partial(with_zero_grad, owner="model", set_to_none=True)),
    "model.zero_grad(False)": Case(functools.partial(with_zero_grad, owner="model", set_to_none=False)),
    "hooks": Case(with_hooks),
    "steps in hooks": Case(with_steps_in_hooks),
    "held gradients": Case(with_held_gradients),
    "gradients of one's own": Case(with_gradients_of_ones_own),
    # What is trained.
    "a frozen layer": Case(plain_loop, Layout(trained=r"^(?!layers\.1)")),
    "frozen first layers": Case(plain_loop, Layout(trained=r"^(layers\.2|head)")),
    "all but the head frozen": Case(plain_loop, Layout(trained="^head")),
    "matrices frozen": Case(plain_loop, Layout(trained="(bias|norm)")),
    "adapters": Case(plain_loop, Layout(adapters=True, trained="adapter")),
    "flips of requires_grad": Case(with_flips, alone=True),
    "tied weights": Case(plain_loop, Layout(tied=True)),
    "tied weights, accumulation": Case(with_accumulation, Layout(tied=True)),
    "tied weights, frozen layers": Case(plain_loop, Layout(tied=True, trained="embed")),
    # Precision.
    "bf16 weights": Case(plain_loop, Layout(dtype=torch.bfloat16), tolerance=None),
    "autocast inside": Case(plain_loop, Layout(autocast=True), tolerance=None),
    "autocast around": Case(with_autocast_around, tolerance=None),
    "autocast around both": Case(functools.partial(with_autocast_around, backward_inside=True), tolerance=None),
    "GradScaler": Case(with_grad_scaler, tolerance=None),
    "GradScaler, autocast": Case(with_grad_scaler, Layout(autocast=True), tolerance=None),
    # Modules with a state.
    "dropout": Case(plain_loop, Layout(dropout=0.3), tolerance=None),
    "dropout, accumulation": Case(with_accumulation, Layout(dropout=0.3), tolerance=None),
    "batch norm": Case(functools.partial(with_evaluation, mode=True), Layout(batch_norm=True), tolerance=1e-3),
    "evaluation": Case(with_evaluation),
    "evaluation with dropout off": Case(
        functools.partial(with_evaluation, mode=True), Layout(dropout=0.3), tolerance=None
    ),
    # Shapes of graphs.
    "checkpointed layers": Case(plain_loop, Layout(checkpointed=True)),
    "checkpointed layers with dropout": Case(plain_loop, Layout(checkpointed=True, dropout=0.3), tolerance=None),
    "graph breaks": Case(plain_loop, Layout(breaks="around")),
    "graph breaks, accumulation": Case(with_accumulation, Layout(breaks="around")),
    "a graph for each layer": Case(plain_loop, Layout(breaks="between"), alone=True, options=(("k", 4),)),
    # Ways to call backward.
    "two backwards": Case(with_two_backwards, alone=True),
    "two losses": Case(with_two_losses, alone=True),
    "two forwards, then backwards": Case(functools.partial(with_two_forwards, reverse=False)),
    "two forwards, then backwards, reversed": Case(functools.partial(with_two_forwards, reverse=True)),
    "two calls in one loss": Case(with_one_sum, tolerance=1e-3, alone=True),
    "a gradient of outputs": Case(with_a_gradient_of_outputs, tolerance=None, alone=True),
    "gradients of inputs": Case(with_gradients_of_inputs, alone=True),
    "gradients of inputs alone": Case(with_gradients_of_inputs, Layout(trained="(?!)")),
    "autograd.grad": Case(with_autograd_grad),
    "backward(inputs=...)": Case(with_chosen_inputs),
    "forwards for nothing": Case(with_forwards_for_nothing),
    # Compiled segments.
    "Inductor": Case(plain_loop, alone=True, options=(("compiler", "inductor"),)),
    "eager": Case(plain_loop, alone=True, options=(("compiler", "eager"),)),
}


TOGETHER = {
    layout: [name for name, case in CASES.items() if case.layout == layout and not case.alone]
    for layout in dict.fromkeys(case.layout for case in CASES.values())
}
"""The cases that one model serves, by its layout."""


@functools.lru_cache(maxsize=1)
def started(layout: Layout, way: str) -> Trainee:
    """The model of a layout, streamed."""
    return start(layout, way, **STREAMED)


@functools.lru_cache(maxsize=1)
def references(layout: Layout) -> dict[str, Seen]:
    """What is seen of all the cases of a layout with every page resident."""
    trainee = start(layout, "on the device", **RESIDENT)
    return {name: train(CASES[name].recipe, trainee, streams=False) for name in TOGETHER[layout]}


def assert_close_to_plain(case: Case, seen: Seen) -> None:
    if case.tolerance is not None:
        assert_close(seen, train_plain(case.recipe, case.layout), case.tolerance)


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for names in TOGETHER.values() for way in WAYS for name in names]
)
def test_training_is_exact(name: str, way: str) -> None:
    case = CASES[name]
    expected = references(case.layout)[name]
    seen = train(case.recipe, started(case.layout, way), streams=True)
    assert_same(seen, expected)
    assert_close_to_plain(case, seen)


@EVERY_WAY
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.alone])
def test_training_alone_is_exact(name: str, way: str) -> None:
    case = CASES[name]
    options = dict(case.options)
    expected = resident(case.recipe, case.layout, compiler=options.get("compiler", "aot_eager"))
    seen = train_alone(case.recipe, case.layout, way, **options)
    assert_same(seen, expected)
    assert_close_to_plain(case, seen)


# Exceptions.


def interrupted_loop(trainee: Trainee, interrupt: Callable[[Trainee, Tensor], None]) -> None:
    """`plain_loop`, whose second iteration goes wrong and is done again."""
    optimizer = sgd(trainee.parameters)
    for seed in range(4):
        if seed == 1:
            before = {name: value.clone() for name, value in trainee.model.state_dict().items()}
            interrupt(trainee, tokens(seed))
            assert all(torch.equal(before[name], value) for name, value in trainee.model.state_dict().items())
            optimizer.zero_grad()
        trainee.iterate(optimizer, tokens(seed))


class TroubleError(Exception):
    """What goes wrong."""


def in_a_segment(phase: str, passes: int, error: BaseException) -> Callable[[Trainee, Tensor], None]:
    def interrupt(trainee: Trainee, x: Tensor) -> None:
        FUSE.light(phase, passes, error)
        with pytest.raises(type(error)):
            trainee.call(x).loss.backward()
        assert FUSE.error is None

    return interrupt


def raise_trouble(_: Tensor) -> None:
    raise TroubleError


def behind_the_model(trainee: Trainee, x: Tensor) -> None:
    """Before backward comes to the model."""
    loss = trainee.call(x).logits.square().sum() * 1
    loss.register_hook(raise_trouble)
    with pytest.raises(TroubleError):
        loss.backward()


def before_the_model(trainee: Trainee, _: Tensor) -> None:
    """After the model's backward, some of whose gradients have landed."""
    x = activations(0).requires_grad_()
    loss = trainee.call(x * 1).loss
    x.register_hook(raise_trouble)  # type: ignore[no-untyped-call]
    with pytest.raises(TroubleError):
        loss.backward()


def in_a_hook_of_a_weight(trainee: Trainee, x: Tensor) -> None:
    handle = dict(trainee.model.named_parameters())["layers.1.up.weight"].register_hook(raise_trouble)  # type: ignore[no-untyped-call]
    with pytest.raises(TroubleError):
        trainee.call(x).loss.backward()
    handle.remove()


def after_a_retry(trainee: Trainee, x: Tensor) -> None:
    """The same graph is gone through once more, after it failed."""
    loss = trainee.call(x).loss
    FUSE.light("backward", 2, TroubleError())
    with pytest.raises(TroubleError):
        loss.backward(retain_graph=True)
    loss.backward()


INTERRUPTS: dict[str, Callable[[Trainee, Tensor], None]] = {
    "first layer, forward": in_a_segment("forward", 1, TroubleError()),
    "last layer, forward": in_a_segment("forward", N_LAYERS, TroubleError()),
    "last layer, backward": in_a_segment("backward", 1, TroubleError()),
    "middle layer, backward": in_a_segment("backward", 2, TroubleError()),
    "first layer, backward": in_a_segment("backward", N_LAYERS, TroubleError()),
    "KeyboardInterrupt, forward": in_a_segment("forward", 2, KeyboardInterrupt()),
    "KeyboardInterrupt, backward": in_a_segment("backward", 2, KeyboardInterrupt()),
    "behind the model": behind_the_model,
    "before the model": before_the_model,
    "a hook of a weight": in_a_hook_of_a_weight,
}


@pytest.mark.parametrize(("name", "way"), [(name, way) for way in WAYS for name in INTERRUPTS])
def test_after_an_exception_training_goes_on(name: str, way: str) -> None:
    layout = Layout(fragile=True)
    recipe = functools.partial(interrupted_loop, interrupt=INTERRUPTS[name])
    assert_same(train(recipe, started(layout, way), streams=True), resident(plain_loop, layout))


@EVERY_WAY
def test_after_an_exception_backward_is_called_again(way: str) -> None:
    """On the same graph. torch itself refuses that where buffers are donated."""
    layout = Layout(fragile=True)
    recipe = functools.partial(interrupted_loop, interrupt=after_a_retry)
    with torch._functorch.config.patch(donated_buffer=False):
        assert_same(train_alone(recipe, layout, way), resident(plain_loop, layout))


# Checkpoints.


def save(trainee: Trainee, optimizer: torch.optim.Optimizer) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": trainee.model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    return buffer.getvalue()


def load(trainee: Trainee, optimizer: torch.optim.Optimizer, saved: bytes) -> None:
    found = torch.load(io.BytesIO(saved))
    trainee.model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def whole_curve(trainee: Trainee) -> None:
    plain_loop(trainee, adamw)


def first_half(trainee: Trainee, saved: list[bytes]) -> None:
    optimizer = adamw(trainee.parameters)
    for seed in range(2):
        trainee.iterate(optimizer, tokens(seed))
    saved.append(save(trainee, optimizer))


def second_half(trainee: Trainee, saved: list[bytes], warm: bool) -> None:
    """``warm``: the checkpoint is loaded into a model that has trained on something else before."""
    optimizer = adamw(trainee.parameters)
    if warm:
        for seed in range(10, 12):
            trainee.iterate(optimizer, tokens(seed))
        trainee.seen.clear()
    load(trainee, optimizer, saved[0])
    for seed in range(2, 4):
        trainee.iterate(optimizer, tokens(seed))


@pytest.mark.parametrize(
    ("source", "target", "warm"),
    [
        ("offloaded", "offloaded", True),
        ("offloaded", "on the CPU", False),
        ("on the device", "offloaded", False),
        ("on the CPU", "on the device", True),
        ("on the CPU", "on the CPU", True),
    ],
)
def test_resuming_from_a_checkpoint(source: str, target: str, warm: bool) -> None:
    layout, saved = Layout(), list[bytes]()
    before = train_alone(functools.partial(first_half, saved=saved), layout, source)
    after = train_alone(functools.partial(second_half, saved=saved, warm=warm), layout, target)
    assert_same([*before, *after], resident(whole_curve, layout))


@EVERY_WAY
def test_resuming_in_plain_eager_and_back(way: str) -> None:
    layout, saved, plain_saved = Layout(), list[bytes](), list[bytes]()
    trainee = start(layout, way, **STREAMED)
    train(functools.partial(first_half, saved=saved), trainee, streams=True)
    train_plain(functools.partial(first_half, saved=plain_saved), layout)
    assert len(saved[0]) < 1.2 * len(plain_saved[0]), "no page is saved whole for each of its weights"
    expected = resident(whole_curve, layout)
    in_plain = train_plain(functools.partial(second_half, saved=saved, warm=False), layout)
    assert_close(in_plain, expected[len(expected) // 2 :], 1e-2)
    back = train(functools.partial(second_half, saved=plain_saved, warm=False), trainee, streams=True)
    assert_close(back, expected[len(expected) // 2 :], 1e-2)
