"""What only CUDA can show of `offload`: pinned memory that the GPU reads, device memory that comes free, unpinning."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from spcompile import offload, restore
from spcompile.errors import OffloadError
from spcompile.ir import Page, Weight
from spcompile.runtime.host import HostBlock
from spcompile.runtime.store import PageStore, find_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH = 1024
LAYER_BYTES = (WIDTH * WIDTH + WIDTH) * 4


class Block(nn.Module):
    """A layer with a weight, a bias, and a buffer of its own."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) * self.scale


def build(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(8))).to(device)


def inputs() -> Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1)).cuda()


def keep_busy(cycles: int) -> None:
    """Let the current stream wait on the device; 50 million cycles are about 30 ms."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.cpu().contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def store_of(model: nn.Module) -> PageStore:
    store = find_store(model.parameters())
    assert store is not None
    return store


@pytest.fixture(autouse=True)
def _clean_device() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("source", ["cpu", "cuda"])
def test_weights_are_cuda_tensors_that_take_no_device_memory(source: str) -> None:
    model = build(source)
    expected = copy.deepcopy(model).cuda()(inputs()).detach()
    values = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    gc.collect()
    before_bytes = torch.cuda.memory_allocated()
    offload(model)
    held_bytes = 8 * LAYER_BYTES if source == "cuda" else 0
    buffers_bytes = 8 * WIDTH * 4
    assert torch.cuda.memory_allocated() <= before_bytes - held_bytes + buffers_bytes
    assert all(tensor.device == torch.device("cuda", 0) for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(model(inputs()), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), values[name]), name
    for weight in store_of(model).weights.values():
        assert weight.block.registered
        assert weight.host.is_pinned()
        assert weight.view.data_ptr() == weight.host.data_ptr()
        assert weight.view.untyped_storage().nbytes() == weight.nbytes
        assert weight.view.data_ptr() % 256 == 0


def test_restore_and_saving(tmp_path: Path) -> None:
    model = build("cpu")
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    offload(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 8 * (LAYER_BYTES + WIDTH * 4) * 1.02
    loaded = torch.load(tmp_path / "state.pt", map_location="cpu")
    blocks = [weakref.ref(weight.block.mapping) for weight in store_of(model).weights.values()]
    for device in ("cuda", "cpu"):
        restore(model, device)
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {device}
        assert not any(block() for block in blocks)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name]), name
        assert torch.equal(loaded[name], values[name]), name


def test_resident_and_back_without_recompiling() -> None:
    model = offload(build("cpu").eval())
    store = store_of(model)
    counter = CompileCounter()
    fast = torch.compile(model, backend=counter)
    with torch.no_grad():
        expected = fast(inputs())
        before_bytes = torch.cuda.memory_allocated()
        store.make_resident(store.weights)
        assert torch.cuda.memory_allocated() >= before_bytes + 8 * LAYER_BYTES
        assert torch.equal(fast(inputs()), expected)
        model.get_parameter("0.fc.weight").data.mul_(2)
        changed = fast(inputs())
        store.make_offloaded(store.weights)
        assert torch.cuda.memory_allocated() <= before_bytes + 2 * inputs().nbytes
        assert torch.equal(fast(inputs()), changed)
    assert counter.frame_count == 1


@pytest.mark.parametrize("fused", [False, True])
def test_training_step(fused: bool) -> None:
    model, plain = build("cuda"), build("cuda")
    offload(model)
    version = store_of(model).version(["0.fc.weight"])
    for each in (model, plain):
        optimizer = torch.optim.AdamW(each.parameters(), fused=fused)
        for _ in range(2):
            optimizer.zero_grad()
            each(inputs()).square().mean().backward()
            optimizer.step()
    assert store_of(model).version(["0.fc.weight"]) != version
    for (name, actual), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, msg=f"{name} differs")


def test_a_page_is_copied_at_once_from_pinned_memory() -> None:
    model = offload(build("cpu"))
    store = store_of(model)
    weights = [store.weights[name] for name in ("1.fc.weight", "1.fc.bias")]
    page = Page("1", tuple(Weight(each.name, each.nbytes) for each in weights))
    ((offset_bytes, source),) = store.pieces(page)
    slot = torch.empty(page.slot_bytes, dtype=torch.uint8, device="cuda")
    keep_busy(100_000_000)  # the copy must not wait for this on the host
    busy: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    slot[offset_bytes : offset_bytes + source.numel()].copy_(source, non_blocking=True)
    busy.record()
    assert not busy.query(), "the copy waited: its source is not pinned"
    torch.cuda.synchronize()
    for weight, offset in zip(weights, page.offsets_bytes, strict=True):
        assert torch.equal(slot[offset : offset + weight.nbytes].cpu(), weight.host)


def test_memory_goes_back_when_the_model_dies_while_a_kernel_reads_it() -> None:
    gc.disable()
    try:
        model = offload(build("cpu"))
        blocks = [weakref.ref(weight.block.mapping) for weight in store_of(model).weights.values()]
        expected = model(inputs()).detach().clone()
        keep_busy(50_000_000)
        with torch.no_grad():
            output = model(inputs())
        del model
        assert not any(block() for block in blocks)
        assert torch.equal(output, expected)
        for _ in range(3):  # addresses are used again: what was not unregistered would fail here
            del_me = offload(build("cpu"))
            del del_me
    finally:
        gc.enable()


def test_a_weight_larger_than_a_gibibyte() -> None:
    """One registration for the whole weight: clones, residents and pages are copies of one range."""
    model = nn.ParameterDict({"large": nn.Parameter(torch.zeros(3 << 29, dtype=torch.uint8), requires_grad=False)})
    model["large"][::4096] = 7
    offload(model)
    store = store_of(model)
    assert int(model["large"].clone().sum(dtype=torch.int64)) == 7 * (3 << 29) // 4096
    store.make_resident(["large"])
    model["large"][0] = 9
    store.make_offloaded(["large"])
    assert int(store.weights["large"].host[0]) == 9
    restore(model)


def test_dtypes_empty_tied_and_shared() -> None:
    flat = torch.randn(200)
    model = nn.ParameterDict(
        {
            "empty": torch.empty(0, 4),
            "fp8": nn.Parameter(torch.randn(7, 5).to(torch.float8_e4m3fn), requires_grad=False),
            "int8": nn.Parameter(torch.arange(33, dtype=torch.int8), requires_grad=False),
            "one": nn.Parameter(flat[:150].view(10, 15)),
            "other": nn.Parameter(flat[100:].view(10, 10).t()),
        }
    )
    values = {name: tensor.detach().clone() for name, tensor in model.items()}
    offload(model)
    store = store_of(model)
    assert list(store.weights) == ["empty", "fp8", "int8", "one"]
    for move in (store.make_resident, store.make_offloaded):
        move(store.weights)
        for name, tensor in model.items():
            assert tensor.stride() == values[name].stride(), name
            assert same_bytes(tensor, values[name]), name
    with torch.no_grad():
        model["one"].view(-1)[100] = 42
    assert float(model["other"].detach()[0, 0]) == 42


def test_refused_registration_leaves_cuda_usable() -> None:
    block = HostBlock(1 << 20, torch.device("cuda", 0))
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    assert int(cudart.cudaHostRegister(block.mapping.pointer, 1 << 20, 0)) == 0
    with pytest.raises(OffloadError, match="CUDA cannot pin 1,048,576 bytes of host memory"):
        block.register()
    assert int(torch.ones(3, device="cuda").sum()) == 3, "the error must not come back"
    assert int(cudart.cudaHostUnregister(block.mapping.pointer)) == 0
    block.register()
    assert block.registered


def test_from_the_emulated_device_to_the_gpu() -> None:
    model = offload(build("cpu"), "cpu")
    expected = model(inputs().cpu())
    offload(model, "cuda")
    assert next(model.parameters()).device.type == "cuda"
    torch.testing.assert_close(model(inputs()).cpu(), expected, rtol=1e-4, atol=1e-4)


def test_fork_and_exit_are_quiet() -> None:
    script = (
        "import os, torch, spcompile\n"
        "model = spcompile.offload(torch.nn.Linear(512, 512))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    del model\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "model(torch.ones(1, 512, device='cuda')).sum().item()\n"
        "cycle = [model]\n"
        "cycle.append(cycle)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
