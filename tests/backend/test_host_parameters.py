"""Optimizers over ``spcompile.host_parameters``: the CPU's own view of the weights, and of their gradients.

Training with them is bit for bit that with the model's own parameters and every page resident. Most tests take the
recipes of ``test_training.py`` and give their optimizers the host's parameters instead.

That no weight is kept twice is seen by addresses.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spcompile
from spcompile import host_parameters
from spcompile.runtime.store import find_store
from tests.backend.test_training import (
    CASES,
    EVERY_WAY,
    INTERRUPTS,
    RESIDENT,
    STREAMED,
    WAYS,
    Layout,
    Recipe,
    Seen,
    Stack,
    Trainee,
    adamw,
    assert_close,
    assert_same,
    build,
    compile_as,
    first_half,
    interrupted_loop,
    plain_loop,
    references,
    resident,
    second_half,
    sgd,
    tokens,
    train,
    train_alone,
    train_plain,
    whole_curve,
)
from tests.backend.test_training import TOGETHER as ALL_TOGETHER


@dataclass
class HostTrainee(Trainee):
    """Its optimizers are given the host's parameters."""

    @property
    def named(self) -> dict[str, nn.Parameter]:
        names = [name for name, _ in self.model.named_parameters()]
        return dict(zip(names, host_parameters(self.model), strict=True))


def start(layout: Layout, way: str, **options: Any) -> HostTrainee:
    model = build(layout)
    return HostTrainee(model, compile_as(way, model, **{**STREAMED, **options}))


def train_on_host(recipe: Recipe, layout: Layout, way: str) -> Seen:
    return train(recipe, start(layout, way), streams=True)


# What they are.


@EVERY_WAY
def test_one_for_each_parameter(way: str) -> None:
    """In the same order, tied weights once, and always the same objects."""
    trainee = start(Layout(tied=True), way)
    found = host_parameters(trainee.model)
    for _ in range(2):
        own = list(trainee.model.parameters())
        assert len(found) == len(own)
        for one, other in zip(found, own, strict=True):
            assert isinstance(one, nn.Parameter)
            assert one.is_leaf
            assert one.device.type == "cpu"
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
            assert one.requires_grad == other.requires_grad
            assert torch.equal(one, other)
        plain_loop(trainee, n_iterations=2)
        assert all(one is other for one, other in zip(host_parameters(trainee.model), found, strict=True))


@EVERY_WAY
def test_parts_of_a_model(way: str) -> None:
    """Of a module within it, and of a list and an iterator of parameters."""
    model = start(Layout(), way).model
    whole = dict(zip((name for name, _ in model.named_parameters()), host_parameters(model), strict=True))
    layer = model.layers[1]
    expected = [each for name, each in whole.items() if name.startswith("layers.1.")]
    for part in (layer, list(layer.parameters()), layer.parameters()):
        found = host_parameters(part)
        assert len(found) == len(expected)
        assert all(one is other for one, other in zip(found, expected, strict=True))
    (bias,) = host_parameters([model.head.bias])
    assert bias is whole["head.bias"]


def test_of_a_model_on_the_cpu_they_are_its_own() -> None:
    trainee = start(Layout(), "on the CPU")
    for _ in range(2):
        found = host_parameters(trainee.model)
        assert all(one is other for one, other in zip(found, trainee.model.parameters(), strict=True))
        plain_loop(trainee, n_iterations=1)


@EVERY_WAY
def test_no_weight_is_kept_twice(way: str) -> None:
    """Where every page is streamed, a parameter and its host's parameter are the same bytes, before and after steps."""
    trainee = start(Layout(), way)
    plain_loop(trainee, n_iterations=1)
    for _ in range(2):
        assert_same_bytes(trainee.model)
        plain_loop(trainee, n_iterations=1)
    assert_same_bytes(trainee.model)


def assert_same_bytes(model: nn.Module) -> None:
    store = find_store(model.parameters())
    assert store is not None
    streamed = {
        weight.name
        for runtime in store.runtimes()
        for each in runtime.plan.intervals
        for weight in runtime.plan.pages[each.page].weights
    }
    assert streamed
    for (name, own), other in zip(model.named_parameters(), host_parameters(model), strict=True):
        if name in streamed:
            assert own.data_ptr() == other.data_ptr(), name


@EVERY_WAY
def test_edits_are_seen_from_both_sides(way: str) -> None:
    trainee, plain = start(Layout(), way), build(Layout())
    trainee.evaluate(tokens(0))
    with torch.no_grad():
        for own, theirs in zip(host_parameters(trainee.model), plain.parameters(), strict=True):
            own.data.mul_(1.5)
            theirs.mul_(1.5)
        spcompile.refresh(trainee.model)
        assert_equal_weights(trainee.model, plain)
        torch.testing.assert_close(trainee.call(tokens(0)).loss, plain(tokens(0)).loss)
        for model in (trainee.model, plain):
            model.head.weight.add_(0.25)
        assert_equal_weights(trainee.model, plain)
        torch.testing.assert_close(trainee.call(tokens(0)).loss, plain(tokens(0)).loss)


def assert_equal_weights(model: nn.Module, plain: nn.Module) -> None:
    """The model's weights, seen in every way, are those of the plain one."""
    state = model.state_dict()
    for (name, own), other, host in zip(
        model.named_parameters(), plain.parameters(), host_parameters(model), strict=True
    ):
        assert torch.equal(own, other), name
        assert torch.equal(host, other), name
        assert torch.equal(state[name], other), name


# Training.

HOST_CASES = (
    "SGD with momentum",
    "SGD, fused",
    "AdamW, foreach",
    "AdamW, fused",
    "a scheduler",
    "parameter groups",
    "accumulation",
    "accumulation, different shapes",
    "clipping",
    "optimizer.zero_grad()",
    "optimizer.zero_grad(False)",
    "model.zero_grad(False)",
    "a frozen layer",
    "all but the head frozen",
    "adapters",
    "tied weights",
    "tied weights, accumulation",
    "bf16 weights",
    "autocast around",
    "GradScaler",
    "dropout",
    "batch norm",
    "evaluation",
    "checkpointed layers",
    "graph breaks",
    "two backwards",
    "two losses",
    "two forwards, then backwards",
    "two calls in one loss",
)
"""Of the cases of ``test_training.py``; those that are left out look at what autograd does with own parameters."""


@functools.lru_cache(maxsize=1)
def started(layout: Layout, way: str) -> HostTrainee:
    """One model for all that is done with it in one way: compiling takes most of the time."""
    return start(layout, way)


TOGETHER = [name for names in ALL_TOGETHER.values() for name in names if name in HOST_CASES]


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for layout in ALL_TOGETHER for way in WAYS for name in TOGETHER if CASES[name].layout == layout],
)
def test_training_is_exact(name: str, way: str) -> None:
    case = CASES[name]
    expected = references(case.layout)[name]
    assert_same(train(case.recipe, started(case.layout, way), streams=True), expected)


@EVERY_WAY
@pytest.mark.parametrize("name", [name for name in HOST_CASES if name not in TOGETHER])
def test_training_alone_is_exact(name: str, way: str) -> None:
    case = CASES[name]
    assert_same(train_on_host(case.recipe, case.layout, way), resident(case.recipe, case.layout))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (name, way)
        for way in WAYS
        for name in ("middle layer, backward", "KeyboardInterrupt, backward", "a hook of a weight")
    ],
)
def test_after_an_exception_training_goes_on(name: str, way: str) -> None:
    layout = Layout(fragile=True)
    recipe = functools.partial(interrupted_loop, interrupt=INTERRUPTS[name])
    assert_same(train(recipe, started(layout, way), streams=True), resident(plain_loop, layout))


def parameters_for(trainee: Trainee, what: Any) -> list[nn.Parameter]:
    """What an optimizer is given of a part of the model."""
    if isinstance(trainee, HostTrainee):
        return host_parameters(what)
    return list(what.parameters()) if isinstance(what, nn.Module) else list(what)


def with_groups_of_parts(trainee: Trainee) -> None:
    """Learning rates of their own for modules and for lists of parameters."""
    model = trainee.model
    groups = [
        {"params": parameters_for(trainee, model.embed), "lr": 0.3},
        {"params": parameters_for(trainee, model.layers), "weight_decay": 0.1},
        {"params": parameters_for(trainee, [model.head.weight, model.head.bias]), "lr": 0.01},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for seed in range(3):
        trainee.iterate(optimizer, tokens(seed))


def with_an_optimizer_for_each_half(trainee: Trainee) -> None:
    """One over what the host has of the layers, one over the model's own embedding and head."""
    layers = [each for name, each in trainee.named.items() if name.startswith("layers")]
    others = [each for name, each in trainee.model.named_parameters() if not name.startswith("layers")]
    optimizers = [sgd(layers), sgd(others)]
    for seed in range(3):
        trainee.forward_backward(tokens(seed))
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        trainee.see_weights()


def with_zero_grad(trainee: Trainee, owners: tuple[str, ...], set_to_none: bool) -> None:
    """Of the optimizer or of the model, in turns: either clears what both have. What is set to None on one side only is
    still seen on the other one until the next backward."""
    optimizer = sgd(trainee.parameters)
    for seed in range(4):
        trainee.forward_backward(tokens(seed))
        trainee.see_gradients()
        optimizer.step()
        owner = owners[seed % len(owners)]
        (optimizer if owner == "optimizer" else trainee.model).zero_grad(set_to_none=set_to_none)
        cleared = trainee.parameters if owner == "optimizer" else list(trainee.model.parameters())
        for parameter in cleared if set_to_none else (*cleared, *trainee.parameters):
            assert parameter.grad is None or (not set_to_none and not parameter.grad.any())
        trainee.see_weights()


RECIPES: dict[str, Recipe] = {
    "groups of parts": with_groups_of_parts,
    "an optimizer for each half": with_an_optimizer_for_each_half,
    **{
        f"zero_grad({set_to_none}) of {' and '.join(owners)}": functools.partial(
            with_zero_grad, owners=owners, set_to_none=set_to_none
        )
        for set_to_none in (True, False)
        for owners in (("optimizer",), ("model",), ("optimizer", "model"))
    },
}


@functools.lru_cache(maxsize=1)
def own_references() -> dict[str, Seen]:
    model = build(Layout())
    trainee = Trainee(model, compile_as("on the device", model, **RESIDENT))
    return {name: train(recipe, trainee, streams=False) for name, recipe in RECIPES.items()}


@pytest.mark.parametrize(("name", "way"), [(name, way) for way in WAYS for name in RECIPES])
def test_recipes_are_exact(name: str, way: str) -> None:
    expected = own_references()[name]
    assert_same(train(RECIPES[name], started(Layout(), way), streams=True), expected)


@EVERY_WAY
def test_frozen_parameters_have_no_gradient(way: str) -> None:
    trainee = start(Layout(trained="^head"), way)
    trainee.forward_backward(tokens(0))
    assert {name for name, each in trainee.named.items() if each.grad is not None} == {"head.weight", "head.bias"}


@EVERY_WAY
def test_an_optimizer_over_the_models_own_parameters_still_trains(way: str) -> None:
    """Even where somebody has asked for the host's parameters."""
    model = build(Layout())
    trainee = Trainee(model, compile_as(way, model, **STREAMED))
    host_parameters(model)
    assert_same(train(plain_loop, trainee, streams=True), resident(plain_loop, Layout()))
    assert_equal_weights(model, copy.deepcopy(model))


# Checkpoints.


@EVERY_WAY
def test_state_of_an_optimizer_goes_to_an_ordinary_one_and_back(way: str) -> None:
    layout, saved, plain_saved = Layout(), list[bytes](), list[bytes]()
    expected = resident(whole_curve, layout)
    later = expected[len(expected) // 2 :]
    trainee = start(layout, way)
    assert_same(train(functools.partial(first_half, saved=saved), trainee, streams=True), expected[: len(later)])
    ordinary = train_alone(functools.partial(second_half, saved=saved, warm=False), layout, way, **RESIDENT)
    assert_same(ordinary, later)
    assert_close(train_plain(functools.partial(second_half, saved=saved, warm=False), layout), later, 1e-2)
    again = start(layout, way)
    assert_same(train(functools.partial(second_half, saved=saved, warm=True), again, streams=True), later)
    train_plain(functools.partial(first_half, saved=plain_saved), layout)
    back = train(functools.partial(second_half, saved=plain_saved, warm=False), start(layout, way), streams=True)
    assert_close(back, later, 1e-2)


@EVERY_WAY
def test_a_saved_optimizer_holds_no_page(way: str) -> None:
    """Its file is as large as an ordinary optimizer's."""
    trainee, plain = start(Layout(), way), build(Layout())
    sizes = []
    for each in (trainee, Trainee(plain, plain)):
        optimizer = adamw(each.parameters)
        each.iterate(optimizer, tokens(0))
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        sizes.append(len(buffer.getvalue()))
    assert abs(sizes[0] - sizes[1]) < sizes[1] / 10


# Residents.


def start_with_little(layout: Layout, way: str) -> HostTrainee:
    """With a budget that keeps some of the weights on the device."""

    def planned(**options: Any) -> spcompile.Plan:
        torch._dynamo.reset()
        plan: spcompile.Plan = spcompile.plan(
            build(layout), (tokens(0),), device="cpu", compiler="aot_eager", **options
        )
        return plan

    most = planned(k=1000)
    budgets = (most.peak_bytes() - most.weights_bytes * part // 20 for part in range(20))
    budget = next(each for each in budgets if (plan := planned(budget=each)).residents and plan.intervals)
    return start(layout, way, k=None, m=None, budget=budget)


@EVERY_WAY
def test_with_residents(way: str) -> None:
    """Their copies on the device are renewed after each step."""
    layout = Layout()
    trainee = start_with_little(layout, way)
    assert_same(train(whole_curve, trainee, streams=True), resident(whole_curve, layout))
    store = find_store(trainee.model.parameters())
    assert store is not None
    plans = [runtime.plan for runtime in store.runtimes()]
    assert any(plan.residents for plan in plans)
    assert any(plan.intervals for plan in plans)
    assert_equal_weights(trainee.model, copy.deepcopy(trainee.model))


# Masters in another precision.


@dataclass
class MasterTrainee(Trainee):
    """Its optimizer is given masters in fp32."""

    @property
    def named(self) -> dict[str, nn.Parameter]:
        names = [name for name, _ in self.model.named_parameters()]
        masters = host_parameters(self.model, master_dtype=torch.float32)
        return dict(zip(names, masters, strict=True))


def with_masters(trainee: Trainee) -> None:
    """The masters after each step, and the weights that the model has of them."""
    optimizer = adamw(trainee.parameters)
    for seed in range(4):
        trainee.forward_backward(tokens(seed))
        optimizer.step()
        for name, master in trainee.named.items():
            assert master.dtype == torch.float32
            trainee.see(f"master {name}", master)
        optimizer.zero_grad()
        assert all(each.grad is None for each in trainee.parameters)
        trainee.see_weights()


def with_classic_masters(trainee: Trainee) -> None:
    """The same by hand: a copy in fp32, gradients copied to it, and weights copied back."""
    own = dict(trainee.model.named_parameters())
    masters = {name: nn.Parameter(each.detach().float()) for name, each in own.items()}
    optimizer = adamw(list(masters.values()))
    for seed in range(4):
        trainee.forward_backward(tokens(seed))
        for name, master in masters.items():
            gradient = own[name].grad
            master.grad = None if gradient is None else gradient.float()
        optimizer.step()
        with torch.no_grad():
            for name, master in masters.items():
                own[name].copy_(master)
                trainee.see(f"master {name}", master)
        trainee.model.zero_grad()
        trainee.see_weights()


@EVERY_WAY
@pytest.mark.parametrize("tied", [False, True])
def test_masters_in_fp32(tied: bool, way: str) -> None:
    """Bit for bit the classic recipe, whose small steps bf16 alone would lose."""
    layout = Layout(dtype=torch.bfloat16, tied=tied)
    model = build(layout)
    trainee = MasterTrainee(model, compile_as(way, model, **STREAMED))
    if way != "offloaded":
        with pytest.raises(spcompile.OffloadError, match="offload"):
            host_parameters(model, master_dtype=torch.float32)
        trainee.call(tokens(0))
    seen = train(with_masters, trainee, streams=True)
    assert_same(seen, train_alone(with_classic_masters, layout, way, **RESIDENT))


@EVERY_WAY
def test_masters_are_apart_from_the_weights(way: str) -> None:
    """Always the same objects; not those of the weights' own precision."""
    model = build(Layout(dtype=torch.bfloat16))
    compile_as(way, model, **STREAMED)(tokens(0))
    masters = host_parameters(model, master_dtype=torch.float32)
    again = host_parameters(model, master_dtype=torch.float32)
    assert all(one is other for one, other in zip(masters, again, strict=True))
    for own, master in zip(model.parameters(), masters, strict=True):
        assert master.dtype == torch.float32
        assert torch.equal(master, own.float())
        assert master.data_ptr() != own.data_ptr()


def test_masters_of_the_weights_own_precision_are_the_weights() -> None:
    model: Stack = build(Layout())
    compile_as("offloaded", model, **STREAMED)
    masters = host_parameters(model, master_dtype=torch.float32)
    addresses = [each.data_ptr() for each in model.parameters()]
    assert [each.data_ptr() for each in masters] == addresses


@pytest.mark.parametrize("dtype", ["float32", torch.int8], ids=str)
def test_masters_in_what_is_no_precision(dtype: Any) -> None:
    with pytest.raises(spcompile.OptionError, match="master_dtype must be None or a floating-point dtype"):
        host_parameters(spcompile.offload(nn.Linear(2, 2), device="cpu"), master_dtype=dtype)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("x", "not a str"),
        (nn.Parameter(torch.ones(2)), "not a Parameter"),
        (nn.Linear(2, 2).named_parameters(), "not an iterable with a tuple in it"),
    ],
)
def test_of_what_has_no_parameters(given: Any, what: str) -> None:
    with pytest.raises(spcompile.OptionError, match=rf"needs a torch\.nn\.Module or some of its parameters.*{what}"):
        host_parameters(given)


def gradient_addresses(parameters: list[nn.Parameter]) -> dict[int, int]:
    gradients: list[Tensor | None] = [each.grad for each in parameters]
    return {index: each.data_ptr() for index, each in enumerate(gradients) if each is not None}


@EVERY_WAY
def test_no_gradient_is_kept_twice(way: str) -> None:
    """On a device without memory of its own, a gradient that both sides have is the same bytes."""
    trainee = start(Layout(), way)
    trainee.forward_backward(tokens(0))
    hosts = gradient_addresses(trainee.parameters)
    own = gradient_addresses(list(trainee.model.parameters()))
    assert hosts
    assert all(address == hosts[index] for index, address in own.items())


class Body(nn.Module):
    """Layers of a class of its own: what ``nn.Sequential`` calls Dynamo does not look at."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Mixed(nn.Module):
    """A body, which may be compiled, between an eager stem and an eager head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(8, 8), Body(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(torch.tanh(self.stem(x))))
        return y


STREAM: Any = {"backend": "superpipeline", "options": {"k": 2, "compiler": "eager", "device": "cpu"}}


class Both:
    """A plain model, and an equal one that is offloaded and trained on the host."""

    def __init__(self, is_compiled: bool) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.plain = Mixed()
        self.model = copy.deepcopy(self.plain)
        spcompile.offload(self.model, "cpu")
        self.is_compiled = is_compiled
        if is_compiled:
            self.model.body.compile(**STREAM)
        self.hosts = host_parameters(self.model)
        self.sides = [(self.plain, list(self.plain.parameters())), (self.model, self.hosts)]
        self.optimizers = [torch.optim.SGD(parameters, 0.1) for _, parameters in self.sides]

    def backward(self, loss: Callable[[Mixed, Tensor], Tensor]) -> None:
        x = torch.randn(4, 8)
        for each, _ in self.sides:
            loss(each, x).backward()  # type: ignore[no-untyped-call]

    def step(self, to_none: bool) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)

    def assert_same_gradients(self) -> None:
        for one, *others in zip(self.plain.parameters(), self.model.parameters(), self.hosts, strict=True):
            for other in others:
                torch.testing.assert_close(other.grad, one.grad)

    def assert_same_weights(self) -> None:
        for one, other in zip(self.plain.parameters(), self.model.parameters(), strict=True):
            torch.testing.assert_close(other, one)
        store = find_store(self.model.parameters())
        assert store is not None
        assert any(runtime.plan.intervals for runtime in store.runtimes()) == self.is_compiled


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).pow(2).mean()
    return loss


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("to_none", [False, True])
def test_where_a_part_of_backward_is_eager(is_compiled: bool, to_none: bool) -> None:
    """Gradients of what ran before the first compiled graph of a backward were added to those of the step before, and
    then thrown away with them; those of a backward without any were on the host when the optimizer stepped."""
    both = Both(is_compiled)
    for _ in range(4):
        for _ in range(2):
            both.backward(mean_square)
        both.assert_same_gradients()
        for _, parameters in both.sides:
            nn.utils.clip_grad_norm_(parameters, 0.05)
        both.step(to_none)
    both.assert_same_weights()


@pytest.mark.parametrize("to_none", [False, True])
def test_a_backward_with_no_compiled_graph_in_it(to_none: bool) -> None:
    """Between others: a loss of the head alone. Clipping found the gradients of the step before, and they came back."""
    both = Both(is_compiled=True)
    for step in range(5):
        both.backward(mean_square if step not in (2, 3) else lambda model, x: mean_square(model.head, x))
        for _, parameters in both.sides:
            nn.utils.clip_grad_norm_([each for each in parameters if each.grad is not None], 0.05)
        both.step(to_none)
    both.assert_same_weights()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_after_a_backward_that_failed_nothing_of_the_next_is_lost(is_compiled: bool) -> None:
    both = Both(is_compiled)

    def fail(_: Tensor) -> None:
        raise ArithmeticError("in the middle")

    def failing(model: Mixed, x: Tensor) -> Tensor:
        y = torch.tanh(model.stem(x))
        y.register_hook(fail)  # type: ignore[no-untyped-call]
        return mean_square(nn.Sequential(model.body, model.head), y)

    both.backward(mean_square)
    both.step(to_none=True)
    for each, _ in both.sides:
        with pytest.raises(ArithmeticError):
            failing(each, torch.randn(4, 8)).backward()  # type: ignore[no-untyped-call]
    for optimizer in both.optimizers:
        optimizer.zero_grad()
    for _ in range(2):
        both.backward(mean_square)
        both.assert_same_gradients()
        both.step(to_none=True)
    both.assert_same_weights()


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_inside_of_a_backward(is_compiled: bool, reentrant: bool) -> None:
    """That of a checkpoint was taken for the first one after one that had failed."""
    both = Both(is_compiled)

    def with_checkpoint(model: Mixed, x: Tensor) -> Tensor:
        y = torch.tanh(model.stem(x))
        return mean_square(model.head, checkpoint(model.body, y, use_reentrant=reentrant))

    for _ in range(3):
        for _ in range(2):
            both.backward(with_checkpoint)
        both.assert_same_gradients()
        both.step(to_none=True)
    both.assert_same_weights()


@pytest.mark.parametrize("way", ["offloaded", "re-homed"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_backward_and_step_inside_of_a_compiled_function(way: str, precision: torch.dtype) -> None:
    """Dynamo looked at what happens around the gradients and the step, and made of it what it likes."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Body().to(precision)
    model = copy.deepcopy(plain)
    x = torch.randn(4, 8, dtype=precision)
    if way == "offloaded":
        spcompile.offload(model, "cpu")
    with torch.no_grad():
        torch.compile(model, **STREAM)(x)  # a model on the CPU is known from here on
    hosts = host_parameters(model, master_dtype=torch.float32)
    masters = [nn.Parameter(each.detach().float()) for each in plain.parameters()]
    optimizer = torch.optim.SGD(hosts, 0.1)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = mean_square(model, x)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    compiled = torch.compile(step, **STREAM)
    for _ in range(3):
        x = torch.randn(4, 8, dtype=precision)
        expected = mean_square(plain, x)
        for each, gradient in zip(masters, torch.autograd.grad(expected, list(plain.parameters())), strict=True):
            each.data -= 0.1 * gradient.float()
        torch.testing.assert_close(compiled(x), expected)
        with torch.no_grad():
            for each, master in zip(plain.parameters(), masters, strict=True):
                each.copy_(master)
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(other, one)


def test_nothing_is_left_on_a_parameter_that_was_restored() -> None:
    model = nn.Linear(4, 4)
    for _ in range(3):
        spcompile.offload(model, "cpu")
        host_parameters(model)
        model(torch.randn(2, 4)).sum().backward()
        spcompile.restore(model, "cpu")
    assert not any(each._backward_hooks for each in model.parameters())


MASTER = torch.float32


class Masters(Both):
    """A model in bf16 whose optimizer works on copies in fp32, and a plain one with such copies made by hand."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.plain = Mixed().bfloat16()
        self.model = copy.deepcopy(self.plain)
        self.is_compiled = True
        spcompile.offload(self.model, "cpu")
        self.model.body.compile(**STREAM)
        self.hosts = host_parameters(self.model, master_dtype=MASTER)
        self.copies = [nn.Parameter(each.detach().float()) for each in self.plain.parameters()]
        self.sides = [(self.plain, self.copies), (self.model, self.hosts)]
        self.optimizers = [torch.optim.SGD(parameters, 0.1) for _, parameters in self.sides]

    def backward(self, loss: Callable[[Mixed, Tensor], Tensor]) -> None:
        x = torch.randn(4, 8, dtype=torch.bfloat16)
        for each, _ in self.sides:
            loss(each, x).backward()  # type: ignore[no-untyped-call]
        for one, master in zip(self.plain.parameters(), self.copies, strict=True):
            assert one.grad is not None
            master.grad = one.grad.float()

    def step(self, to_none: bool) -> None:
        super().step(to_none)
        self.plain.zero_grad()
        self.round_copies()

    def round_copies(self) -> None:
        with torch.no_grad():
            for one, master in zip(self.plain.parameters(), self.copies, strict=True):
                one.copy_(master)


def test_masters_whose_gradients_are_zeroed_in_place() -> None:
    """They share no memory with the model's, which went on adding up."""
    both = Masters()
    for _ in range(4):
        both.backward(mean_square)
        both.step(to_none=False)
    both.assert_same_weights()


@pytest.mark.parametrize("side", ["model", "masters"])
def test_masters_follow_edits_of_the_weights_and_the_other_way_round(side: str) -> None:
    """A checkpoint that was loaded into the model was overwritten by the next step; a master's edit waited for it."""
    both = Masters()
    for step in range(4):
        both.backward(mean_square)
        with torch.no_grad():
            if step == 1 and side == "model":
                both.model.load_state_dict({name: each * 0.5 for name, each in both.plain.state_dict().items()})
                for one, master in zip(both.plain.parameters(), both.copies, strict=True):
                    master.copy_(one * 0.5)
            elif step == 1:
                for each in (*both.copies, *both.hosts):
                    each.mul_(0.5)
                both.round_copies()
                x = torch.randn(2, 8, dtype=torch.bfloat16)
                both.model.body(x)  # a compiled graph: from here on
                both.assert_same_weights()
        both.step(to_none=True)
    both.assert_same_weights()


def test_a_gradient_that_is_replaced_on_the_host() -> None:
    both = Both(is_compiled=True)
    for _ in range(3):
        for _ in range(2):
            both.backward(mean_square)
            for _, parameters in both.sides:
                for each in parameters:
                    assert each.grad is not None
                    each.grad = each.grad * 0.5
        both.step(to_none=False)
    both.assert_same_weights()


def test_a_gradient_that_is_replaced_on_the_model_and_set_to_none_on_the_host() -> None:
    """As DistributedDataParallel does, whose buckets become the gradients behind a backward."""
    both = Both(is_compiled=False)
    for _ in range(3):
        both.backward(mean_square)
        for parameter in both.model.parameters():
            assert parameter.grad is not None
            parameter.grad = parameter.grad.clone()
        for optimizer in both.optimizers:
            optimizer.zero_grad()
        both.backward(mean_square)
        both.assert_same_gradients()
        both.step(to_none=True)
    both.assert_same_weights()


def test_parameters_that_are_unfrozen_later() -> None:
    model = spcompile.offload(Mixed(), "cpu")
    model.body.requires_grad_(False)
    assert [each.requires_grad for each in host_parameters(model)] == [
        each.requires_grad for each in model.parameters()
    ]
    model.body.requires_grad_(True)
    model.stem.requires_grad_(False)
    hosts = host_parameters(model)
    assert [each.requires_grad for each in hosts] == [each.requires_grad for each in model.parameters()]
    model(torch.randn(2, 8)).sum().backward()
    assert [each.grad is not None for each in hosts] == [each.grad is not None for each in model.parameters()]


def test_a_step_between_forward_and_backward_is_refused() -> None:
    """As autograd does for any parameters: the backward would have worked with other weights."""
    both = Both(is_compiled=True)
    losses = [mean_square(both.model, torch.randn(4, 8)) for _ in range(2)]
    losses[1].backward()  # type: ignore[no-untyped-call]
    both.optimizers[1].step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[0].backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("way", ["re-homed", "offloaded", "with host parameters"])
@pytest.mark.parametrize("k", [2, 9])
def test_sparse_gradients(way: str, k: int) -> None:
    """They have no storage to be sent to, and stay where autograd leaves them."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = nn.Embedding(20, 8, sparse=True), Body()

        def forward(self, tokens: Tensor) -> Tensor:
            y: Tensor = self.body(self.embed(tokens))
            return y

    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Sparse()
    model = copy.deepcopy(plain)
    if way != "re-homed":
        spcompile.offload(model, "cpu")
    parameters = host_parameters(model) if "host" in way else list(model.parameters())
    fast = torch.compile(model, backend="superpipeline", options={**STREAM["options"], "k": k})
    optimizers = [torch.optim.SGD(each, 0.1) for each in (parameters, list(plain.parameters()))]
    for _ in range(3):
        tokens = torch.randint(0, 20, (4,))
        for call in (fast, plain):
            call(tokens).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(other, one)


def test_parameters_that_are_unfrozen_where_all_is_eager() -> None:
    """Nobody watched them, and what they had been given was dropped at the step."""
    plain = Mixed().requires_grad_(False)
    model = spcompile.offload(copy.deepcopy(plain), "cpu")
    host_parameters(model)
    sides = [(each.requires_grad_(True), torch.optim.SGD(host_parameters(each), 0.1)) for each in (plain, model)]
    for _ in range(4):
        x = torch.randn(4, 8)
        for each, optimizer in sides:
            mean_square(each, x).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other, one)


def test_a_gradient_that_is_set_by_hand_before_the_first_backward() -> None:
    both = Both(is_compiled=True)
    for _, parameters in both.sides:
        for each in parameters:
            each.grad = torch.ones_like(each)
    both.backward(mean_square)
    both.assert_same_gradients()


def test_masters_that_are_edited_before_anything_runs() -> None:
    """Weights that stay on the device were copied as they had been, and counted as up to date."""
    model = spcompile.offload(Body().bfloat16(), "cpu")
    masters = host_parameters(model, master_dtype=MASTER)
    with torch.no_grad():
        for each in masters:
            each.mul_(2)
    plain = Body().bfloat16()
    with torch.no_grad():
        for one, master in zip(plain.parameters(), masters, strict=True):
            one.copy_(master)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="superpipeline", options={**STREAM["options"], "k": 9})
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))
