"""`find_layers`: the layers of module trees as model libraries build them, and of models whose weights have no names.

Module trees are lists of (path of a weight, its bytes), shaped like those of the libraries but small. Nameless models
are traced, because the texture of real graphs is what the structural search has to cope with; what is asserted is which
weights end up together, never a node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from spcompile.capture import Capture, Kind
from spcompile.ir import Weight
from spcompile.module_tree import find_layer_paths
from spcompile.options import Options
from spcompile.passes.base import LAYER, Program
from spcompile.passes.find_layers import find_layers
from spcompile.passes.sink_weight_views import sink_weight_views
from spcompile.verify.graphs import verify_graph

Weights = list[tuple[str, int]]

ATTENTION = {"attn.q.weight": 64, "attn.k.weight": 16, "attn.v.weight": 16, "attn.o.weight": 64}
BLOCK = {**ATTENTION, "mlp.up.weight": 128, "mlp.down.weight": 128, "norm1.weight": 8, "norm2.weight": 8}
CROSS = {f"cross_{name}": nbytes for name, nbytes in ATTENTION.items()}


def below(path: str, weights: dict[str, int]) -> Weights:
    return [(f"{path}.{name}", nbytes) for name, nbytes in weights.items()]


def blocks(path: str, count: int, weights: dict[str, int] = BLOCK) -> Weights:
    return [each for index in range(count) for each in below(f"{path}.{index}", weights)]


def llama(count: int) -> Weights:
    ends = [("model.embed_tokens.weight", 9000), ("model.norm.weight", 8), ("lm_head.weight", 9000)]
    return blocks("model.layers", count) + ends


def t5(count: int) -> Weights:
    """Sub-layers are lists inside the blocks; the first block of each stack holds the relative position table."""
    inner = {f"layer.0.{name}": nbytes for name, nbytes in ATTENTION.items()}
    inner |= {"layer.0.norm.weight": 8, "layer.1.wi.weight": 128, "layer.1.wo.weight": 128, "layer.1.norm.weight": 8}
    table = [(f"{stack}.block.0.layer.0.attn.relative_attention_bias.weight", 32) for stack in ("encoder", "decoder")]
    cross = {**inner, **{f"layer.2.{name}": nbytes for name, nbytes in CROSS.items()}}
    stacks = blocks("encoder.block", count, inner) + blocks("decoder.block", count, cross)
    return [("shared.weight", 9000), *stacks, *table]


def resnet(depths: Sequence[int]) -> Weights:
    """Stages of doubling width; the first block of each has a wider input and a projection."""
    weights: Weights = [("conv1.weight", 9000), ("bn1.weight", 64), ("bn1.bias", 64), ("fc.weight", 5000)]
    for stage, depth in enumerate(depths, start=1):
        width = 32 * 2**stage
        for index in range(depth):
            narrow = width // 2 if index == 0 and stage > 1 else width
            block = {"conv1.weight": 9 * narrow * width, "bn1.weight": width, "bn1.bias": width}
            block |= {"conv2.weight": 9 * width * width, "bn2.weight": width, "bn2.bias": width}
            if narrow != width:
                block |= {"downsample.0.weight": narrow * width, "downsample.1.weight": width}
            weights += below(f"layer{stage}.{index}", block)
    return weights


def stages(path: str, inner: str, depths: Sequence[int]) -> Weights:
    """ConvNeXt, Swin: stages of doubling width, each a list of blocks with a downsampling beside it."""
    weights: Weights = [("stem.0.weight", 500), ("stem.1.weight", 9)]
    for stage, depth in enumerate(depths):
        width = 16 * 2**stage
        block = {"dw.weight": 49 * width, "norm.weight": width, "fc1.weight": 4 * width**2, "fc2.weight": 4 * width**2}
        weights += blocks(f"{path}.{stage}{inner}", depth, block)
        if stage + 1 < len(depths):
            weights += below(f"{path}.{stage}", {"downsample.norm.weight": width, "downsample.fc.weight": 2 * width**2})
    return weights


def mixture(count: int, *, dense: int = 0) -> Weights:
    """Experts are a list inside each layer; the first ``dense`` layers have a plain feed-forward instead."""
    weights: Weights = [("model.embed_tokens.weight", 9000)]
    for index in range(count):
        path = f"model.layers.{index}"
        weights += below(path, {**ATTENTION, "norm1.weight": 8, "norm2.weight": 8})
        if index < dense:
            weights += below(path, {"mlp.up.weight": 900, "mlp.gate.weight": 900, "mlp.down.weight": 900})
        else:
            weights += below(path, {"mlp.router.weight": 8})
            weights += blocks(f"{path}.mlp.experts", 8, {"up.weight": 50, "gate.weight": 50, "down.weight": 50})
    return weights


def unet() -> Weights:
    """Diffusion U-Net: lists of blocks that hold lists of residual and attention blocks, all of different widths."""
    weights: Weights = [("conv_in.weight", 90), ("time.linear_1.weight", 10), ("time.linear_2.weight", 20)]
    for side, widths in (("down_blocks", (8, 16, 32)), ("up_blocks", (32, 16, 8))):
        for index, width in enumerate(widths):
            weights += blocks(f"{side}.{index}.resnets", 2, {"conv1.weight": 9 * width**2, "norm.weight": width})
            weights += blocks(f"{side}.{index}.attentions", 2, {"q.weight": width**2, "k.weight": width**2})
            weights += below(f"{side}.{index}.sampler", {"conv.weight": 9 * width**2})
    return weights + blocks("mid_block.resnets", 2, {"conv1.weight": 9 * 32**2, "norm.weight": 32})


def linears(path: str, shapes: dict[int, tuple[int, int]]) -> Weights:
    return [
        (f"{path}{index}.{name}", nbytes)
        for index, shape in shapes.items()
        for name, nbytes in zip(("weight", "bias"), shape, strict=True)
    ]


def numbered(path: str, count: int) -> list[str]:
    return [f"{path}{index}" for index in range(count)]


TREES: dict[str, tuple[Weights, list[str]]] = {
    "llama": (llama(3), numbered("model.layers.", 3)),
    "llama with Dynamo's prefix": (
        [(f"L['self'].{path}", nbytes) for path, nbytes in llama(3)],
        numbered("L['self'].model.layers.", 3),
    ),
    "llama shrunk to one layer": (llama(1), ["model.layers.0"]),
    "t5": (t5(3), numbered("encoder.block.", 3) + numbered("decoder.block.", 3)),
    "t5 shrunk to two blocks": (t5(2), numbered("encoder.block.", 2) + numbered("decoder.block.", 2)),
    "resnet": (
        resnet((2, 2, 3, 2)),
        [f"layer{stage}.{index}" for stage, depth in enumerate((2, 2, 3, 2), start=1) for index in range(depth)],
    ),
    "resnet of one block per stage": (resnet((1, 1, 1)), ["layer1.0", "layer2.0", "layer3.0"]),
    "convnext": (
        stages("stages", ".blocks", (2, 2, 3)),
        [f"stages.{stage}.blocks.{index}" for stage, depth in enumerate((2, 2, 3)) for index in range(depth)],
    ),
    "stages that are the lists themselves": (
        stages("features", "", (2, 3)),
        ["features.0.0", "features.0.1", "features.1.0", "features.1.1", "features.1.2"],
    ),
    "mixture of experts": (mixture(3), numbered("model.layers.", 3)),
    "mixture of experts behind dense layers": (mixture(4, dense=1), numbered("model.layers.", 4)),
    "one dense layer and one with experts": (mixture(2, dense=1), numbered("model.layers.", 2)),
    "layers of two kinds in turns": (
        [
            each
            for index in range(4)
            for each in below(f"layers.{index}", BLOCK if index % 2 else {"mamba.weight": 99, "norm.weight": 8})
        ],
        numbered("layers.", 4),
    ),
    "albert, one block that runs many times": (
        [("embeddings.word.weight", 9000), ("encoder.map.weight", 9), *blocks("encoder.groups.0.layers", 1)],
        ["encoder.groups.0"],
    ),
    "unet": (
        unet(),
        [
            f"{side}.{index}.{kind}.{number}"
            for side in ("down_blocks", "up_blocks")
            for index in range(3)
            for kind in ("resnets", "attentions")
            for number in range(2)
        ]
        + numbered("mid_block.resnets.", 2),
    ),
    "densenet, layers that grow": (
        [
            each
            for block in (1, 2)
            for index in range(1, 5)
            for each in below(
                f"features.denseblock{block}.denselayer{index}",
                {"norm1.w": 9 * block * index, "conv1.w": 90 * block * index, "norm2.w": 8, "conv2.w": 72},
            )
        ],
        [f"features.denseblock{block}.denselayer{index}" for block in (1, 2) for index in range(1, 5)],
    ),
    "vgg": (
        [
            *linears("features.", {0: (27, 8), 2: (288, 8), 5: (576, 16), 7: (1152, 16), 10: (1152, 16)}),
            *linears("classifier.", {0: (4096, 64), 3: (4096, 64)}),
        ],
        ["features.0", "features.2", "features.5", "features.7", "features.10", "classifier.0", "classifier.3"],
    ),
    "clip": (
        blocks("vision_model.encoder.layers", 3) + blocks("text_model.encoder.layers", 2) + [("proj.weight", 9)],
        numbered("vision_model.encoder.layers.", 3) + numbered("text_model.encoder.layers.", 2),
    ),
    "towers with numbers": (
        blocks("tower1.layers", 3) + blocks("tower2.layers", 3),
        numbered("tower1.layers.", 3) + numbered("tower2.layers.", 3),
    ),
    "encoder and decoder": (
        blocks("encoder.layers", 2) + blocks("decoder.layers", 2, {**BLOCK, **CROSS}),
        numbered("encoder.layers.", 2) + numbered("decoder.layers.", 2),
    ),
    "sequential of linear and activation": (linears("", {0: (64, 8), 2: (64, 8), 4: (64, 8)}), ["0", "2", "4"]),
    "sequential of sequentials": (
        [each for index in range(3) for each in linears(f"{index}.", {0: (64, 8), 2: (64, 8)})],
        ["0", "1", "2"],
    ),
    "blocks with names that hold lists": (
        [each for index in (1, 2, 3) for each in linears(f"block{index}.mlp.", {0: (64, 8), 2: (64, 8)})],
        ["block1", "block2", "block3"],
    ),
    "a list of modules in a variable": (
        [(f"G['blocks'].{index}.weight", 64) for index in range(2)],
        numbered("G['blocks'].", 2),
    ),
    "norms with numbers are no layers": (
        [*below("attn", {"q.weight": 4096, "o.weight": 4096}), ("norm1.weight", 8), ("norm2.weight", 8)],
        [],
    ),
    "linears that differ": (linears("", {0: (60, 6), 2: (80, 8), 4: (24, 3)}), []),
    "one linear": ([("weight", 64), ("bias", 8)], []),
    "one linear with a number": (linears("fc", {1: (64, 8)}), []),
    "parameters with numbers": ([("weights.0", 64), ("weights.1", 64)], []),
    "no names": ([], []),
}


@pytest.mark.parametrize("name", TREES)
def test_layers_of_a_module_tree(name: str) -> None:
    weights, layers = TREES[name]
    assert sorted(find_layer_paths(weights)) == sorted(layers)


@pytest.mark.parametrize("name", TREES)
def test_layers_do_not_depend_on_the_order_of_weights(name: str) -> None:
    weights, layers = TREES[name]
    assert sorted(find_layer_paths(weights[::-1])) == sorted(layers)


@pytest.mark.parametrize("name", TREES)
def test_no_layer_inside_another(name: str) -> None:
    layers = find_layer_paths(TREES[name][0])
    assert not [(one, other) for one in layers for other in layers if one.startswith(f"{other}.")]


def weight_of(example: Tensor, path: str) -> Weight | None:
    """Every parameter is a weight of its own."""
    return Weight(path, example.untyped_storage().nbytes()) if isinstance(example, nn.Parameter) else None


def traced(function: Callable[..., Any], *args: Any) -> Program:
    """The program of one inference graph, as the passes get it."""
    programs: list[Program] = []

    def backend(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        capture = Capture(module, examples, Options(compiler="eager"), weight_of, [])

        def keep(graph: fx.GraphModule, _: Kind) -> Callable[..., Any]:
            programs.append(capture.program(graph, device=torch.device("cpu"), store=None))
            return graph.forward

        return capture.trace(keep, lambda *_: None)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    (program,) = programs
    return program


def layers_of(program: Program) -> list[list[int]]:
    """The weights of each layer, by their number in the list that the function reads (``ws[3]`` is 3), in order."""
    sink_weight_views(program)
    find_layers(program)
    assert verify_graph(program.module, None, {}) == []
    number = {node: int(each.path.rpartition(".")[2]) for node, each in program.weight_nodes().items()}
    found: dict[str | None, dict[int, None]] = {}
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        read = [number[source] for source in node.all_input_nodes if source in number]
        found.setdefault(node.meta[LAYER], {}).update(dict.fromkeys(read))
    return [list(weights) for weights in found.values()]


def square(count: int, width: int = 8) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(width, width)) for _ in range(count)]


X = torch.zeros(2, 8)


def test_nameless_residual_chain() -> None:
    def chain(x: Tensor, ws: list[nn.Parameter]) -> Tensor:
        for up, down in zip(ws[::2], ws[1::2], strict=True):
            x = x + torch.relu(x @ up) @ down
        return x

    assert layers_of(traced(chain, X, square(8))) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_nameless_residual_chain_between_projections() -> None:
    """What comes before a cycle may be as long as the cycle: two blocks were joined into one layer."""

    def chain(x: Tensor, ws: list[nn.Parameter]) -> Tensor:
        x = torch.tanh(x @ ws[0])
        for up, down in zip(ws[1:-1:2], ws[2:-1:2], strict=True):
            x = x + torch.relu(x @ up) @ down
        return torch.sigmoid(x @ ws[-1])

    layers = layers_of(traced(chain, X, square(10)))
    assert [each for each in layers if len(each) > 1] == [[1, 2], [3, 4], [5, 6], [7, 8]]


def test_nameless_transformer_is_joined_per_cycle() -> None:
    """Attention and feed-forward are two parts each; together they are the layer."""

    def transformer(x: Tensor, ws: list[nn.Parameter]) -> Tensor:
        x = x @ ws[0]
        for index in range(1, len(ws) - 1, 4):
            q, k, up, down = ws[index : index + 4]
            x = x + torch.softmax(x @ q @ (x @ k).t(), -1) @ x
            x = x + torch.relu(x @ up) @ down
        return x @ ws[-1]

    layers = layers_of(traced(transformer, X, square(14)))
    assert layers == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13]]


def test_nameless_unet_is_cut_where_it_is_narrow() -> None:
    """Skips over the whole depth leave no narrow cut inside; no part may hold most of the weights."""

    def unet(x: Tensor, ws: list[nn.Parameter]) -> Tensor:
        half = len(ws) // 2
        skips = []
        for w in ws[:half]:
            x = torch.relu(x @ w)
            skips.append(x)
        for w in ws[half:]:
            x = torch.relu(torch.cat([x, skips.pop()])[:2] @ w)
        return x

    layers = layers_of(traced(unet, X, square(8)))
    assert [weight for layer in layers for weight in layer] == list(range(8))
    assert max(map(len, layers)) == 1


def test_nameless_towers() -> None:
    """Two towers side by side: cut between readers of weights."""

    def towers(x: Tensor, ws: list[nn.Parameter]) -> Tensor:
        left, right = x, x
        half = len(ws) // 2
        for w in ws[:half]:
            left = torch.relu(left @ w)
        for w in ws[half:]:
            right = torch.tanh(right @ w)
        return left * right

    layers = layers_of(traced(towers, X, square(8)))
    assert sorted(weight for layer in layers for weight in layer) == list(range(8))
    assert max(map(len, layers)) <= 2


def test_nameless_towers_in_turns() -> None:
    def towers(x: Tensor, ws: list[nn.Parameter]) -> Tensor:
        left, right = x, x
        for one, other in zip(ws[::2], ws[1::2], strict=True):
            left, right = torch.relu(left @ one), torch.tanh(right @ other)
        return left * right

    layers = layers_of(traced(towers, X, square(8)))
    assert max(map(len, layers)) <= 2


def test_one_nameless_weight_is_no_layer() -> None:
    def product(x: Tensor, ws: list[nn.Parameter]) -> Tensor:
        return x @ ws[0]

    program = traced(product, X, square(1))
    assert layers_of(program) == [[0]]
    assert {node.meta[LAYER] for node in program.graph.nodes if node.op == "call_function"} == {None}


def labels_by_weight(program: Program) -> dict[str, str | None]:
    """Label of the first reader of each weight, by the weight's name."""
    sink_weight_views(program)
    find_layers(program)
    weights = program.weight_nodes()
    labels: dict[str, str | None] = {}
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            if source in weights and node.op == "call_function":
                labels.setdefault(weights[source].weight.name, node.meta[LAYER])
    return labels


class Chain(nn.Module):
    """Blocks, and weights that no module but the root reads."""

    def __init__(self, width: int = 8, count: int = 3) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(width, width))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.head = nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.embed
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x @ self.head


def test_weights_read_by_the_root_are_outside() -> None:
    """The root's own operators have no module stack: what they read tells where they belong."""
    labels = {name.rpartition(".")[2]: label for name, label in labels_by_weight(traced(Chain(), X)).items()}
    assert labels["embed"] is None
    assert labels["head"] is None


def test_numbered_modules_are_layers_of_a_traced_model() -> None:
    labels = labels_by_weight(traced(Chain(count=2), X))
    found = sorted(label.rpartition("layers.")[2] for label in labels.values() if label is not None)
    assert found == ["0", "0", "1", "1"]  # weight and bias


def test_items_of_a_plain_list_are_layers() -> None:
    modules = [nn.Linear(8, 8) for _ in range(3)]

    def chain(x: Tensor) -> Tensor:
        for module in modules:
            x = torch.relu(module(x))
        return x

    labels = dict.fromkeys(labels_by_weight(traced(chain, X)).values())
    assert [label and label[-2:] for label in labels] == [".0", ".1", ".2"]


class Uneven(nn.Module):
    """Two small layers, and most weights in a stretch without any."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 40), nn.Linear(40, 50), nn.Linear(50, 60)
        self.four, self.five = nn.Linear(60, 70), nn.Linear(70, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for module in (self.one, self.two, self.three, self.four, self.five, *self.layers):
            x = torch.relu(module(x))
        return x


def test_most_weights_outside_the_layers_are_cut_too() -> None:
    program = traced(Uneven(), X)
    labels = dict.fromkeys(labels_by_weight(program).values())
    assert len(labels) == 7
    assert sum(1 for label in labels if label is not None and label.startswith("outside.")) == 5


class Convolutions(nn.Module):
    """AlexNet: most weights in a classifier of two matrices that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x))
        return y


def test_two_large_weights_outside_the_layers_are_two_pages() -> None:
    labels = labels_by_weight(traced(Convolutions(), X))
    assert len(dict.fromkeys(labels.values())) == 4
