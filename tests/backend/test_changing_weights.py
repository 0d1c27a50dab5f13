"""Weights that change between two calls of one compiled, offloaded model: right at once, and little is loaded again.

What a changed weight may cost is known exactly. At the end of a call the first pages of the next one are on their way,
so an edit of one of those loads it once more, and an edit of any other page costs nothing. `test_hints.py` shows this
for edits of a whole model in one go; here are the ways in which people change weights: training steps, single weights,
other models, checkpoints, adapters.

Each call is compared with eager calls of the same model, and of a plain one that lived through the same edits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.runtime.store import find_store
from tests.running import Event, Run, compile_offloaded, moved_by_plan

WIDTH = 16

LAYERS = [f"layers.{index}" for index in range(5)]

AHEAD = LAYERS[:2]
"""What k = 2, m = 1 has on its way when a call ends."""


class Layer(nn.Module):
    """A matrix, a bias, and a buffer."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) * self.scale


class Stack(nn.Module):
    """Identical layers, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in LAYERS)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def fc(self, index: int) -> nn.Linear:
        """The matrix of a layer, with its type."""
        layer = self.layers[index]
        assert isinstance(layer, Layer)
        return layer.fc


def stack(seed: int) -> Stack:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Stack()


def example() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))


def copied(events: Iterable[Event]) -> list[str]:
    """Pages copied, sorted."""
    return sorted(str(event[1]) for event in events if event[-1] == "copy")


class Pair:
    """A compiled model, and a plain one beside it."""

    def __init__(self, *, k: int = 2, seed: int = 0) -> None:
        self.model, self.plain = stack(0), stack(0)
        self.run = compile_offloaded(self.model, k=k, m=1, seed=seed)

    @property
    def both(self) -> tuple[Stack, Stack]:
        return self.model, self.plain

    def call(self) -> list[str]:
        """One call, whose result must be right; returns the pages that it copied, whose bytes must be right too."""
        events, before = len(self.run.events), moved(self.run)
        with torch.no_grad():
            actual = self.run.model(example())
            assert torch.equal(actual, self.model(example()))
            assert torch.equal(actual, self.plain(example()))
        pages = copied(self.run.events[events:])
        sizes = {page.name: page.nbytes for page in self.run.plan.pages}
        assert moved(self.run) - before == sum(sizes[page] for page in pages)
        return pages

    def warm(self) -> Pair:
        self.call()
        assert self.call() == LAYERS
        return self


def moved(run: Run) -> int:
    return sum(runtime.bytes_moved for runtime in run.store.runtimes())


# Training.


def by_hand(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=0.1)


def optimizer(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[list[nn.Parameter]], Callable[[], Any]]:
    """From parameters to what makes a step."""

    def make(parameters: list[nn.Parameter]) -> Callable[[], Any]:
        step: Callable[[], Any] = kind(parameters, lr=0.1, **options).step  # type: ignore[call-arg]
        return step

    return make


STEPS: dict[str, Callable[[list[nn.Parameter]], Callable[[], Any]]] = {
    "SGD": optimizer(torch.optim.SGD, foreach=False),
    "SGD, momentum, foreach": optimizer(torch.optim.SGD, momentum=0.9, foreach=True),
    "SGD, momentum, fused": optimizer(torch.optim.SGD, momentum=0.9, fused=True),
    "AdamW": optimizer(torch.optim.AdamW, foreach=False),
    "AdamW, foreach": optimizer(torch.optim.AdamW, foreach=True),
    "AdamW, fused": optimizer(torch.optim.AdamW, fused=True),
    "Adagrad, fused": optimizer(torch.optim.Adagrad, fused=True),
    "by hand": lambda parameters: lambda: by_hand(parameters),
}


@pytest.mark.parametrize("name", STEPS)
def test_training_steps_with_evaluation_in_between(name: str) -> None:
    """A step makes stale what is on its way for the next evaluation, and nothing else.

    The first layer's weights are not read in backward: nobody wants the gradient of the input.
    """
    model, plain = stack(0), stack(0)
    run = compile_offloaded(model, k=2, m=1)
    step, plain_step = (STEPS[name](list(each.parameters())) for each in (model, plain))
    for _ in range(3):
        events = len(run.events)
        for call in (run.model, plain):
            call(example()).square().sum().backward()
        pages = copied(run.events[events:])
        assert set(LAYERS) - set(pages) <= set(AHEAD), "what the evaluation before had on its way is used"
        assert len(pages) <= 2 * len(LAYERS) - 1, "each page once in forward, and once in backward at most"
        step()
        plain_step()
        for each in (model, plain):
            each.zero_grad()
        for _ in range(3):  # the last one comes after one that had an evaluation behind it the last time
            events = len(run.events)
            with torch.no_grad():
                assert torch.equal(run.model(example()), model(example()))
            pages = copied(run.events[events:])
            assert set(pages) == set(LAYERS)
            assert len(pages) <= len(LAYERS) + len(AHEAD)
        assert pages == LAYERS
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_step_on_another_model_costs_nothing() -> None:
    pair, other = Pair().warm(), stack(1)
    step = STEPS["AdamW, fused"](list(other.parameters()))
    other(example()).sum().backward()
    step()
    assert pair.call() == LAYERS


def test_a_step_on_one_layer_costs_no_more_than_what_is_ahead() -> None:
    pair = Pair().warm()
    for each in pair.both:
        step = STEPS["AdamW, fused"](list(each.layers[3].parameters()))
        for parameter in each.layers[3].parameters():
            parameter.grad = torch.ones_like(parameter)
        step()
    assert set(pair.call()) == set(LAYERS)
    assert pair.call() == LAYERS


def test_an_edit_between_forward_and_backward_is_refused_as_in_eager() -> None:
    pair = Pair()
    result = pair.run.model(example()).sum()
    with torch.no_grad():
        pair.model.fc(2).weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


# Single weights, in place.


def through_a_view(weight: Tensor) -> None:
    weight.view(-1)[3:7].fill_(0.5)


def through_an_index(weight: Tensor) -> None:
    weight[2] = 0.25


def with_out(weight: Tensor) -> None:
    torch.mul(weight, 1.5, out=weight)


EDITS: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda weight: weight.add_(0.5),
    "copy_": lambda weight: weight.copy_(torch.eye(WIDTH)),
    "a view": through_a_view,
    "an index": through_an_index,
    "detach": lambda weight: weight.detach().neg_(),
    "out=": with_out,
    "init": nn.init.zeros_,
    "foreach": lambda weight: torch._foreach_mul_([weight], 2.0),
    "foreach copy": lambda weight: torch._foreach_copy_([weight], [torch.eye(WIDTH)]),
}


@pytest.mark.parametrize("layer", [0, 1, 2, 4])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_one_weight(edit: str, layer: int) -> None:
    """Costs one copy where the weight's page was on its way, and else nothing."""
    pair = Pair().warm()
    with torch.no_grad():
        for each in pair.both:
            EDITS[edit](each.fc(layer).weight)
    again = [f"layers.{layer}"] if f"layers.{layer}" in AHEAD else []
    assert pair.call() == sorted([*LAYERS, *again])
    assert pair.call() == LAYERS


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_resident_weight_moves_nothing(edit: str) -> None:
    """It is the device copy that was edited."""
    pair = Pair(k=5)
    assert pair.call() == []
    with torch.no_grad():
        for each in pair.both:
            EDITS[edit](each.fc(1).weight)
    assert pair.call() == []


def test_an_edit_of_a_buffer_moves_nothing() -> None:
    pair = Pair().warm()
    for each in pair.both:
        for buffer in each.buffers():
            buffer.mul_(0.5)
    assert pair.call() == LAYERS


def test_reading_costs_nothing() -> None:
    """Neither looking at weights, nor saving them, nor a whole eager pass with gradients."""
    pair = Pair().warm()
    for weight in pair.model.state_dict().values():
        weight.sum().item()
    copy.deepcopy(pair.model)
    pair.model(example()).sum().backward()
    assert pair.call() == LAYERS


# Other models and checkpoints.


@pytest.mark.parametrize("offloaded", [False, True])
def test_weights_copied_from_another_model(offloaded: bool) -> None:
    pair, source = Pair().warm(), stack(1)
    if offloaded:
        spcompile.offload(source, device="cpu")
    with torch.no_grad():
        for each in pair.both:
            for mine, other in zip(each.parameters(), source.parameters(), strict=True):
                mine.copy_(other)
    assert pair.call() == sorted([*LAYERS, *AHEAD])
    assert pair.call() == LAYERS


def test_two_compiled_models_that_average_their_weights() -> None:
    """Each is edited in place by values of the other one, call after call."""
    pair, other = Pair().warm(), stack(1)
    plain_other = copy.deepcopy(other)
    spcompile.offload(other, device="cpu")
    fast = torch.compile(other, backend="superpipeline", options={"compiler": "eager", "k": 2, "m": 1})
    for _ in range(3):
        with torch.no_grad():
            for mine, theirs in ((pair.model, other), (pair.plain, plain_other)):
                for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
                    a.lerp_(b, 0.25)
                    b.lerp_(a, 0.25)
            assert torch.equal(fast(example()), plain_other(example()))
        pair.call()
    assert pair.call() == LAYERS


def test_a_checkpoint_of_some_weights() -> None:
    """``strict=False`` with the weights of a layer that is ahead and of one that is not."""
    pair = Pair().warm()
    chosen = {
        name: value + 1 for name, value in stack(1).state_dict().items() if name.startswith(("layers.1", "layers.4"))
    }
    for each in pair.both:
        each.load_state_dict(chosen, strict=False)
    assert pair.call() == sorted([*LAYERS, "layers.1"])
    assert pair.call() == LAYERS


def test_ones_own_state_dict_back() -> None:
    pair = Pair().warm()
    saved = {name: value.clone() for name, value in pair.model.state_dict().items()}
    before = example()
    with torch.no_grad():
        expected = pair.run.model(before)
        for each in pair.both:
            for parameter in each.parameters():
                parameter.zero_()
    pair.call()
    for each in pair.both:
        each.load_state_dict(saved)
    assert pair.call() == sorted([*LAYERS, *AHEAD])
    with torch.no_grad():
        assert torch.equal(pair.run.model(before), expected)


def assign(model: nn.Module) -> None:
    """Other parameters in place of the model's own: a checkpoint that is used as it is."""
    model.load_state_dict({name: value.clone() + 0.125 for name, value in model.state_dict().items()}, assign=True)


def test_assigned_weights_of_one_layer_are_used_where_they_are() -> None:
    """They are not offloaded, so they are not streamed either; the rest is."""
    pair = Pair().warm()
    for each in pair.both:
        assign(each.layers[2])
    assert set(pair.call()) >= set(LAYERS) - {"layers.2"}
    for each in pair.both:
        with torch.no_grad():
            each.fc(2).weight.mul_(1.5)
    pair.call()


def test_assigned_weights_are_not_copied_beside_what_they_replaced() -> None:
    pair = Pair().warm()
    for each in pair.both:
        assign(each.layers[2])
    assert pair.call() == sorted(set(LAYERS) - {"layers.2"})


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    fast: Callable[..., Tensor] = torch.compile(
        model, backend="superpipeline", options={"compiler": "eager", "k": 2, "m": 1}
    )
    return fast


def assign_all(model: nn.Module) -> None:
    assign(model)


def restore(model: nn.Module) -> None:
    spcompile.restore(model)


def convert_there_and_back(model: nn.Module) -> None:
    model.double().float()


@pytest.mark.parametrize("replace", [assign_all, restore, convert_there_and_back])
def test_all_weights_replaced_and_offloaded_again(replace: Callable[[nn.Module], None]) -> None:
    """What the message about weights that are no longer offloaded tells one to do. No reset of Dynamo."""
    torch._dynamo.reset()
    model = spcompile.offload(stack(0), device="cpu")
    with torch.no_grad():
        compiled(model)(example())
        replace(model)
        spcompile.offload(model, device="cpu")
        fast = compiled(model)
        for _ in range(2):
            assert torch.equal(fast(example()), model(example()))
    store = find_store(model.parameters())
    assert store is not None
    assert all(runtime.bytes_moved for runtime in store.runtimes())


def test_all_weights_assigned() -> None:
    """Nothing of the model is offloaded any more, but it is a model whose weights are there."""
    torch._dynamo.reset()
    model = spcompile.offload(stack(0), device="cpu")
    fast = compiled(model)
    with torch.no_grad():
        fast(example())
        assign(model)
        assert torch.equal(fast(example()), model(example()))


# Edits that leave no trace.


def data_of_all(model: Stack) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def data_of_one(model: Stack) -> None:
    model.fc(3).weight.data[1] = 2.0


def augmented(model: Stack) -> None:
    """``data`` is fetched, edited in place and set again."""
    for parameter in model.parameters():
        parameter.data += 0.5


def through_numpy(model: Stack) -> None:
    model.fc(0).weight.detach().numpy()[...] *= 2


UNTRACED: dict[str, Callable[[Stack], None]] = {
    "data of all": data_of_all,
    "data of one": data_of_one,
    "data +=": augmented,
    "numpy": through_numpy,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("edit", UNTRACED)
def test_refresh_after_edits_without_a_trace(edit: str, seed: int) -> None:
    """Costs one load of what was ahead, whatever was edited: nobody knows what it was."""
    pair = Pair(seed=seed).warm()
    for _ in range(2):
        for each in pair.both:
            UNTRACED[edit](each)
        spcompile.refresh(pair.model)
        assert pair.call() == sorted([*LAYERS, *AHEAD])
    assert pair.call() == LAYERS


@pytest.mark.parametrize("edit", UNTRACED)
def test_no_refresh_is_needed_where_everything_is_resident(edit: str) -> None:
    """A resident weight has one place only."""
    pair = Pair(k=5)
    pair.call()
    for each in pair.both:
        UNTRACED[edit](each)
    assert pair.call() == []


def test_refresh_of_a_part_is_enough() -> None:
    pair = Pair().warm()
    for each in pair.both:
        each.fc(1).weight.data.neg_()
    spcompile.refresh(pair.model.layers[1])
    assert pair.call() == sorted([*LAYERS, *AHEAD])


def swap_data(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        a.data, b.data = b.data, a.data


@pytest.mark.parametrize("seed", range(3))
def test_layers_that_swap_their_data(seed: int) -> None:
    """Both go on being streamed, each through the other one's page."""
    pair = Pair(seed=seed).warm()
    for each in pair.both:
        swap_data(each.layers[0], each.layers[3])
    assert set(pair.call()) == set(LAYERS)
    assert pair.call() == LAYERS


def test_layers_that_swap_places() -> None:
    pair = Pair().warm()
    for each in pair.both:
        each.layers[0], each.layers[3] = each.layers[3], each.layers[0]
    assert set(pair.call()) == set(LAYERS)
    assert pair.call() == LAYERS
    with torch.no_grad():
        for each in pair.both:
            each.fc(0).weight.mul_(1.5)
    pair.call()


def test_edits_in_place_after_a_swap_of_data() -> None:
    pair = Pair().warm()
    for each in pair.both:
        swap_data(each.layers[0], each.layers[3])
    pair.call()
    for _ in range(6):  # where the copy is made late, the edit is in it by luck
        pair.call()
        with torch.no_grad():
            for each in pair.both:
                each.fc(0).weight.mul_(1.5)
    pair.call()


# Adapters.


class Adapted:
    """A stack with adapters of peft. Its base may be offloaded before the adapters come, or all together after."""

    def __init__(self, *, before: bool, seed: int = 0) -> None:
        peft = pytest.importorskip("peft")
        torch._dynamo.reset()
        base = stack(0)
        if before:
            spcompile.offload(base, device="cpu")
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = {"target_modules": r"layers\.\d+\.fc", "init_lora_weights": False}
            self.model = peft.get_peft_model(base, peft.LoraConfig(r=2, **config))
            self.model.add_adapter("other", peft.LoraConfig(r=3, **config))
        if not before:
            spcompile.offload(self.model, device="cpu")
        store = find_store(self.model.parameters())
        assert store is not None
        store.log = []
        store.arena.streams.random.seed(seed)  # type: ignore[attr-defined]
        self.run = Run(compiled(self.model), store)

    def call(self, fast: Callable[..., Tensor] | None = None) -> tuple[Tensor, list[str]]:
        """One call, whose result must be that of eager; returns it, and the base weights copied, by page."""
        events = len(self.run.events)
        with torch.no_grad():
            actual = (self.run.model if fast is None else fast)(example())
            assert torch.equal(actual, self.model(example()))
        base = {page.name for page in self.run.store.pages if any(".fc." in each.name for each in page.weights)}
        return actual, [page for page in copied(self.run.events[events:]) if page in base]

    def steady(self) -> Tensor:
        """Once the call before was one of the same graph, each page is copied once."""
        for _ in range(2):
            self.call()
        result, pages = self.call()
        assert len(pages) == len(set(pages)) >= len(LAYERS)
        return result

    def train(self) -> None:
        """A step of the adapter in use, with the base frozen."""
        adapters = [each for each in self.model.parameters() if each.requires_grad]
        assert adapters
        step = torch.optim.AdamW(adapters, lr=0.1, fused=True)
        self.run.model(example()).sum().backward()
        assert all(each.grad is None for each in self.model.parameters() if not each.requires_grad)
        step.step()
        self.model.zero_grad()


WHEN = pytest.mark.parametrize("before", [True, False], ids=["base offloaded", "all offloaded"])


@WHEN
def test_adapters_in_turns(before: bool) -> None:
    """Adapters are weights of their own: taking another one leaves the base where it is."""
    adapted = Adapted(before=before)
    results = []
    for adapter in ("default", "other", "default", "other"):
        adapted.model.set_adapter(adapter)
        results.append(adapted.steady())
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])
    with adapted.model.disable_adapter(), torch.no_grad():
        assert torch.equal(adapted.steady(), stack(0)(example()))


@WHEN
def test_training_an_adapter(before: bool) -> None:
    adapted = Adapted(before=before)
    base = {name: each.detach().clone() for name, each in adapted.model.named_parameters() if ".fc.base" in name}
    first = adapted.steady()
    for _ in range(2):
        adapted.train()
        _, pages = adapted.call()
        assert len(pages) <= len(set(pages)) + 2 * len(AHEAD), "no more than what was ahead"
        adapted.steady()
    assert not torch.equal(adapted.steady(), first)
    now = dict(adapted.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in base.items()), "the base is frozen"


@WHEN
@pytest.mark.parametrize("seed", range(3))
def test_merging_an_adapter_and_back(before: bool, seed: int) -> None:
    """peft merges through ``.data``, so a refresh has to follow."""
    adapted = Adapted(before=before, seed=seed)
    apart = adapted.steady()
    for merge in (adapted.model.merge_adapter, adapted.model.unmerge_adapter):
        merge()
        spcompile.refresh(adapted.model)
        torch.testing.assert_close(adapted.steady(), apart)


@WHEN
def test_merging_for_good(before: bool) -> None:
    adapted = Adapted(before=before)
    adapted.train()
    apart = adapted.steady()
    adapted.model = adapted.model.merge_and_unload()
    assert [name for name, _ in adapted.model.named_parameters()] == [name for name, _ in stack(0).named_parameters()]
    spcompile.refresh(adapted.model)
    fast = compiled(adapted.model)
    for _ in range(2):
        merged, pages = adapted.call(fast)
        torch.testing.assert_close(merged, apart)
    assert len(pages) == len(LAYERS), "the base is streamed as before"


@pytest.mark.parametrize("seed", range(3))
def test_merging_for_good_with_checks_needs_no_refresh(seed: int) -> None:
    """``safe_merge`` gives the weights other memory, which is used where it is: nothing of it is streamed until the
    model is offloaded again."""
    adapted = Adapted(before=True, seed=seed)
    apart = adapted.steady()
    adapted.model = adapted.model.merge_and_unload(safe_merge=True)
    fast = compiled(adapted.model)
    for _ in range(2):
        torch.testing.assert_close(adapted.call(fast)[0], apart)


def test_adapters_on_a_language_model() -> None:
    """A class of transformers with its own names: a step on the adapters, and merged."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(config).eval()
        options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, **options))
    ids = torch.arange(24).reshape(2, 12)
    run = compile_offloaded(model, k=2, m=1)
    adapters = [each for each in model.parameters() if each.requires_grad]
    step = torch.optim.AdamW(adapters, lr=0.1)
    run.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    step.step()
    with torch.no_grad():
        for _ in range(2):
            logits = run.model(input_ids=ids, use_cache=False).logits
            assert torch.equal(logits, model(input_ids=ids, use_cache=False).logits)
        model.merge_adapter()
        spcompile.refresh(model)
        for _ in range(2):
            merged = run.model(input_ids=ids, use_cache=False).logits
            assert torch.equal(merged, model(input_ids=ids, use_cache=False).logits)
        torch.testing.assert_close(merged, logits)
    assert all(moved >= plan.bytes_moved > 0 for plan, moved in moved_by_plan(run.store))
