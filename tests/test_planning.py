"""`spcompile.plan` before any run is the plan that a run then follows; and it runs, compiles and moves nothing."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.ir import Page, Plan, Plans
from spcompile.runtime.store import find_store
from tests.running import compile_offloaded

WIDTH = 8

CALLS: list[str] = []
"""What really ran, by way of `note`."""


def note(text: str) -> None:
    CALLS.append(text)


class Stack(nn.Module):
    """A table, layers, and a head that is tied to the table."""

    def __init__(self, n_layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(n_layers))

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> Tensor:
        x = self.embed(tokens) * scale
        for layer in self.layers:
            x = torch.tanh(layer(x))
        y: Tensor = x @ self.embed.weight.t()
        return y


class Scaled(Stack):
    """Ends in a scale that is too small for a page; may also do nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> Tensor:
        if not tokens.is_floating_point():
            tokens = super().forward(tokens, scale=scale)
        y: Tensor = torch.tanh(tokens) * self.scale
        return y


class Broken(Stack):
    """The graph breaks in front of the head."""

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> Tensor:
        x = self.embed(tokens) * scale
        for layer in self.layers:
            x = torch.tanh(layer(x))
        torch._dynamo.graph_break()
        return torch.tanh(x) * 2


class Breaking(Stack):
    """The graph breaks in front of the last layer."""

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> Tensor:
        x = self.embed(tokens) * scale
        for index in range(3):
            x = torch.tanh(self.layers[index](x))
        torch._dynamo.graph_break()
        return torch.tanh(self.layers[3](x))


class Noting(Stack):
    """Writes down when it runs."""

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> Tensor:
        result: Tensor = super().forward(tokens, scale=scale)
        note("head")
        return result


class Counting(Stack):
    """Counts its calls in an attribute: Dynamo then names its weights in another way."""

    calls = 0

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> Tensor:
        self.calls += 1
        result: Tensor = super().forward(tokens, scale=scale)
        return result


def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call


class Decorated(Stack):
    """Its forward is wrapped in a function of ``*args``, as by many a decorator."""

    forward = wrapped(Stack.forward)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    CALLS.clear()


def tokens(rows: int = 3) -> Tensor:
    return torch.arange(rows) % 16


WINDOWS = [(1, 1), (2, 1), (3, 2), (4, 4), (100, 1)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("k", "m"), WINDOWS)
def test_before_offload_after_offload_and_in_force(k: int, m: int, grad: bool) -> None:
    model = Stack()
    args, kwargs = (tokens(),), {"scale": 0.5}
    with torch.set_grad_enabled(grad):
        before = spcompile.plan(model, args, kwargs, k=k, m=m, device="cpu", compiler="eager")
        spcompile.offload(model, device="cpu")
        after = spcompile.plan(model, args, kwargs, k=k, m=m, compiler="eager")
        run = compile_offloaded(model, k=k, m=m)
        run.model(*args, **kwargs)
    assert before == after == spcompile.plan(run.model) == spcompile.plan(model)
    assert before.wraps is not grad
    assert bool(before.intervals) == (k < len(before.pages))
    assert Plan.from_json(before.to_json()) == before


def test_the_compiler_decides_the_decompositions_but_not_the_placement() -> None:
    model = Stack()
    with torch.no_grad():
        plans = [spcompile.plan(model, (tokens(),), k=2, m=1, compiler=name) for name in ("eager", "aot_eager")]
        plans.append(spcompile.plan(model, (tokens(),), k=2, m=1))
    assert plans[0].intervals == plans[1].intervals == plans[2].intervals
    assert plans[0].pages == plans[1].pages == plans[2].pages
    assert plans[2].activations_bytes <= plans[0].activations_bytes  # Inductor fuses


def test_without_k_everything_fits_or_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = spcompile.offload(Stack(12), device="cpu")
    with torch.no_grad():
        assert spcompile.plan(model, (tokens(),)).intervals == ()
        monkeypatch.setattr("spcompile.capture.free_device_bytes", lambda _: 4200)
        before = spcompile.plan(model, (tokens(),), compiler="eager")
        run = compile_offloaded(model)
        run.model(tokens())
    assert 0 < len(before.residents) < len(before.pages)
    assert spcompile.plan(run.model) == before


@pytest.mark.parametrize("offloaded", [False, True])
def test_nothing_runs_and_nothing_moves(offloaded: bool) -> None:
    model = Noting()
    if offloaded:
        spcompile.offload(model, device="cpu")
    weights = {name: (each.data_ptr(), each.clone()) for name, each in model.named_parameters()}
    versions = [each._version for each in model.parameters()]
    state = torch.random.get_rng_state()
    with torch.no_grad():
        assert len(spcompile.plan(model, (tokens(),), k=2, m=1).pages) == 5
    assert CALLS == []
    for name, parameter in model.named_parameters():
        address, value = weights[name]
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)
    assert [each._version for each in model.parameters()] == versions
    assert torch.equal(torch.random.get_rng_state(), state)
    store = find_store(model.parameters())
    assert (store is not None) == offloaded
    if store is not None:
        assert store.arena.memory.numel() == 0
        assert store.pages == []
        assert store.runtimes() == []
        assert store.device_bytes() == 0


def test_the_same_model_compiles_as_if_nothing_had_been() -> None:
    model = Stack()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for k in range(1, 13):
            spcompile.plan(model, (tokens(),), k=k)
        run = compile_offloaded(model, k=2, m=1)
        assert torch.equal(run.model(tokens()), plain(tokens()))
    assert run.runtime.bytes_moved >= run.plan.bytes_moved > 0


def test_another_graph_of_the_model_keeps_the_pages() -> None:
    """A plan made after a run knows the pages that the run has made."""
    model = Stack()
    run = compile_offloaded(model, k=2, m=1)
    with torch.no_grad():
        run.model(tokens())
        other = spcompile.plan(model, (tokens(5),), k=3, m=2)
    assert other.pages == run.plan.pages
    assert (other.k, other.m) == (3, 2)
    assert spcompile.plan(run.model) == run.plan
    assert run.plan.k == 2


def test_another_graph_of_the_model_leaves_the_same_weights_outside_the_pages() -> None:
    """Else a later graph would have a page more, and stream although k was enough for the first."""
    model = Scaled().eval()
    with torch.no_grad():
        before = spcompile.plan(model, (tokens(),), k=5, compiler="eager", device="cpu")
        run = compile_offloaded(model, k=5)
        for inputs in (tokens(3), tokens(5), torch.ones(4)):
            run.model(inputs)
        after = spcompile.plan(model, (tokens(),), k=5, compiler="eager")
    plans = [runtime.plan for runtime in run.store.runtimes()]
    assert before.pages == after.pages == plans[0].pages
    leftovers = [[weight.name for weight in plan.leftovers] for plan in (before, after, *plans)]
    assert leftovers == [["scale"]] * 5
    assert [len(plan.pages) for plan in plans] == [5, 5, 0]
    assert not any(plan.intervals for plan in plans)


def test_graph_breaks_make_several_plans() -> None:
    model = Breaking()
    with torch.no_grad():
        plans = spcompile.plan(model, (tokens(),), k=2, m=1)
        run = compile_offloaded(model, k=2, m=1)
        run.model(tokens())
    assert isinstance(plans, Plans)
    assert [len(plan.pages) for plan in plans] == [4, 1]
    assert [layer.name for layer in plans[0].layers] == LAYERS[:3]
    assert [page for plan in plans for page in plan.pages] == list(plans.pages)
    in_force = spcompile.plan(run.model)
    assert isinstance(in_force, Plans)
    assert [len(plan.pages) for plan in in_force] == [len(plan.pages) for plan in plans]


def test_a_second_graph_of_the_model_makes_several_plans_in_force() -> None:
    run = compile_offloaded(Stack(), k=2, m=1)
    with torch.no_grad():
        run.model(tokens(3))
        first = spcompile.plan(run.model)
        run.model(tokens(5))
    plans = spcompile.plan(run.model)
    assert isinstance(first, Plan)
    assert isinstance(plans, Plans)
    assert plans == tuple(runtime.plan for runtime in run.store.runtimes())
    assert len(plans) == 2
    assert plans[0] == first


class ByValue(Stack):
    """Branches on a value of a tensor."""

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> Tensor:
        x: Tensor = super().forward(tokens, scale=scale)
        return x * 2 if tokens.sum().item() >= 0 else x


class Ragged(Stack):
    """As many pieces as a tensor says, like the images of Qwen2-VL."""

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> Tensor:
        x: Tensor = super().forward(tokens, scale=scale)
        sizes = torch.repeat_interleave(torch.ones_like(tokens), tokens * 0 + 1).tolist()
        return torch.cat([piece.softmax(0) for piece in torch.split(x, sizes)])


class Sized(Stack):
    """A number that torch captures only where a whole graph is demanded, as a size and as a factor."""

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> Tensor:
        number = int(tokens.amax().item()) * 0 + 1
        x: Tensor = super().forward(tokens.view(number, *tokens.shape).squeeze(0), scale=scale)
        return x * number


def pages_of(plans: Plan | Plans) -> list[Page]:
    return [page for plan in (plans if isinstance(plans, Plans) else (plans,)) for page in plan.pages]


@pytest.mark.parametrize("kind", [ByValue, Ragged, Sized])
def test_a_model_whose_graph_depends_on_values_is_planned_in_pieces(kind: type[Stack]) -> None:
    """torch demands a whole graph with other exceptions here than for other graph breaks."""
    model = kind().eval()
    with torch.no_grad():
        plans = spcompile.plan(model, (tokens(),), k=2, device="cpu", compiler="eager")
        assert pages_of(plans)
        with pytest.raises(spcompile.OptionError, match="planned only if it is one graph, and this one breaks"):
            spcompile.plan(kind().to("meta"), (tokens().to("meta"),), k=2, device="cpu", compiler="eager")
        run = compile_offloaded(model, k=2)
        run.model(tokens())
    assert pages_of(plans) == pages_of(spcompile.plan(run.model))


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="this torch cannot keep recompiles of a plan apart from the model's own",
)
def test_plans_with_graph_breaks_leave_the_model_compilable() -> None:
    model = Broken()
    with torch.no_grad():
        for _ in range(10):
            spcompile.plan(model, (tokens(),), k=2, m=1)
        spcompile.offload(model, device="cpu")
        fast = torch.compile(model, backend="superpipeline", options={"compiler": "eager", "k": 2})
        fast(tokens())
    assert spcompile.plan(fast).bytes_moved > 0


LAYERS = [f"layers.{index}" for index in range(4)]


@pytest.mark.parametrize("kind", [Stack, Noting, Counting, Decorated])
def test_layers_have_the_names_of_the_module_tree(kind: type[Stack]) -> None:
    with torch.no_grad():
        plan = spcompile.plan(kind(), (tokens(),), k=2, m=1)
    assert [layer.name for layer in plan.layers] == LAYERS


def test_a_training_plan_is_that_of_the_forward_graph() -> None:
    plan = spcompile.plan(Stack(), (tokens(),), k=2, m=1)
    assert not plan.wraps
    assert [layer.name for layer in plan.layers] == LAYERS


@pytest.mark.parametrize("offloaded", [False, True])
def test_without_inputs_and_before_a_run(offloaded: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Inputs are guessed; of a compiled model with the options that it was compiled with."""
    model = spcompile.offload(Stack(), device="cpu") if offloaded else Stack()
    fast = torch.compile(model, backend="superpipeline", options={"compiler": "eager", "k": 2})
    with torch.no_grad():
        plain, before_run = spcompile.plan(model), spcompile.plan(fast)
        assert "no plan is in force: the compiled model has not run yet" in caplog.text
        given = spcompile.plan(model, (torch.zeros(1, 128, dtype=torch.int64),), k=2, compiler="eager")
        fast(tokens())
    assert not plain.intervals
    assert before_run == dataclasses.replace(given, note=before_run.note)
    assert before_run.note == "example inputs from the first layer of Stack, 'embed' Embedding: int64 [1, 128]"
    in_force = spcompile.plan(fast)
    assert (in_force.note, in_force.k) == ("", 2)
    assert spcompile.plan(model, k=3).k == 3, "another plan than the one in force was asked for"
    assert spcompile.plan(fast) == in_force


@pytest.mark.parametrize("model", [[1], print, None], ids=["list", "function", "none"])
def test_what_is_no_module(model: Any) -> None:
    with pytest.raises(spcompile.OptionError, match=r"plan needs a torch\.nn\.Module or what torch\.compile made"):
        spcompile.plan(model, (tokens(),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "option 'k' must be a whole number"),
        ({"k": 2, "m": 3}, "option 'm' must be between 1 and k = 2"),
        ({"m": 1}, "option 'm' needs option 'k'"),
        ({"compiler": "gcc"}, "option 'compiler' must be one of"),
        ({"device": "tpu"}, "option 'device' must be"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(spcompile.OptionError, match=message):
        spcompile.plan(Stack(), (tokens(),), **options)


def test_inputs_that_the_model_does_not_take() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        spcompile.plan(Stack(), (tokens(), tokens()), k=2)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (tokens(), None, "args must be a tuple of the model's positional arguments, not one Tensor"),
        ({"tokens": tokens()}, None, "args must be a tuple of the model's positional arguments, not one dict"),
        ((tokens(),), 0.5, "kwargs must be a dict of the model's keyword arguments, not one float"),
    ],
)
def test_inputs_that_are_no_arguments(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(spcompile.OptionError, match=message):
        spcompile.plan(Stack(), args, kwargs, k=2)


def test_two_windows_of_one_model_have_a_plan_each() -> None:
    model = spcompile.offload(Stack(), device="cpu").eval()
    torch._dynamo.reset()
    fasts = [
        torch.compile(model, backend="superpipeline", options={"compiler": "eager", "k": k, "m": 1}) for k in (2, 3)
    ]
    with torch.no_grad():
        for fast in fasts:
            fast(tokens())
    assert [spcompile.plan(fast).k for fast in fasts] == [2, 3]
    assert isinstance(spcompile.plan(model), Plans)


def test_a_planned_model_is_let_go() -> None:
    """torch keeps a backend that has raised, which is how a dry run ends."""
    models = []
    for _ in range(2):
        model = Stack()
        models.append(weakref.ref(model))
        with torch.no_grad():
            spcompile.plan(model, (torch.zeros(1, 3, dtype=torch.int64),), k=2, device="cpu")
        del model
    torch._dynamo.reset()
    gc.collect()
    assert [each() for each in models] == [None, None]


def test_a_model_whose_pieces_ran_is_left_as_it_was() -> None:
    """With graph breaks they have to run: statistics, counters and random numbers are put back."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.norm, self.dropout = nn.BatchNorm1d(WIDTH), nn.Dropout()
            self.register_buffer("latest", torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = self.dropout(self.norm(layer(x)))
            torch._dynamo.graph_break()
            self.latest = x.detach().mean(0)
            return self.norm(x)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    model = Counting()
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    x = torch.randn(4, WIDTH)
    random = torch.get_rng_state()
    assert isinstance(spcompile.plan(model, (x,), k=4, device="cpu"), Plans)
    assert torch.equal(torch.get_rng_state(), random)
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0]
        assert torch.equal(buffer, before[name][1])
