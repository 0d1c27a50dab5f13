"""A budget in bytes, or a slowdown, is enough: same results, less memory, and a clear answer where it is too little."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.backend import BackendError
from spcompile.ir import Plan, Weight
from spcompile.planner.simulate import predict_iteration_us
from spcompile.runtime.store import find_store

WIDTH = 64


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(n_layers: int = 6, width: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(n_layers))).eval()


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    options = {"compiler": "eager", "device": "cpu", **options}
    fast: Callable[..., Any] = torch.compile(model, backend="superpipeline", options=options)
    return fast


def planned(model: nn.Module, x: Tensor, **options: Any) -> Plan:
    with torch.no_grad():
        plan: Plan = spcompile.plan(model, (x,), device="cpu", compiler="eager", **options)
    return plan


def test_any_budget_that_can_be_kept_gives_the_same_numbers() -> None:
    model, x = make(), torch.randn(3, WIDTH)
    everything = planned(model, x, k=100).peak_bytes()
    least = planned(model, x, k=1).peak_bytes()
    for budget in range(least, everything + 10_000, (everything - least) // 3):
        torch._dynamo.reset()
        fast = compiled(spcompile.offload(make(), device="cpu"), budget=budget)
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(fast(x), make()(x))
        assert spcompile.plan(fast).peak_bytes() <= budget


class Uneven(nn.Module):
    """Layers of different sizes, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 256, 64, 512, 32, 128, 384, 32)
        self.layers = nn.ModuleList(nn.Linear(one, other) for one, other in pairwise((WIDTH, *widths)))
        self.again = nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for layer in self.layers:
                x = torch.relu(layer(x))
            x = self.again(x)
        return x


@pytest.mark.parametrize("wraps", [True, False])
def test_pages_of_different_sizes_share_memory_by_time(wraps: bool) -> None:
    torch.manual_seed(0)
    plain, x = Uneven().requires_grad_(False), torch.randn(3, WIDTH)
    curve = planned(plain, x, k=4).tradeoff()
    overlapping = 0
    for point in curve[:: max(1, len(curve) // 8)]:
        torch._dynamo.reset()
        model = spcompile.offload(copy.deepcopy(plain), device="cpu")
        fast = compiled(model, budget=point.peak_bytes)
        with torch.set_grad_enabled(not wraps):
            for _ in range(4):
                assert torch.equal(fast(x), plain(x))
        plan = spcompile.plan(fast)
        assert isinstance(plan, Plan)
        assert plan.peak_bytes() <= point.peak_bytes
        slots = sorted(plan.slots, key=lambda slot: slot.offset_bytes)
        overlapping += any(one.offset_bytes + one.nbytes > other.offset_bytes for one, other in pairwise(slots))
    assert overlapping


def test_in_training_gradients_count() -> None:
    model, x = spcompile.offload(make(), device="cpu"), torch.randn(3, WIDTH)
    fast = compiled(model, budget=500_000)
    fast(x).sum().backward()
    plain = make()
    plain(x).sum().backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad)
    plan = spcompile.plan(fast)
    assert plan.peak_bytes() <= 500_000
    largest = sorted(step.gradients_bytes for step in plan.steps)[-2:]
    assert plan.gradients_bytes == sum(parameter.nbytes for parameter in plain.parameters())
    assert sum(largest) <= plan.activations_bytes < plan.gradients_bytes, "those of two layers at a time"


def test_more_memory_moves_less() -> None:
    model, x = make(), torch.randn(3, WIDTH)
    curve = planned(model, x, k=2).tradeoff()
    moved = [point.plan.bytes_moved for point in curve]
    assert len(curve) > 3
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] == 0
    for point in curve:
        plan = planned(model, x, budget=point.peak_bytes)
        assert plan.peak_bytes() <= point.peak_bytes
        assert plan.bytes_moved <= point.plan.bytes_moved


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_layers_that_are_too_large_are_cut_finer(compiler: str) -> None:
    model, x = make(), torch.randn(3, WIDTH)
    whole_bytes = planned(model, x, k=1).tradeoff()[0].peak_bytes
    page_bytes = max(page.nbytes for page in planned(model, x, k=1).pages)
    fast = compiled(spcompile.offload(make(), device="cpu"), budget=whole_bytes - page_bytes // 3, compiler=compiler)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0 if compiler == "eager" else 1e-5)
    plan = spcompile.plan(fast)
    assert isinstance(plan, Plan)
    assert plan.peak_bytes() <= whole_bytes - page_bytes // 3
    assert len(plan.layers) == 6
    assert [len(layer.pages) for layer in plan.layers] == [2] * 6
    assert max(page.nbytes for page in plan.pages) < page_bytes


def test_where_copies_of_whole_layers_can_run_ahead_nothing_is_cut() -> None:
    model, x = make(), torch.randn(3, WIDTH)
    two_slots_bytes = planned(model, x, k=2).peak_bytes()
    assert planned(model, x, budget=two_slots_bytes).pages == planned(model, x, k=1).pages


def test_layers_are_cut_finer_where_copies_of_whole_ones_could_not_run_ahead() -> None:
    """There is room for one layer at a time, so compute and copies would take turns; of halves two are on their way."""
    model, x = make(width=1024), torch.randn(512, 1024)
    whole = planned(model, x, k=1)
    budget = whole.tradeoff()[0].peak_bytes
    plan = planned(model, x, budget=budget)
    assert whole.machine is not None
    assert len(plan.pages) == 2 * len(whole.pages)
    assert plan.peak_bytes() <= budget
    assert predict_iteration_us(plan, whole.machine) < 0.9 * predict_iteration_us(whole, whole.machine)
    fast = compiled(spcompile.offload(make(width=1024), device="cpu"), budget=budget)
    with torch.no_grad():
        assert all(torch.equal(fast(x), model(x)) for _ in range(3))
    in_force = spcompile.plan(fast)
    assert isinstance(in_force, Plan)
    assert in_force.pages == plan.pages


def test_a_second_graph_is_cut_like_the_first_one() -> None:
    """Pages are what they are by then: finer pieces of a layer save nothing, and each is a call."""

    def make_deep() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(*(nn.Linear(512, 512) for _ in range(6))) for _ in range(6))).eval()

    rows, row = torch.randn(1024, 512), torch.randn(1, 512)
    budget = planned(make_deep(), rows, k=1).tradeoff()[0].peak_bytes
    fast = compiled(spcompile.offload(make_deep(), device="cpu"), budget=budget)
    with torch.no_grad():
        assert torch.equal(fast(rows), make_deep()(rows))
        assert torch.equal(fast(row), make_deep()(row))
    plans = spcompile.plan(fast)
    assert isinstance(plans, tuple)
    assert [len(plan.pages) for plan in plans] == [12, 12]
    assert [[step.reads for step in plan.steps] for plan in plans] == [[(page,) for page in range(12)]] * 2


def test_layers_stay_whole_where_more_copies_would_take_longer() -> None:
    """The copies of small layers take their fixed time: half as large ones take it twice."""
    model, x = make(), torch.randn(3, WIDTH)
    least_bytes = planned(model, x, k=1).tradeoff()[0].peak_bytes
    assert planned(model, x, budget=least_bytes).pages == planned(model, x, k=1).pages


def test_in_training_layers_are_cut_only_to_fit() -> None:
    model, x = make(width=1024), torch.randn(512, 1024)
    whole = spcompile.plan(model, (x,), device="cpu", compiler="eager", k=1)
    budget = whole.tradeoff()[0].peak_bytes
    assert spcompile.plan(model, (x,), device="cpu", compiler="eager", budget=budget).pages == whole.pages


def test_pages_that_were_cut_stay_so() -> None:
    """A second graph of the model reads both halves of a layer at once, and says what that needs."""
    model, x = spcompile.offload(make(), device="cpu"), torch.randn(3, WIDTH)
    least_bytes = planned(make(), x, k=1).tradeoff()[0].peak_bytes
    with torch.no_grad():
        small = compiled(model, budget=least_bytes - 20_000)
        assert torch.equal(small(x), make()(x))
        torch._dynamo.reset()
        large = compiled(model, budget=2 * least_bytes)
        assert torch.equal(large(x), make()(x))
    plan = spcompile.plan(large)
    assert isinstance(plan, Plan)
    assert [len(step.reads) for step in plan.steps] == [2] * 6
    assert plan.peak_bytes() <= 2 * least_bytes


def said_to_do(error: Exception) -> int:
    """The smallest budget in bytes, by the message that one is too small."""
    match = re.search(r"the smallest that can be kept is ([\d,]+) bytes", str(error))
    assert match is not None
    return int(match[1].replace(",", ""))


@pytest.mark.parametrize("way", ["offloaded", "re-homed", "with host parameters"])
def test_each_graph_keeps_the_budget_when_it_runs(way: str) -> None:
    """A prompt has large values and few residents, a token the other way round, and they take turns: what stayed for
    the token was too much for the next prompt, and what the prompt had sent away was not there for the next token."""
    model, plain = make(), make()
    if way != "re-homed":
        spcompile.offload(model, device="cpu")
    if way == "with host parameters":
        spcompile.host_parameters(model)
    prompt, token = torch.randn(150, WIDTH), torch.randn(1, WIDTH)
    budget = planned(plain, prompt, k=2).peak_bytes()
    fast = compiled(model, budget=budget)
    with torch.no_grad():
        for x in (prompt, token, token, prompt, prompt, token):
            assert torch.equal(fast(x), plain(x))
            store = find_store(model.parameters())
            assert store is not None
            moves = store.moves
            with spcompile.record(fast) as recordings:
                assert torch.equal(fast(x), plain(x))
            assert store.moves == moves, "the second call in a row finds everything in place"
            plan = recordings[0].plan
            assert store.device_bytes() + plan.beside_bytes() <= budget
            assert all(store.weights[each.name].resident is not None for each in resident_weights(plan))
            assert recordings[0].moved_bytes[0] <= plan.bytes_moved + plan.arena_bytes  # one guess of what comes next
    plans = spcompile.plan(fast)
    assert isinstance(plans, tuple)
    few, many = (len(each.residents) for each in plans)
    assert few < many


def resident_weights(plan: Plan) -> list[Weight]:
    return [weight for page in plan.residents for weight in plan.pages[page].weights]


class NormedBlock(Block):
    """Its first and its last weights are small: a piece takes the last together with the first of the next use."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(super().forward(torch.relu(self.mix(x))))
        return y


class Recurrent(nn.Module):
    """One layer three times in a row, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([NormedBlock()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layers[0](x)
        return x


def test_layers_that_are_used_in_a_row_are_cut_between_their_uses() -> None:
    """A piece with the end of one use and the begin of the next reads the layer's weights in an order of its own."""
    model, x = Recurrent().eval(), torch.randn(3, WIDTH)
    layer_bytes = sum(each.nbytes for each in model.parameters())
    with torch.no_grad():
        with pytest.raises(BackendError) as caught:
            compiled(model, budget=1000)(x)
        least = said_to_do(caught.value)
        for budget in range(least, least + layer_bytes, layer_bytes // 8):
            torch._dynamo.reset()
            fast = compiled(spcompile.offload(Recurrent().eval(), device="cpu"), budget=budget)
            assert torch.equal(fast(x), model(x))


def test_a_budget_that_is_too_little_says_what_would_do() -> None:
    model, x = make(), torch.randn(3, WIDTH)
    with pytest.raises(BackendError, match=r"option 'budget' = 9\.77 KiB is too little") as caught, torch.no_grad():
        compiled(model, budget=10_000)(x)
    assert "for the values of segment" in str(caught.value)
    least = said_to_do(caught.value)
    with torch.no_grad():
        assert torch.equal(compiled(model, budget=least)(x), make()(x))
    with pytest.raises(BackendError, match=f"{least:,} bytes"), torch.no_grad():
        compiled(model, budget=least - 1)(x)


def test_the_least_memory_for_a_slowdown() -> None:
    model, x = make(), torch.randn(3, WIDTH)
    sizes = [planned(model, x, max_slowdown=slowdown).peak_bytes() for slowdown in (1.0, 3.0, 100.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    with torch.no_grad():
        assert torch.equal(compiled(model, max_slowdown=100.0)(x), make()(x))


def test_another_machine_plans_otherwise() -> None:
    model, x = make(), torch.randn(3, WIDTH)
    fast, slow = (planned(model, x, k=2, machine=name) for name in ("h100", "rtx4090"))
    assert fast.machine is not None
    assert slow.machine is not None
    assert fast.machine.name == "h100"
    assert sum(step.compute_us for step in slow.steps) >= sum(step.compute_us for step in fast.steps)
    assert slow.tradeoff()[0].iteration_us > fast.tradeoff()[0].iteration_us


def evaluated(plan: Plan, **values: int) -> int:
    expression = plan.peak_expr
    assert {str(symbol) for symbol in expression.free_symbols} == set(values)
    return int(expression.subs({symbol: values[str(symbol)] for symbol in expression.free_symbols}))


def test_the_peak_in_the_graph_s_own_sizes() -> None:
    model = make()
    plans = {}
    for rows in (3, 50):
        torch._dynamo.reset()
        x = torch.randn(rows, WIDTH)
        torch._dynamo.mark_dynamic(x, 0)
        plans[rows] = planned(model, x, k=2)
    one, other = plans[3], plans[50]
    ((name, rows),) = one.sizes
    assert rows == 3
    assert one.peak_bytes(**{name: 50}) == other.peak_bytes()
    assert evaluated(one, **{name: 50}, k=2) == other.peak_bytes()
    assert evaluated(one, **{name: 3}, k=3) == planned(model, torch.randn(3, WIDTH), k=3).peak_bytes()
    assert one.peak_bytes() < other.peak_bytes()
    assert Plan.from_json(one.to_json()) == one
    resident = next(point.plan for point in one.tradeoff() if 0 < len(point.plan.residents) < len(one.pages))
    n_residents = len(resident.residents)
    both = evaluated(resident, **{name: 3}, k=resident.k, residents=n_residents)
    more = evaluated(resident, **{name: 3}, k=resident.k, residents=n_residents + 1)
    assert both == resident.peak_bytes()
    assert more - both == one.pages[0].nbytes
    with pytest.raises(ValueError, match="unknown size 'batch'"):
        one.peak_bytes(batch=2)


def test_a_budget_and_a_second_graph_share_residents() -> None:
    model = spcompile.offload(make(), device="cpu")
    budget = planned(model, torch.randn(3, WIDTH), k=1).peak_bytes() + 2 * 4 * 2 * WIDTH * WIDTH + 4096
    fast = compiled(model, budget=budget)
    with torch.no_grad():
        for rows in (3, 5, 3, 5):
            x = torch.randn(rows, WIDTH)
            assert torch.equal(fast(x), make()(x))
    plans = spcompile.plan(fast)
    assert isinstance(plans, tuple)
    assert len({plan.residents for plan in plans}) == 1


def test_a_budget_for_a_model_without_weights() -> None:
    with pytest.raises(BackendError, match="0 B are for weights"), torch.no_grad():
        compiled(nn.Sequential(nn.ReLU(), nn.Tanh()), budget=1)(torch.randn(3, WIDTH))
    with torch.no_grad():
        assert compiled(nn.Sequential(nn.ReLU(), nn.Tanh()), budget="1MB")(torch.ones(3)).shape == (3,)


class Small(nn.Module):
    """Many small layers and a few large ones, as the stages of a convolutional net."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() if index % 8 == 7 else nn.Linear(WIDTH, WIDTH) for index in range(32))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_small_pages_are_merged_for_the_link() -> None:
    torch.manual_seed(0)
    plain, x = Small().requires_grad_(False), torch.randn(3, WIDTH)
    single = planned(plain, x, k=4)
    budget = single.peak_bytes() - single.peak_weight_bytes + single.weights_bytes * 2 // 3
    fast = compiled(spcompile.offload(copy.deepcopy(plain), device="cpu"), budget=budget)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(fast(x), plain(x))
    plan = spcompile.plan(fast)
    assert isinstance(plan, Plan)
    assert plan.peak_bytes() <= budget
    assert len(plan.steps) == len(single.steps) == 32
    assert len(plan.pages) < len(single.pages)
    assert {weight for page in plan.pages for weight in page.weights} == {
        weight for page in single.pages for weight in page.weights
    }
    assert any(".." in page.name for page in plan.pages)
    assert max(page.nbytes for page in plan.pages) == max(page.nbytes for page in single.pages)
    assert planned(plain, x, k=4).pages == single.pages  # k counts layers


def test_in_training_a_slowdown_that_gradients_on_their_way_exceed_keeps_all() -> None:
    """Each layer's gradients take longer to leave than the layer to compute, so that no plan was found."""
    model, x = spcompile.offload(make(), device="cpu"), torch.randn(3, WIDTH)
    fast = compiled(model, max_slowdown=1.05)
    fast(x).sum().backward()
    plan = spcompile.plan(fast)
    assert isinstance(plan, Plan)
    assert (len(plan.residents), plan.gradients_bytes) == (len(plan.pages), 0)
    roomy = compiled(spcompile.offload(make(), device="cpu"), max_slowdown=100.0)
    roomy(x).sum().backward()
    lean = spcompile.plan(roomy)
    assert isinstance(lean, Plan)
    assert lean.gradients_bytes > 0
    assert lean.peak_bytes() < plan.peak_bytes()


@pytest.mark.parametrize("way", ["offloaded", "re-homed", "with host parameters"])
@pytest.mark.parametrize(
    "between", ["evaluation", "another plan", "step of another part", "host parameters", "nothing"]
)
def test_what_happens_between_forward_and_backward(way: str, between: str) -> None:
    """What forward leaves on the device for backward may be stale, or gone, by then."""
    plain = make().train()
    unused = nn.Linear(WIDTH, WIDTH)
    body = make().train()
    model = nn.Sequential(body, unused)
    if way != "re-homed":
        spcompile.offload(model, device="cpu")
    if way == "with host parameters":
        spcompile.host_parameters(model)
    x = torch.randn(3, WIDTH)
    budget = planned(plain, x, k=100).peak_bytes()  # evaluation can keep everything, training cannot
    fast, narrow = compiled(body, budget=budget), compiled(body, k=2)
    optimizer = torch.optim.SGD(spcompile.host_parameters(unused) if "host" in way else unused.parameters(), 0.1)
    for _ in range(3):
        loss = fast(x).square().mean()
        plain(x).square().mean().backward()
        if between == "evaluation":
            with torch.no_grad():
                assert torch.equal(fast(x), plain(x))
        elif between == "another plan":
            narrow(x)
        elif between == "step of another part":
            unused(x).sum().backward()
            optimizer.step()
        elif between == "host parameters" and way != "re-homed":
            spcompile.host_parameters(model)
        loss.backward()
        for mine, other in zip(body.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0)
            mine.grad = other.grad = None
