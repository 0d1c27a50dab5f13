"""Plans for what is not here: models without values, and a GPU that this machine lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import spcompile
from spcompile import absent
from spcompile.cuda_attention import attention, choose_operator
from spcompile.dry_run import capture_programs
from spcompile.ir import Plan, Plans
from spcompile.options import parse_options

ROOT = Path(__file__).resolve().parent.parent

WIDTH = 16

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="plans for a GPU that is here are not for an absent one")


class Block(nn.Module):
    """Attention and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        y: Tensor = x + self.out(mixed.transpose(1, 2).flatten(2))
        return y


class Model(nn.Module):
    """A table, three blocks, a buffer, and a head that is tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.register_buffer("scale", torch.ones(WIDTH))
        self.shift = torch.zeros(WIDTH)  # neither a parameter nor a buffer
        self.head = nn.Linear(WIDTH, 32, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x * self.scale + self.shift)
        return y


class Breaking(Model):
    """The graph breaks before the head."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks[0](self.table(tokens))
        torch._dynamo.graph_break()
        y: Tensor = self.head(x)
        return y


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def without_values(kind: type[Model] = Model, dtype: torch.dtype = torch.float32) -> Model:
    with torch.device("meta"):
        return kind().to(dtype).eval()


def tokens(length: int = 8, device: str = "cpu") -> Tensor:
    return torch.zeros(2, length, dtype=torch.int64, device=device)


def operators(model: nn.Module, **options: Any) -> Counter[str]:
    """What the only ATen graph of a call consists of."""
    (program,) = capture_programs(model, (tokens(),), {}, parse_options(options))
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def holders(model: nn.Module) -> list[tuple[int, str, int]]:
    """Every tensor of a model: which module has it, under which name, and which object it is."""
    return [
        (id(module), name, id(value))
        for module in model.modules()
        for holder in (module._parameters, module._buffers, vars(module))
        for name, value in holder.items()
        if isinstance(value, Tensor)
    ]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_without_values_has_the_plan_of_one_with_values(device: str, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        plan = spcompile.plan(without_values(), (tokens(device=device),), device="cpu", k=2, m=1)
        assert plan == spcompile.plan(Model().eval(), (tokens(),), device="cpu", k=2, m=1)
    assert len(plan.pages) == 4  # the tied weight is one page of its own
    assert plan.wraps is not grad


def test_the_model_is_untouched() -> None:
    model = without_values()
    block = model.blocks[1]
    assert isinstance(block, Block)
    nn.utils.parametrizations.weight_norm(block.out)
    before = holders(model)
    with torch.no_grad():
        spcompile.plan(model, (tokens(),), k=2, m=1)
        assert holders(model) == before
        with pytest.raises(TypeError):
            spcompile.plan(model, (tokens(), tokens()), k=2, m=1)
    assert holders(model) == before
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.head.weight is model.table.weight


def test_only_what_has_no_values_is_replaced() -> None:
    model = without_values()
    model.scale = torch.ones(WIDTH)
    with absent.stand_ins(model) as made:
        assert model.scale is not None
        assert all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))
        assert model.head.weight is model.table.weight
        assert isinstance(model.head.weight, nn.Parameter)
        assert id(model.scale) not in made.tensors
        storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        assert len(storages) == len(list(model.parameters()))


def test_views_of_one_storage_stay_views_of_one_storage() -> None:
    flat = torch.zeros(12, dtype=torch.bfloat16, device="meta")
    made = absent.StandIns()
    first, second = (made.of(each) for each in (flat[:6].view(2, 3).t(), flat[6:]))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert (first.shape, first.stride(), second.storage_offset()) == ((3, 2), (1, 3), 6)
    assert first.dtype == torch.bfloat16
    assert not second.any()


def test_a_graph_break_in_a_model_without_values() -> None:
    model = without_values(Breaking)
    before = holders(model)
    with (
        torch.no_grad(),
        pytest.raises(spcompile.OptionError, match=r"only if it is one graph.*TORCH_LOGS=graph_breaks"),
    ):
        spcompile.plan(model, (tokens(),), k=2, m=1)
    assert holders(model) == before


def test_what_has_no_stand_in() -> None:
    class Special(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.LazyLinear(3, device="meta")

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y

    with pytest.raises(spcompile.OptionError, match="UninitializedParameter on the meta device cannot be planned"):
        spcompile.plan(Special(), (torch.zeros(2, 3),), k=2, m=1)


@no_cuda
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_an_absent_gpu(grad: bool, values: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Model().eval() if values else without_values()
    with torch.set_grad_enabled(grad):
        emulated = spcompile.plan(model, (tokens(),), device="cpu", k=2, m=1)
        plan = spcompile.plan(model, (tokens(),), device="cuda", k=2, m=1)
        assert spcompile.plan(model, (tokens(),), device="cuda:1", k=2, m=1).device == "cuda:1"
    assert (emulated.device, plan.device) == ("cpu", "cuda:0")
    assert (plan.pages, plan.intervals) == (emulated.pages, emulated.intervals)
    assert [(step.segment, step.reads) for step in plan.steps] == [
        (step.segment, step.reads) for step in emulated.steps
    ]
    assert "no CUDA device here: planning for a cuda:0 with 74.51 GiB" in caplog.text


@no_cuda
def test_a_model_that_is_offloaded_to_the_emulated_device() -> None:
    model = spcompile.offload(Model().eval(), device="cpu")
    with torch.no_grad():
        assert spcompile.plan(model, (tokens(),), device="cuda", k=2, m=1).device == "cuda:0"
        assert spcompile.plan(model, (tokens(),), k=2, m=1).device == "cpu"


@no_cuda
def test_without_k_the_memory_of_an_absent_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert spcompile.plan(without_values(), (tokens(),), device="cuda").intervals == ()
        monkeypatch.setattr("spcompile.dry_run.ABSENT_GPU_BYTES", 16_000)
        assert spcompile.plan(without_values(), (tokens(),), device="cuda").intervals


@no_cuda
def test_pieces_of_a_model_with_values_run_where_they_are() -> None:
    """Re-homing rewrites what is planned, never what runs."""
    with torch.no_grad():
        plans = spcompile.plan(Breaking().eval(), (tokens(),), device="cuda", k=2, m=1)
    assert isinstance(plans, Plans)
    assert [plan.device for plan in plans] == ["cuda:0", "cuda:0"]


@no_cuda
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("dtype", "operator"), [(torch.float32, "efficient"), (torch.bfloat16, "cudnn"), (torch.float64, None)]
)
def test_attention_stays_whole(dtype: torch.dtype, operator: str | None, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        found = operators(without_values(dtype=dtype), device="cuda")
    whole = f"aten._scaled_dot_product_{operator}_attention.default"
    assert found[whole] == (3 if operator else 0)
    assert bool(found["aten.bmm.default"]) == (operator is None)


@no_cuda
def test_autocast_acts_as_on_the_gpu() -> None:
    class Cast(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return super().forward(tokens)

    with torch.no_grad():
        inside = operators(without_values(Cast), device="cuda")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            around = operators(without_values(), device="cuda")
    assert inside["aten._scaled_dot_product_cudnn_attention.default"] == 3
    assert around == inside


def half(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def mask(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device="meta")


CUDNN_ONCE = SDPBackend.CUDNN_ATTENTION if torch.__version__ < "2.12" else None
"""torch 2.11 lets cuDNN take larger heads and any dropout."""

CHOICES: dict[str, tuple[tuple[Any, ...], dict[str, Any], SDPBackend]] = {
    "plain": ((half(1, 32, 128, 128),) * 3, {}, SDPBackend.CUDNN_ATTENTION),
    "causal": ((half(1, 32, 128, 128),) * 3, {"is_causal": True}, SDPBackend.CUDNN_ATTENTION),
    "mask": ((half(1, 32, 128, 128),) * 3, {"mask": mask(1, 1, 128, 128)}, SDPBackend.CUDNN_ATTENTION),
    "mask of three dimensions": ((half(2, 4, 9, 64),) * 3, {"mask": mask(4, 9, 9)}, SDPBackend.EFFICIENT_ATTENTION),
    "fp32": ((half(1, 32, 128, 128, dtype=torch.float32),) * 3, {}, SDPBackend.EFFICIENT_ATTENTION),
    "fp64": ((half(1, 32, 128, 128, dtype=torch.float64),) * 3, {}, SDPBackend.MATH),
    "groups": (
        (half(1, 8, 9, 64), half(1, 2, 9, 64), half(1, 2, 9, 64)),
        {"enable_gqa": True},
        SDPBackend.CUDNN_ATTENTION,
    ),
    "groups in fp32": (
        (half(1, 8, 9, 64, dtype=torch.float32), *(half(1, 2, 9, 64, dtype=torch.float32),) * 2),
        {"enable_gqa": True},
        SDPBackend.MATH,
    ),
    "head of 12": ((half(2, 4, 9, 12),) * 3, {}, SDPBackend.FLASH_ATTENTION),
    "head of 12 and a mask": ((half(2, 4, 9, 12),) * 3, {"mask": mask(9, 9)}, SDPBackend.MATH),
    "head of 256": ((half(2, 4, 9, 256),) * 3, {}, CUDNN_ONCE or SDPBackend.FLASH_ATTENTION),
    "head of 256 and a mask": (
        (half(2, 4, 9, 256),) * 3,
        {"mask": mask(9, 9)},
        CUDNN_ONCE or SDPBackend.EFFICIENT_ATTENTION,
    ),
    "head of 264": ((half(2, 4, 9, 264),) * 3, {}, SDPBackend.EFFICIENT_ATTENTION),
    "one key": ((half(2, 4, 1, 64),) * 3, {}, SDPBackend.FLASH_ATTENTION),
    "causal, not square": ((half(2, 4, 3, 12), *(half(2, 4, 9, 12),) * 2), {"is_causal": True}, SDPBackend.MATH),
    "dropout of a tenth": ((half(2, 4, 9, 64),) * 3, {"dropout_p": 0.1}, CUDNN_ONCE or SDPBackend.FLASH_ATTENTION),
    "dropout and one query": (
        (half(2, 4, 1, 64), *(half(2, 4, 9, 64),) * 2),
        {"dropout_p": 0.125},
        SDPBackend.FLASH_ATTENTION,
    ),
    "one query and a mask": (
        (half(2, 4, 1, 64), *(half(2, 4, 9, 64),) * 2),
        {"mask": mask(1, 9)},
        SDPBackend.CUDNN_ATTENTION,
    ),
    "dropout of an eighth": ((half(2, 4, 9, 64),) * 3, {"dropout_p": 0.125}, SDPBackend.CUDNN_ATTENTION),
    "three dimensions": ((half(4, 9, 64),) * 3, {}, SDPBackend.MATH),
    "columns": ((half(2, 4, 64, 9).mT,) * 3, {}, SDPBackend.MATH),
}
"""Arguments, and what CUDA chooses (also asked of a GPU, in tests/gpu/test_gpu_planning.py)."""


@pytest.mark.parametrize("case", CHOICES)
def test_the_operator_that_cuda_would_choose(case: str) -> None:
    tensors, options, expected = CHOICES[case]
    assert choose_operator(*tensors, **options) is expected


@pytest.mark.parametrize("case", CHOICES)
def test_the_chosen_operator_has_the_shape_of_attention(case: str) -> None:
    tensors, options, _ = CHOICES[case]
    with FakeTensorMode():
        query, key, value = (torch.empty_strided(each.shape, each.stride(), dtype=each.dtype) for each in tensors)
        others = {name: each for name, each in options.items() if name != "mask"}
        hidden = torch.zeros(options["mask"].shape, dtype=torch.bool) if "mask" in options else None
        result = attention(query, key, value, hidden, **others)
    assert result.shape == (*query.shape[:-1], value.size(-1))
    assert result.dtype == query.dtype


def test_operators_that_are_switched_off_are_not_chosen() -> None:
    tensors = (half(1, 32, 128, 128),) * 3
    for operator in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(operator):
            assert choose_operator(*tensors) is operator
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_operator(*tensors) is SDPBackend.FLASH_ATTENTION
    finally:
        torch.use_deterministic_algorithms(False)


LARGE = """
import json, resource, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import spcompile
from spcompile.options import parse_options
from spcompile.dry_run import capture_programs

config = LlamaConfig(
    hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672,
    vocab_size=128256, max_position_embeddings=8192,
)
with torch.device("meta"):
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
import torch._inductor.decomposition  # an import, however late
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before_bytes, start = rss(), time.perf_counter()
inputs = {"input_ids": torch.zeros(1, 2048, dtype=torch.int64, device="meta"), "use_cache": False}
with torch.no_grad():
    (program,) = capture_programs(model, (), inputs, parse_options({"device": "cuda", "k": 4, "m": 1}))
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "grown_bytes": rss() - before_bytes,
    "operators": [str(node.target) for node in program.graph.nodes if node.op == "call_function"],
    "plan": program.planned().to_json(),
}))
"""


@no_cuda
def test_a_model_of_70_billion_weights() -> None:
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-c", LARGE], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    plan = Plan.from_json(found["plan"])
    counts = Counter(found["operators"])
    assert found["grown_bytes"] < 2e9
    assert found["seconds"] < 240  # 18 s alone on two cores
    assert plan.device == "cuda:0"
    assert len(plan.pages) == 82
    assert [layer.name for layer in plan.layers] == [f"model.layers.{index}" for index in range(80)]
    assert plan.weights_bytes > 140e9
    assert plan.peak_weight_bytes < 12e9
    assert counts["aten._scaled_dot_product_cudnn_attention.default"] == 80
    assert not any("softmax" in name for name in counts)
    assert counts["aten.bmm.default"] <= 1  # the angles of rotary embeddings, until torch 2.11
