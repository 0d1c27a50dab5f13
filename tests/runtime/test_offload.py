"""`offload`, `restore` and the page store behind them, on the emulated device.

Each test moves a model and compares it with an ordinary one: values, aliasing, what is saved, when memory goes back.
"""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import spcompile.offload  # the module, whose name the function of the package hides
from spcompile.errors import OffloadError
from spcompile.ir import Interval, Page, Plan, Slot, Step, Weight
from spcompile.runtime import host
from spcompile.runtime import host as host_module
from spcompile.runtime.store import PageStore, find_store
from spcompile.runtime.weights import TAG, StoredWeight, tag_of
from tests import models

offload, restore, refresh = spcompile.offload, spcompile.restore, spcompile.refresh
offload_module = sys.modules["spcompile.offload"]
CPU = torch.device("cpu")
WIDTH = 8


class Views(nn.Module):
    """Buffers that look into a weight, one of them reversed in shape, and one of its own."""

    part: Tensor
    turned: Tensor
    own: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("part", self.fc.weight.detach()[2:4])
        self.register_buffer("turned", self.fc.weight.detach().t())
        self.register_buffer("own", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) + (x @ self.turned) * self.part.sum() + self.own.sum()
        return y


class Conv(nn.Module):
    """Channels-last weights and batch-norm statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x.reshape(-1, 1, 1, WIDTH).expand(-1, 3, 5, -1)))
        return y


class Mlp(nn.Module):
    """Two ordinary layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, 2 * WIDTH)
        self.two = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(torch.relu(self.one(x)))
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "views": Views,
    "channels last": Conv,
    **{name: lambda kind=kind: kind(WIDTH) for name, kind in models.KINDS.items()},  # type: ignore[misc]
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


@pytest.fixture
def plain(model: nn.Module, request: pytest.FixtureRequest) -> nn.Module:
    """An equal model that stays as it is. Not a deep copy: that would tear buffers off the weights they alias."""
    twin = build(request.node.callspec.params["model"])
    assert_same_state(twin, state(model))
    return twin


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


@pytest.fixture
def no_gc() -> Iterator[None]:
    """What dies in the test dies by its reference count."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def inputs() -> Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_state(actual: nn.Module, expected: dict[str, Tensor]) -> None:
    assert list(actual.state_dict()) == list(expected)
    for name, tensor in actual.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def geometry(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """All that must not change about a tensor, and which tensors share storages (the first one's name says)."""
    first: dict[int, str] = {}
    found: dict[str, tuple[object, ...]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        storage = tensor.untyped_storage()
        shared_with = first.setdefault(storage._cdata, name)
        layout = (tensor.shape, tensor.stride(), tensor.storage_offset(), storage.nbytes())
        found[name] = (id(tensor), tensor.dtype, *layout, tensor.requires_grad, shared_with)
    return found


def store_of(model: nn.Module) -> PageStore:
    store = find_store(model.parameters())
    assert store is not None
    return store


def stored(model: nn.Module) -> list[StoredWeight]:
    return list(store_of(model).weights.values())


def test_eager_forward_and_everything_about_the_tensors_stay(model: nn.Module, plain: nn.Module) -> None:
    before = geometry(model)
    assert offload(model, "cpu") is model
    assert geometry(model) == before
    assert torch.equal(model(inputs()), plain(inputs()))
    assert geometry(model) == before
    assert_same_state(model, state(plain))
    for parameter in model.parameters():
        assert tag_of(parameter) is not None


def test_restore_gives_ordinary_tensors(model: nn.Module) -> None:
    before, values = geometry(model), state(model)
    blocks = [weakref.ref(weight.block.mapping) for weight in stored(offload(model, "cpu"))]
    assert restore(model) is model
    assert geometry(model) == before
    assert_same_state(model, values)
    assert not any(TAG in tensor.__dict__ for tensor in (*model.parameters(), *model.buffers()))
    assert not any(block() for block in blocks)


def test_training_step_equals_an_ordinary_model(model: nn.Module, plain: nn.Module) -> None:
    offload(model, "cpu")
    for each in (model, plain):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            each(inputs()).square().mean().backward()
            optimizer.step()
    assert_same_state(model, state(plain))


def test_weights_lie_in_order_at_aligned_places() -> None:
    model = offload(nn.Sequential(*(nn.Linear(WIDTH, 3) for _ in range(3))), "cpu")
    weights = stored(model)
    assert [weight.name for weight in weights] == [name for name, _ in model.named_parameters()]
    assert [weight.offset_bytes for weight in weights] == [0, 256, 512, 768, 1024, 1280]
    assert len({id(weight.block) for weight in weights}) == 1
    for weight in weights:
        assert weight.current.untyped_storage().nbytes() == weight.nbytes
        assert weight.current.data_ptr() % 256 == 0


def test_blocks_are_closed_before_they_grow_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "BLOCK_BYTES", 1000)
    sizes = [100, 100, 100, 500, 20, 300]
    model = nn.ParameterList(torch.rand(size // 4) for size in sizes)
    values = state(model)
    blocks: dict[int, list[int]] = {}
    for weight in stored(offload(model, "cpu")):
        blocks.setdefault(id(weight.block), []).append(weight.nbytes)
    assert list(blocks.values()) == [[100, 100, 100], [500, 20], [300]]
    monkeypatch.setattr(host_module, "BLOCK_BYTES", 200)
    larger = stored(offload(nn.ParameterList(torch.rand(size // 4) for size in (20, 400, 20)), "cpu"))
    assert len({id(weight.block) for weight in larger}) == 3, "a larger weight has a block of its own"
    assert_same_state(model, values)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64, torch.bfloat16, torch.float64], ids=str
)
def test_dtypes(dtype: torch.dtype) -> None:
    values = torch.randn(5, 3).to(dtype)
    model = nn.ParameterDict({"odd": nn.Parameter(values.clone(), requires_grad=False), "scalar": torch.tensor(1.5)})
    offload(model, "cpu")
    assert model["odd"].dtype == dtype
    assert torch.equal(model["odd"].view(torch.uint8), values.view(torch.uint8))
    store_of(model).make_resident(["odd"])
    assert torch.equal(model["odd"].view(torch.uint8), values.view(torch.uint8))
    assert model["scalar"].shape == ()


def test_one_storage_of_two_dtypes_and_an_odd_size() -> None:
    flat = torch.arange(13, dtype=torch.uint8)
    model = nn.ParameterDict(
        {
            "bytes": nn.Parameter(flat, requires_grad=False),
            "floats": nn.Parameter(flat[4:12].view(torch.float32), requires_grad=False),
        }
    )
    before, values = geometry(model), state(model)
    assert [weight.nbytes for weight in stored(offload(model, "cpu"))] == [13]
    assert geometry(model) == before
    assert_same_state(model, values)


def test_frozen_and_trainable_keep_their_gradients() -> None:
    model = Mlp()
    model.one.requires_grad_(False)
    model(inputs()).sum().backward()
    gradient = model.two.weight.grad
    offload(model, "cpu")
    assert model.two.weight.grad is gradient
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True]
    model(inputs()).sum().backward()
    assert model.one.weight.grad is None
    assert model.two.weight.grad is gradient


def test_inference_tensors() -> None:
    with torch.inference_mode():
        made_inside = Mlp()
        expected = made_inside(inputs())
    outside = Mlp()
    with torch.inference_mode():
        offload(outside, "cpu")
    outside(inputs()).sum().backward()
    assert outside.one.weight.grad is not None
    offload(made_inside, "cpu")
    assert store_of(made_inside).version(["one.weight"]) == (0, (0,))
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(made_inside(inputs()), expected)
        restore(made_inside)


def test_originals_are_freed_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a block is filled, the weights of the block before it are gone."""
    monkeypatch.setattr(host_module, "BLOCK_BYTES", 256)
    model = nn.ParameterList(torch.rand(64) for _ in range(4))
    storages: list[Any] = [StorageWeakRef(each.untyped_storage()) for each in model]  # type: ignore[no-untyped-call]
    left: list[int] = []
    check = host.check_host_memory

    def watch(nbytes: int) -> None:
        left.append(sum(not storage.expired() for storage in storages))
        check(nbytes)

    monkeypatch.setattr(host, "check_host_memory", watch)
    offload(model, "cpu")
    assert left == [4, 3, 2, 1]
    assert all(storage.expired() for storage in storages)


def test_twice_changes_nothing(model: nn.Module) -> None:
    before = {name: tensor.data_ptr() for name, tensor in offload(model, "cpu").named_parameters()}
    store = store_of(model)
    names = list(store.weights)
    offload(model, "cpu")
    assert store_of(model) is store
    assert list(store.weights) == names
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == before


def test_weights_that_were_replaced_are_moved_by_the_next_call() -> None:
    model = offload(Mlp(), "cpu")
    store = store_of(model)
    model.two.half()
    assert tag_of(model.two.weight) is None, "half() made ordinary tensors of them"
    assert TAG in model.two.weight.__dict__
    offload(model, "cpu")
    assert store_of(model) is store
    assert model.two.weight.dtype == torch.float16
    names = [tag.name for tag in map(tag_of, model.parameters()) if tag is not None]
    assert names == ["one.weight", "one.bias", "two.weight#2", "two.bias#2"]


def test_parts_that_were_offloaded_apart_become_one() -> None:
    parts = [Mlp(), Mlp()]
    model = nn.Sequential(*parts, nn.Linear(WIDTH, 1))
    expected = model(inputs())
    for part in parts:
        offload(part, "cpu")
    pointers = [parameter.data_ptr() for part in parts for parameter in part.parameters()]
    store_of(parts[1]).make_resident(["one.bias"])
    offload(model, "cpu")
    store = store_of(model)
    assert all(store.holds(parameter) for parameter in model.parameters())
    assert len(store.weights) == len(list(model.parameters()))
    assert store.weights["1.one.bias"].resident is not None
    store.make_offloaded(store.weights)
    now = [parameter.data_ptr() for part in parts for parameter in part.parameters()]
    assert now == pointers, "nothing was copied"
    assert torch.equal(model(inputs()), expected)


def test_new_aliases_of_offloaded_weights_follow() -> None:
    model = Mlp()
    offload(model, "cpu")
    alias = nn.Parameter(model.one.weight.detach().t())
    model.register_parameter("alias", alias)
    offload(model, "cpu")
    store_of(model).make_resident(["one.weight"])
    assert alias.data_ptr() == model.one.weight.data_ptr()


def test_restoring_a_part() -> None:
    first, second = Mlp(), Mlp()
    second.one.weight = first.one.weight
    model = nn.Sequential(first, second)
    expected = model(inputs())
    offload(model, "cpu")
    store = store_of(model)
    restore(first)
    assert [store.holds(parameter) for parameter in model.parameters()] == [False] * 4 + [True] * 3
    assert second.one.weight is first.one.weight
    assert torch.equal(model(inputs()), expected)
    page = Page("p", tuple(Weight(name, 0) for name in ("0.one.weight", "1.one.bias")))
    assert [offset for offset, _ in store.pieces(page)] == [0]
    assert store.data_ptr("0.one.weight") == 0
    store.version(["0.one.weight"])


def test_restore_of_resident_weights_and_ordinary_models() -> None:
    model = Mlp()
    values = state(model)
    restore(model)
    offload(model, "cpu")
    store_of(model).make_resident(["one.weight"])
    restore(model)
    assert_same_state(model, values)


def test_stale_tags_go_with_restore() -> None:
    model = offload(Mlp(), "cpu")
    block = weakref.ref(stored(model)[0].block.mapping)
    model.half()
    assert block() is not None
    restore(model)
    assert block() is None


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("name", MODELS)
def test_memory_goes_back_when_the_model_dies(name: str) -> None:
    model = offload(build(name), "cpu")
    model(inputs()).sum()
    store = store_of(model)
    store.make_resident(list(store.weights)[:1])
    store.pieces(Page("p", tuple(Weight(each.name, each.nbytes) for each in store.weights.values())))
    alive = [weakref.ref(each.block.mapping) for each in store.weights.values()] + [weakref.ref(store)]
    del store
    assert all(each() is not None for each in alive)
    del model
    assert not any(each() is not None for each in alive)


@pytest.mark.usefixtures("no_gc")
def test_a_tensor_outlives_its_model() -> None:
    model = Mlp()
    expected = model.one.weight.detach().clone()
    offload(model, "cpu")
    block = weakref.ref(stored(model)[0].block.mapping)
    row = model.one.weight.detach()[1:2]
    del model
    assert block() is not None
    assert torch.equal(row, expected[1:2])
    del row
    assert block() is None


def test_resident_and_back_keeps_the_graph_and_the_values(model: nn.Module) -> None:
    model.eval()
    before, values = geometry(model), state(model)
    offload(model, "cpu")
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = fast(inputs())
        store = store_of(model)
        store.make_resident(store.weights)
        assert all(weight.resident is not None for weight in store.weights.values())
        assert geometry(model) == before
        first = fast(inputs())
        for parameter in model.parameters():
            parameter.mul_(2).mul_(0.5)
        store.make_offloaded(store.weights)
        assert geometry(model) == before
        second = fast(inputs())
    if not any(isinstance(each, models.Counter) for each in model.modules()):
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)
        assert_same_state(model, values)
    assert len(compiled) == 1, "swapping recompiles nothing"


def test_edits_of_a_resident_weight_are_written_back() -> None:
    model = offload(Mlp(), "cpu")
    store = store_of(model)
    store.make_resident(["one.weight"])
    generation = store.generation
    model.one.weight.data.fill_(3)
    store.weights["one.weight"].host.fill_(0xFF)
    store.make_offloaded(["one.weight"])
    assert (model.one.weight == 3).all()
    assert store.generation > generation, "a slot may hold the weight as it was"


def test_what_looks_elsewhere_is_left_alone() -> None:
    model = offload(Mlp(), "cpu")
    model.one.weight.data = torch.ones_like(model.one.weight)
    store_of(model).make_resident(["one.weight", "one.bias"])
    assert (model.one.weight == 1).all()
    assert tag_of(model.one.weight) is None


def test_no_room_for_residents_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = offload(Mlp(), "cpu")
    store = store_of(model)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(OffloadError, match=r"no room on cpu for .*'two.weight'"):
            store.make_resident(["two.weight", "two.bias"])
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert store.device_bytes() == 0


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=False),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_make_copies_stale(make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    model, other = offload(Mlp(), "cpu"), offload(Mlp(), "cpu")
    optimizer = make_optimizer(model.parameters())
    model(inputs()).sum().backward()
    versions = [store_of(each).version(["one.weight"]) for each in (model, other)]
    optimizer.step()
    assert store_of(model).version(["one.weight"]) != versions[0]
    assert store_of(other).version(["one.weight"]) == versions[1], "not those of another model"


def test_edits_and_refresh_make_copies_stale() -> None:
    model = offload(Mlp(), "cpu")
    store = store_of(model)
    edits: list[Callable[[], object]] = [
        lambda: model.one.weight.detach().mul_(2),
        lambda: model.load_state_dict(model.state_dict()),
        lambda: refresh(model),
    ]
    for edit in edits:
        version = store.version(["one.weight"])
        assert store.version(["one.weight"]) == version
        edit()
        assert store.version(["one.weight"]) != version
    version = store.version(["one.weight"])
    model.one.weight.data.mul_(2)
    assert store.version(["one.weight"]) == version, "if this is noticed now, refresh can go"


@pytest.mark.parametrize("what", ["model", "state_dict", "parameter"])
def test_saving_writes_ordinary_tensors(what: str) -> None:
    plain = nn.Linear(64, 64)
    model = offload(copy.deepcopy(plain), "cpu")

    def save(each: nn.Module) -> bytes:
        file = io.BytesIO()
        torch.save({"model": each, "state_dict": each.state_dict(), "parameter": each.weight}[what], file)
        return file.getvalue()

    saved = save(model)
    assert len(saved) <= len(save(plain)) + 1024
    assert b"spcompile.runtime" not in saved
    loaded = torch.load(io.BytesIO(saved), weights_only=what != "model")
    weight = loaded["weight"] if what == "state_dict" else getattr(loaded, "weight", loaded)
    assert torch.equal(weight, plain.weight)
    assert tag_of(weight) is None


def test_saving_a_buffer_that_aliases_a_weight() -> None:
    file = io.BytesIO()
    torch.save(offload(Views(), "cpu").get_buffer("part"), file)
    file.seek(0)
    assert tag_of(torch.load(file)) is None


@pytest.mark.usefixtures("no_gc")
def test_a_deep_copy_is_an_ordinary_model(model: nn.Module) -> None:
    offload(model, "cpu")
    other = copy.deepcopy(model)
    assert all(tag_of(tensor) is None for tensor in (*other.parameters(), *other.buffers()))
    assert_same_state(other, state(model))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    offload(other, "cpu")
    assert store_of(other) is not store_of(model)


class Wrapped(Tensor):
    """A tensor subclass, as quantization libraries make."""


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.rand(3).as_subclass(Wrapped), "it is a Wrapped, a tensor subclass"),
        (torch.eye(3).to_sparse(), "layout is torch.sparse_coo"),
        (torch.empty(3, device="meta"), "meta device"),
        (torch.rand(3, dtype=torch.complex64).conj(), "lazy conjugate"),
    ],
    ids=["subclass", "sparse", "meta", "conjugate"],
)
def test_weights_that_cannot_move_are_named_before_anything_moves(weight: Tensor, message: str) -> None:
    model = nn.ParameterDict({"good": torch.rand(2), "bad": nn.Parameter(weight)})
    pointer = model["good"].data_ptr()
    with pytest.raises(OffloadError, match=f"weight 'bad': .*{message}"):
        offload(model, "cpu")
    assert model["good"].data_ptr() == pointer
    assert tag_of(model["good"]) is None


def test_uninitialised_weights_and_meta_buffers_are_named() -> None:
    with pytest.raises(OffloadError, match="weight 'weight': it is not initialised"):
        offload(nn.LazyLinear(3), "cpu")
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.empty(2, device="meta"))
    with pytest.raises(OffloadError, match="buffer 'mask' is on the meta device"):
        offload(model, "cpu")


@pytest.mark.parametrize("function", [offload, restore, refresh])
def test_what_is_no_module(function: Callable[[Any], Any]) -> None:
    with pytest.raises(OffloadError, match=rf"{function.__name__} needs a torch\.nn\.Module, not a value of type str"):
        function("x")


def test_a_parameter_class_of_ones_own_is_fine() -> None:
    class Mine(nn.Parameter):
        pass

    model = nn.Linear(2, 2)
    model.weight = Mine(torch.rand(2, 2))
    offload(model, "cpu")
    assert tag_of(model.weight) is not None
    assert isinstance(model.weight, Mine)


def test_running_out_of_host_memory_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "BLOCK_BYTES", 512)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    model[3].weight = model[0].weight
    expected, before, values = model(inputs()), geometry(model), state(model)
    left = iter([10**6, 10**6, 10**6, 100])
    with monkeypatch.context() as patch:
        patch.setattr(host, "available_host_bytes", lambda: next(left))
        with pytest.raises(OffloadError, match=r"not enough host memory: .* 100 bytes are"):
            offload(model, "cpu")
    assert next(left, None) is None
    assert geometry(model) == before
    assert_same_state(model, values)
    assert torch.equal(model(inputs()), expected)
    assert not any(TAG in parameter.__dict__ for parameter in model.parameters())
    offload(model, "cpu")
    assert torch.equal(model(inputs()), expected)


def test_no_weights_at_all() -> None:
    model = offload(nn.Sequential(nn.ReLU()), "cpu")
    assert find_store(model.parameters()) is None
    restore(model)
    refresh(model)
    store = PageStore(CPU)
    assert store.weight_of(torch.ones(1)) is None
    assert store.device_bytes() == 0


def make_page(model: nn.Module, name: str, prefix: str) -> Page:
    weights = [weight for weight in stored(model) if weight.name.startswith(prefix)]
    return Page(name, tuple(Weight(each.name, each.nbytes) for each in weights))


def test_a_layer_is_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "BLOCK_BYTES", 1800)
    model = offload(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))), "cpu")
    store = store_of(model)
    for index, layer in enumerate(model):
        page = make_page(model, f"p{index}", f"{index}.")
        slot = torch.zeros(page.slot_bytes, dtype=torch.uint8)
        for offset, source in store.pieces(page):
            slot[offset : offset + source.numel()] = source
        for parameter, offset in zip(layer.parameters(), page.offsets_bytes, strict=True):
            there = slot[offset : offset + parameter.nbytes].view(torch.float32)
            assert torch.equal(there, parameter.flatten())
    assert [len(store.pieces(make_page(model, f"p{index}", f"{index}."))) for index in range(4)] == [1, 1, 1, 2]


def test_pieces_follow_the_weight() -> None:
    """Also a graph that streams a page which another graph keeps resident copies what is true."""
    model = offload(nn.Linear(WIDTH, WIDTH), "cpu")
    store = store_of(model)
    page = make_page(model, "page", "")
    assert len(store.pieces(page)) == 1
    store.make_resident(["weight"])
    model.weight.data.fill_(5)
    pieces = dict(store.pieces(page))
    assert (pieces[0].view(torch.float32) == 5).all()
    assert list(pieces) == [0, 256]
    store.make_offloaded(["weight"])
    assert (store.pieces(page)[0][1][:256].view(torch.float32) == 5).all()


def test_place_follows_the_plan() -> None:
    model = offload(Mlp(), "cpu")
    store = store_of(model)
    pages = (make_page(model, "one", "one."), make_page(model, "two", "two.weight"))
    leftover = Weight("two.bias", store.weights["two.bias"].nbytes)

    def plan(streamed: int) -> Plan:
        page = pages[streamed]
        return Plan(
            device="cpu",
            k=1,
            m=1,
            wraps=False,
            pages=pages,
            leftovers=(leftover,),
            residents=(1 - streamed,),
            steps=(Step("a", None, (0,)), Step("b", None, (1,))),
            slots=(Slot(0, page.slot_bytes),),
            period=1,
            intervals=(Interval(streamed, streamed, streamed + 1, (0,)),),
        )

    store.add_pages(pages)
    store.add_pages(pages)
    assert store.pages == list(pages)
    for streamed in (0, 1, 0):
        store.place(plan(streamed))
        staying = pages[1 - streamed]
        assert store.resident_pages() == [staying.name]
        assert store.device_bytes() == staying.nbytes + leftover.nbytes
        assert (tag := tag_of(model.two.bias)) is not None
        assert store.weight_of(model.two.bias) == leftover == Weight(tag.name, WIDTH * 4)
