"""What went wrong once, each as a test of its own."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import spcompile
from spcompile.planner.choose import least_capacity_bytes
from spcompile.runtime.store import PageStore, find_store
from spcompile.runtime.streams import EmulatedStreams
from tests.models import Spec
from tests.running import compile_offloaded


class Reversed(nn.Module):
    """A block that uses its weights in the opposite of the order in which it holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(32, 32)
        self.middle = nn.Linear(32, 32)
        self.first = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.last(torch.relu(self.middle(torch.relu(self.first(x)))))
        return y


class Nameless(nn.Module):
    """Weights in a plain list of attributes: no numbered modules, so layers are cut by structure."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcdefgh":
            setattr(self, name, nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        for name in "abcdefgh":
            x = torch.tanh(getattr(self, name)(x))
        return x


def test_a_layer_is_one_copy_whatever_order_it_uses_its_weights_in() -> None:
    """Pages in order of use took four to five copies for each Llama layer, and cost 1.6 % of the link."""
    run = compile_offloaded(nn.Sequential(*(Reversed() for _ in range(4))).eval(), k=2, m=1)
    with torch.no_grad():
        run.model(torch.randn(2, 32))
    assert [len(run.store.pieces(page)) for page in run.plan.pages] == [1, 1, 1, 1]


def test_a_view_of_a_weight_goes_to_its_reader_across_cuts_by_structure() -> None:
    """A cut between ``t(w)`` and its reader let an alias of the slot leave the segment."""
    model = Nameless().eval()
    plain = copy.deepcopy(model)
    x = torch.randn(3, 16)
    run = compile_offloaded(model, k=2, m=1)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(run.model(x), plain(x))
    assert len(run.plan.intervals) == 8


@pytest.mark.parametrize("later", [torch.no_grad, torch.inference_mode])
def test_the_first_call_may_be_in_inference_mode(later: Callable[[], torch.no_grad]) -> None:
    """The arena became an inference tensor, which no copy outside inference mode may write."""
    model = nn.Sequential(*(Reversed() for _ in range(4))).eval()
    plain = copy.deepcopy(model)
    x = torch.randn(2, 32)
    run = compile_offloaded(model, k=3, m=1)
    with torch.inference_mode():
        assert torch.equal(run.model(x), plain(x))
    with later():
        assert torch.equal(run.model(x), plain(x))
    assert torch.allclose(run.model(x), plain(x))


def test_an_embedding_larger_than_the_layers_makes_one_slot_large() -> None:
    """With equal slots, k=2 of a small language model took more memory than the whole model."""
    layers = [nn.Embedding(400, 32), *(Reversed() for _ in range(3))]
    run = compile_offloaded(nn.Sequential(*layers).eval(), k=2, m=1)
    with torch.no_grad():
        run.model(torch.arange(4))
    embedding, layer = run.plan.pages[0].slot_bytes, run.plan.pages[1].slot_bytes
    assert [slot.nbytes for slot in run.plan.slots] == [embedding, layer]


def test_a_model_that_dies_while_another_is_traced_leaves_no_trace() -> None:
    """Its late copies were executed when it was collected, in the middle of tracing, and became part of the graph."""
    x = torch.randn(2, 32)
    models = [nn.Sequential(*(Reversed() for _ in range(4))).eval()]
    run = compile_offloaded(models[0], k=2, m=1)
    streams = run.store.arena.streams
    assert isinstance(streams, EmulatedStreams)
    streams.random = random.Random(0)
    with torch.no_grad():
        while not streams.side:  # until a copy for the next iteration comes late
            run.model(x)
    alive = weakref.ref(run.store)
    del run
    torch._dynamo.reset()

    def traced(x: Tensor) -> Tensor:
        models.clear()
        gc.collect()
        return x * 2

    graph = make_fx(traced)(x).graph
    assert alive() is None
    assert [node.name for node in graph.nodes if node.op == "call_function"] == ["mul"]


class Decaying(nn.Module):
    """A block that updates its own weight in place while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.weight.mul_(0.5)
        return torch.tanh(x @ self.weight) * self.scale


def test_a_graph_may_write_a_weight_that_an_earlier_graph_streams() -> None:
    """Behind the cut into segments the write was no longer seen, and the segment was handed the slot as well."""
    model = nn.Sequential(*(Decaying() for _ in range(4))).eval()
    plain = copy.deepcopy(model)
    x = torch.randn(3, 16)
    run = compile_offloaded(model, k=2, m=1)
    with torch.no_grad():
        for training in (False, True, False, True, False):
            model.train(training)
            plain.train(training)
            assert torch.equal(run.model(x), plain(x)), training
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_a_page_of_empty_weights_is_found_again() -> None:
    """It takes no bytes: no other page turned its last tenancy out, and each iteration brought it anew."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(0), nn.Linear(8, 8)).eval()

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            first, empty, last = self.layers
            y: Tensor = last(torch.relu(first(x))) + empty(x[:, :0]).sum()
            return y

    run = compile_offloaded(Beside(), k=3, m=1)
    with torch.no_grad():
        for _ in range(4):
            run.model(torch.randn(2, 8))
    assert len(run.store.arena.tenants) <= len(run.plan.pages) + 1


def test_small_pages_are_merged_only_where_there_is_room_for_them_merged() -> None:
    """The smallest budget had room for the pages as they were, and not for two of them in one."""
    spec = Spec(
        kinds=("linear", "tied_pair"),
        order=(0, 1),
        width=16,
        embedding=False,
        tied_head=False,
        skip=False,
        outside_use=False,
        dtype=torch.float32,
        seed=0,
    )
    model, x = spec.build().eval(), spec.inputs()
    with torch.no_grad():
        expected = model(x)
        plan = spcompile.plan(model, (x,), k=10**6, device="cpu", compiler="eager")
        budget = plan.beside_bytes() + least_capacity_bytes(plan)
        run = compile_offloaded(model, budget=budget)
        assert torch.equal(run.model(x), expected)
    assert run.plan.peak_bytes() <= budget


def test_a_backward_inside_of_a_compiled_function_does_not_hang() -> None:
    """Dynamo looked at the function which it calls when it begins to compile, and waited for a lock that it held. In a
    process of its own, as one that hangs can be stopped by nothing else."""
    code = """
import torch, spcompile
from torch import nn
model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
def step(x):
    loss = model(x).pow(2).sum()
    loss.backward()
    return loss
x = torch.randn(2, 8)
plain = step(x).item()
for backend, options in (("superpipeline", {"k": 2, "compiler": "eager", "device": "cpu"}), ("aot_eager", None)):
    assert abs(torch.compile(step, backend=backend, options=options)(x).item() - plain) < 1e-5
print("done")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert ended.stdout.strip() == "done", ended.stderr


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_compiled_code_of_a_backward_keeps_no_model_alive(is_offloaded: bool) -> None:
    """AOTAutograd keeps what compiles backward as long as there is code; it held the parameters and the first batch."""
    torch._dynamo.reset()  # code that is there already would be called again, and hold nothing of these models
    alive: list[Callable[[], object]] = []
    for count in (2, 3):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(count)))
        if is_offloaded:
            spcompile.offload(model, "cpu")
        fast = torch.compile(model, backend="superpipeline", options={"k": 2, "compiler": "eager", "device": "cpu"})
        x = torch.randn(2, 8)
        if count == 2:
            fast(x).sum().backward()
        else:
            fast(x)  # its backward is never compiled
        alive += [weakref.ref(each) for each in (x, *model.parameters())]
        store = find_store(model.parameters())
        assert store is not None
        alive.append(weakref.ref(store))
    del model, fast, x, store
    gc.collect()
    assert [each() for each in alive] == [None] * len(alive)


@pytest.mark.parametrize("way", ["offloaded", "re-homed"])
def test_a_backward_that_is_compiled_when_its_model_is_gone(way: str) -> None:
    """It runs on its arguments; an arena and memory for gradients that it had for itself stayed for good."""
    torch._dynamo.reset()
    gc.collect()
    before = {id(each) for each in gc.get_objects() if type(each) is PageStore}
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    x = torch.randn(2, 8, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    expected = x.grad
    if way == "offloaded":
        spcompile.offload(model, "cpu")
    fast = torch.compile(model, backend="superpipeline", options={"k": 2, "compiler": "eager", "device": "cpu"})
    loss = fast(x).sum()
    if way == "offloaded":
        spcompile.restore(model)
    del model, fast
    gc.collect()
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(gradient, expected)
    del loss
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is PageStore and id(each) not in before]


class Sharing(nn.Module):
    """A block that shares a part with the others."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.own, self.shared = nn.Linear(32, 32), shared

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.shared(torch.tanh(self.own(x)))
        torch._dynamo.graph_break()
        return y


class Blocks(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("way", ["offloaded", "re-homed"])
def test_layers_that_share_a_part_and_one_graph(way: str) -> None:
    """The graph was bound to pages with a weight in common; one of another batch size then had it in two places."""
    torch._dynamo.reset()
    shared = nn.Linear(32, 32)
    model = Blocks([Sharing(shared) for _ in range(5)]).eval()
    plain = copy.deepcopy(model)
    if way == "offloaded":
        spcompile.offload(model, "cpu")
    fast = torch.compile(model, backend="superpipeline", options={"k": 2, "compiler": "eager", "device": "cpu"})
    with torch.no_grad():
        for rows in (4, 2, 3, 4, 1):
            x = torch.randn(rows, 32)
            assert torch.equal(fast(x), plain(x))


@pytest.mark.parametrize("way", ["offloaded", "re-homed"])
def test_weights_that_are_tied_after_the_first_call(way: str) -> None:
    """The compiled graph follows its arguments; the next one is planned for the tied weights."""
    torch._dynamo.reset()
    model = Blocks([Reversed() for _ in range(5)]).eval()
    plain = copy.deepcopy(model)
    if way == "offloaded":
        spcompile.offload(model, "cpu")
    fast = torch.compile(model, backend="superpipeline", options={"k": 2, "compiler": "eager", "device": "cpu"})
    with torch.no_grad():
        assert torch.equal(fast(torch.ones(4, 32)), plain(torch.ones(4, 32)))
        for each in (model, plain):
            first, last = each.blocks[1], each.blocks[3]
            assert isinstance(first, Reversed)
            assert isinstance(last, Reversed)
            first.middle.weight = last.last.weight
        for rows in (4, 2, 3):
            x = torch.randn(rows, 32)
            assert torch.equal(fast(x), plain(x))


@pytest.mark.parametrize("way", ["offloaded", "re-homed"])
def test_a_pickled_copy_is_compiled_while_the_model_lives(way: str) -> None:
    """What a pickled tensor keeps of its tag was taken for one by the code that both share."""
    torch._dynamo.reset()
    model = Blocks([Reversed() for _ in range(3)]).eval()
    if way == "offloaded":
        spcompile.offload(model, "cpu")
    options: dict[str, str | int | bool | Callable[..., object]] = {"k": 2, "compiler": "eager", "device": "cpu"}
    x = torch.randn(4, 32)
    with torch.no_grad():
        expected = torch.compile(model, backend="superpipeline", options=options)(x)
        other: Blocks = pickle.loads(pickle.dumps(model))
        for _ in range(2):
            assert torch.equal(torch.compile(other, backend="superpipeline", options=options)(x), expected)
            spcompile.offload(other, "cpu")
