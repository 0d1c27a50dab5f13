"""`cut_finer`: by hand, against all possible cuts of small random graphs, and on a Llama as transformers has it.

The oracle shares nothing with the pass but its rules: it looks at the storages of the fake tensors where the pass reads
the operators' schemas, and tries every set of cuts where the pass plans.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from spcompile.dry_run import capture_programs
from spcompile.graph import is_cast, is_scalar, value_of
from spcompile.ir import Weight
from spcompile.options import parse_options
from spcompile.passes.base import LAYER, Program
from spcompile.passes.cut_finer import cut_finer
from tests.passes.graph_text import build_program

Weights = Mapping[fx.Node, Weight]


def weights_of(program: Program) -> Weights:
    return {node: each.weight for node, each in program.weight_nodes().items()}


def run_of(program: Program) -> list[fx.Node]:
    """All of a graph as one run."""
    return [node for node in program.graph.nodes if node.op == "call_function" and not is_scalar(node)]


def cut(text: str, limit_bytes: int) -> list[str]:
    """The names of the nodes of each piece."""
    program = build_program(text)
    pieces = cut_finer(run_of(program), weights_of(program), limit_bytes)
    return [" ".join(node.name for node in piece) for piece in pieces]


@dataclass
class Oracle:
    """What a run may do and what it costs, read from the storages of its values."""

    nodes: Sequence[fx.Node]
    weights: Weights

    def reads(self, start: int, end: int) -> frozenset[Weight]:
        sources = {source for node in self.nodes[start:end] for source in node.all_input_nodes}
        return frozenset(self.weights[source] for source in sources if source in self.weights)

    @cached_property
    def crossing(self) -> list[set[fx.Node]]:
        """The values that cross in front of each node, without weights and scalars."""
        return [self._crossing(gap) for gap in range(len(self.nodes))]

    def _crossing(self, gap: int) -> set[fx.Node]:
        behind = self.nodes[gap:]
        read = {source for node in behind for source in node.all_input_nodes if source not in behind}
        return {node for node in read if node not in self.weights and not is_scalar(node)}

    def may_cut(self, gap: int) -> bool:
        memory = {storage_of(node) for node in self.weights}
        return not any(
            isinstance(value_of(node), (tuple, list)) or storage_of(node) in memory or self.is_of_weight(node)
            for node in self.crossing[gap]
        )

    def is_of_weight(self, node: fx.Node) -> bool:
        memory = {storage_of(weight) for weight in self.weights}
        if storage_of(node) in memory:
            return True
        views = [each for each in node.all_input_nodes if storage_of(each) == storage_of(node)]
        return any(map(self.is_of_weight, views or (node.all_input_nodes if is_cast(node) else [])))

    def bytes_at(self, gap: int) -> int:
        return sum(dict(storage_of(node) for node in self.crossing[gap]).values())

    @cached_property
    def parts(self) -> list[tuple[int, int]]:
        gaps = [gap for gap in range(1, len(self.nodes)) if self.may_cut(gap)]
        return list(itertools.pairwise((0, *gaps, len(self.nodes))))

    def fits(self, start: int, end: int, limit_bytes: int) -> bool:
        reads = self.reads(start, end)
        if sum(weight.nbytes for weight in reads) <= limit_bytes:
            return True
        return any(reads == self.reads(*part) for part in self.parts if start <= part[0] and part[1] <= end)

    def best_cuts(self, limit_bytes: int) -> tuple[int, ...]:
        """The best of all sets of cuts."""
        gaps = [start for start, _ in self.parts[1:]]
        for count in range(len(self.nodes)):
            fitting = [
                (sum(map(self.bytes_at, cuts)), cuts)
                for cuts in itertools.combinations(gaps, count)
                if all(self.fits(*piece, limit_bytes) for piece in itertools.pairwise((0, *cuts, len(self.nodes))))
            ]
            if fitting:
                return min(fitting)[1]
        raise AssertionError("the parts themselves fit")


def storage_of(node: fx.Node) -> tuple[int, int]:
    """Which memory a value lies in, and its size: views on fake tensors share a storage."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return id(node), 0
    storage = value.untyped_storage()
    return storage._cdata, storage.nbytes()


def positions(pieces: Sequence[Sequence[fx.Node]]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(map(len, pieces[:-1])))


LAYER_TEXT = """
x: input  # float32[4, 8]
w_n: weight norm  # float32[8]
w_q: weight q  # float32[8, 8]
w_k: weight k  # float32[8, 8]
w_v: weight v  # float32[8, 8]
w_o: weight o  # float32[8, 8]
w_m: weight mlp_norm  # float32[8]
w_up: weight up  # float32[32, 8]
w_down: weight down  # float32[8, 32]
n = aten.mul.Tensor(x, w_n)
t_q = aten.t.default(w_q)
q = aten.mm.default(n, t_q)
t_k = aten.t.default(w_k)
k = aten.mm.default(n, t_k)
t_v = aten.t.default(w_v)
v = aten.mm.default(n, t_v)
turned = aten.t.default(k)
scores = aten.mm.default(q, turned)
p = aten._softmax.default(scores, -1, False)
a = aten.mm.default(p, v)
t_o = aten.t.default(w_o)
o = aten.mm.default(a, t_o)
h = aten.add.Tensor(x, o)
m = aten.mul.Tensor(h, w_m)
t_up = aten.t.default(w_up)
up = aten.mm.default(m, t_up)
act = aten.relu.default(up)
t_down = aten.t.default(w_down)
down = aten.mm.default(act, t_down)
out = aten.add.Tensor(h, down)
return (out,)
"""
ATTENTION = "n t_q q t_k k t_v v turned scores p a t_o o h"
ATTENTION_BYTES, MLP_BYTES = 32 + 4 * 256, 32 + 2 * 1024


def test_what_fits_is_not_cut() -> None:
    assert cut(LAYER_TEXT, ATTENTION_BYTES + MLP_BYTES) == [f"{ATTENTION} m t_up up act t_down down out"]


def test_attention_and_feed_forward_part_at_the_residual() -> None:
    """In front of the sum two values would cross, behind the norm too."""
    assert cut(LAYER_TEXT, MLP_BYTES) == [ATTENTION, "m t_up up act t_down down out"]


def test_thirds() -> None:
    """Wide values cross only where they must; of two equal places the earlier one is taken."""
    assert cut(LAYER_TEXT, ATTENTION_BYTES) == [ATTENTION, "m t_up up", "act t_down down out"]


def test_weights_larger_than_the_limit_are_alone() -> None:
    assert cut(LAYER_TEXT, 512) == [
        "n t_q q",
        "t_k k t_v v turned scores p a",
        "t_o o h m",
        "t_up up",
        "act t_down down out",
    ]


@pytest.mark.parametrize("limit_bytes", [0, 1, 31])
def test_no_room_at_all(limit_bytes: int) -> None:
    """Each operator that reads a weight is a piece."""
    readers = {"n", "q", "k", "v", "o", "m", "up", "down"}
    assert [len(readers.intersection(piece.split())) for piece in cut(LAYER_TEXT, limit_bytes)] == [1] * 8


@pytest.mark.parametrize("limit_bytes", [0, 300, 512, 1056, 1100, 2080, 2112, 3135, 3136])
def test_a_layer_is_cut_as_well_as_can_be(limit_bytes: int) -> None:
    program = build_program(LAYER_TEXT)
    oracle = Oracle(run_of(program), weights_of(program))
    pieces = cut_finer(oracle.nodes, oracle.weights, limit_bytes)
    if len(pieces) <= 4:  # else there are too many to try
        assert positions(pieces) == oracle.best_cuts(limit_bytes)
    assert all(map(oracle.may_cut, positions(pieces)))


HEADER = "x: input  # float32[4, 8]\nw: weight a  # float32[8, 8]\nu: weight b  # float32[8, 8]\n"


def test_views_and_casts_of_weights_stay_with_their_readers() -> None:
    text = """
    y = aten.mm.default(x, w)
    half = aten._to_copy.default(u, dtype=torch.float32)
    t = aten.t.default(half)
    split = aten.split.Tensor(t, 4, 1)
    getitem = getitem(split, 0)
    relu = aten.relu.default(y)
    z = aten.mm.default(relu, getitem)
    s = aten.sum.default(z)
    return (s,)
    """
    assert cut(HEADER + text, 256) == ["y", "half t split getitem relu z s"]


def test_results_that_are_lists_stay_with_their_items() -> None:
    """Fewest bytes would cross between a list and its items, but only tensors may."""
    text = """
    y = aten.mm.default(x, w)
    norm = aten.native_layer_norm.default(y, [8], None, None, 1e-05)
    relu = aten.relu.default(y)
    sum_1 = aten.sum.default(relu)
    getitem = getitem(norm, 0)
    z = aten.mm.default(getitem, u)
    s = aten.add.Tensor(z, sum_1)
    return (s,)
    """
    assert cut(HEADER + text, 256) == ["y", "norm relu sum_1 getitem z s"]


def test_an_update_stays_with_its_producer() -> None:
    """In front of the update the cache would cross as well."""
    text = """
    cache: input  # float32[4, 8]
    y = aten.mm.default(x, w)
    new = aten.add.Tensor(cache, y)
    copy_ = aten.copy_.default(cache, new)
    z = aten.mm.default(new, u)
    return (z,)
    """
    assert cut(HEADER + text, 256) == ["y new copy_", "z"]


def test_views_count_by_the_memory_that_they_look_at() -> None:
    """The narrow slice of a wide value is no place to cut; what is computed from it is."""
    text = """
    y = aten.mm.default(x, w)
    cat = aten.cat.default([y, y, y])
    part = aten.slice.Tensor(cat, 0, 0, 1)
    relu = aten.relu.default(part)
    z = aten.mm.default(relu, u)
    return (z,)
    """
    assert cut(HEADER + text, 256) == ["y cat part relu", "z"]


def test_a_repeated_value_is_no_larger_than_what_it_looks_at() -> None:
    text = """
    y = aten.mm.default(x, w)
    row = aten.sum.dim_IntList(y, [0], True)
    rows = aten.expand.default(row, [4, 8])
    turned = aten.relu.default(rows)
    z = aten.mm.default(turned, u)
    return (z,)
    """
    assert cut(HEADER + text, 256) == ["y row", "rows turned z"]


def test_scalars_may_cross() -> None:
    """Neither does the size count, nor the large tensor that it was asked of."""
    text = """
    y = aten.mm.default(x, w)
    row = aten.sum.dim_IntList(y, [0], True)
    cat = aten.cat.default([y, y])
    size = aten.sym_size.int(cat, 0)
    z = aten.mm.default(row, u)
    s = aten.mul.Tensor(z, size)
    return (s,)
    """
    dynamic = "length: input  # int 4\n" + HEADER.replace("float32[4, 8]", "float32[length, 8]")
    assert cut(dynamic + text, 256) == ["y row cat", "z s"]


def test_what_is_read_after_the_run_does_not_count() -> None:
    """It is stored in any case: here a large value, as autograd saves them."""
    text = """
    y = aten.mm.default(x, w)
    row = aten.sum.dim_IntList(y, [0], True)
    saved = aten.cat.default([y, y])
    turned = aten.relu.default(row)
    z = aten.mm.default(turned, u)
    more = aten.relu.default(z)
    return (more, saved)
    """
    assert cut(HEADER + text, 256) == ["y row saved", "turned z more"]


def test_one_weight_counts_once() -> None:
    """Tied: two placeholders of one storage, and one placeholder read twice."""
    text = """
    tied: weight a  # float32[8, 8]
    y = aten.mm.default(x, w)
    z = aten.mm.default(y, tied)
    more = aten.mm.default(z, w)
    last = aten.mm.default(more, u)
    return (last,)
    """
    for limit_bytes in (0, 256, 511):
        assert cut(HEADER + text, limit_bytes) == ["y z more", "last"]
    assert cut(HEADER + text, 512) == ["y z more last"]


def test_one_operator_that_reads_more_than_the_limit() -> None:
    """It holds what it needs; whoever needs no more may stand beside it."""
    text = """
    v: weight c  # float32[8, 8]
    y = aten.mm.default(x, w)
    z = aten.addmm.default(w, u, w)
    more = aten.mm.default(z, u)
    last = aten.mm.default(more, v)
    s = aten.add.Tensor(last, y)
    return (s,)
    """
    header = HEADER.replace("x: input  # float32[4, 8]", "x: input  # float32[8, 8]")
    assert cut(header + text, 0) == ["y z more", "last s"]
    # Two that need one of the two each are not one operator that needs both.
    assert cut(header + text.replace("addmm.default(w, u, w)", "mm.default(y, u)"), 0) == ["y", "z more", "last s"]


def test_runs_without_weights_are_left_alone() -> None:
    text = "x: input  # float32[2]\nrelu = aten.relu.default(x)\nneg = aten.neg.default(relu)\nreturn (neg,)"
    assert cut(text, 0) == ["relu neg"]


WIDTHS = (1, 2, 4)


@dataclass
class Writer:
    """A random graph as text. Values are ``[4, width]``; matrices are weights and what is derived from them."""

    data: st.DataObject
    inputs: list[str] = field(default_factory=lambda: ["x: input  # float32[4, 4]"])
    lines: list[str] = field(default_factory=list)
    values: list[tuple[str, int]] = field(default_factory=lambda: [("x", 4)])
    matrices: list[tuple[str, int, int]] = field(default_factory=list)

    def text(self) -> str:
        for _ in range(self.data.draw(st.integers(2, 9))):
            self.data.draw(st.sampled_from(STEPS))(self)
        returned = [name for name, _ in self.values if self.data.draw(st.booleans())]
        return "\n".join([*self.inputs, *self.lines, f"return ({', '.join(['x', *returned])},)"])

    def call(self, code: str) -> str:
        name = f"c{len(self.lines)}"
        self.lines.append(f"{name} = {code}")
        return name

    def value(self) -> tuple[str, int]:
        return self.data.draw(st.sampled_from(self.values[-3:]))

    def matrix(self, rows: int) -> tuple[str, int, int]:
        """One with so many rows: a new weight, a further placeholder of an old one, or what is there."""
        fitting = [each for each in self.matrices if each[1] == rows]
        is_old = self.data.draw(st.booleans())
        if fitting and is_old:
            return self.data.draw(st.sampled_from(fitting))
        columns = self.data.draw(st.sampled_from(WIDTHS))
        name = f"w{len(self.inputs)}"
        number = self.data.draw(st.integers(0, 2))
        self.inputs.append(f"{name}: weight s{number}_{rows}_{columns}  # float32[{rows}, {columns}]")
        self.matrices.append((name, rows, columns))
        return self.matrices[-1]

    def multiply(self) -> None:
        value, width = self.value()
        matrix, _, columns = self.matrix(width)
        self.values.append((self.call(f"aten.mm.default({value}, {matrix})"), columns))

    def multiply_and_add(self) -> None:
        """One operator that reads two weights."""
        value, width = self.value()
        matrix, _, columns = self.matrix(width)
        self.inputs.append(f"b{len(self.inputs)}: weight bias{columns}  # float32[{columns}]")
        bias = f"b{len(self.inputs) - 1}"
        self.values.append((self.call(f"aten.addmm.default({bias}, {value}, {matrix})"), columns))

    def derive(self) -> None:
        matrix, rows, columns = self.matrix(self.data.draw(st.sampled_from(WIDTHS)))
        kind = self.data.draw(st.sampled_from(("turn", "cast", "halve")))
        if kind == "turn":
            self.matrices.append((self.call(f"aten.t.default({matrix})"), columns, rows))
        elif kind == "cast":
            self.matrices.append((self.call(f"aten._to_copy.default({matrix}, dtype=torch.float32)"), rows, columns))
        elif columns > 1:
            halves = self.call(f"aten.split.Tensor({matrix}, {columns // 2}, 1)")
            self.matrices.append((self.call(f"getitem({halves}, 1)"), rows, columns // 2))

    def compute(self) -> None:
        value, width = self.value()
        self.values.append((self.call(f"aten.relu.default({value})"), width))

    def add(self) -> None:
        value, width = self.value()
        other = self.data.draw(st.sampled_from([name for name, size in self.values if size == width]))
        self.values.append((self.call(f"aten.add.Tensor({value}, {other})"), width))

    def view(self) -> None:
        value, width = self.value()
        self.values.append((self.call(f"aten.slice.Tensor({value}, 1, 0, {max(1, width // 2)})"), max(1, width // 2)))

    def normalise(self) -> None:
        """Three results, of which some are taken, now or after something else."""
        value, width = self.value()
        results = self.call(f"aten.native_layer_norm.default({value}, [{width}], None, None, 1e-05)")
        if self.data.draw(st.booleans()):
            self.compute()
        self.values.append((self.call(f"getitem({results}, 0)"), width))
        if self.data.draw(st.booleans()):
            self.values.append((self.call(f"getitem({results}, 1)"), 1))

    def update(self) -> None:
        value, width = self.value()
        cache = f"k{len(self.inputs)}"
        self.inputs.append(f"{cache}: input  # float32[4, {width}]")
        self.values.append((self.call(f"aten.add.Tensor({cache}, {value})"), width))
        self.call(f"aten.copy_.default({cache}, {self.values[-1][0]})")


STEPS = (
    *(Writer.multiply, Writer.multiply, Writer.multiply_and_add, Writer.derive, Writer.compute, Writer.add),
    *(Writer.view, Writer.normalise, Writer.update),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_other_cuts_are_better(data: st.DataObject) -> None:
    text = Writer(data).text()
    program = build_program(text)
    run = run_of(program)
    if not run:
        return
    first = data.draw(st.integers(0, len(run) - 1))
    run = run[first : data.draw(st.integers(first + 1, len(run)))][:12]
    oracle = Oracle(run, weights_of(program))
    before = {source for node in run for source in node.all_input_nodes} - {*run, *oracle.weights}
    assume(not any(map(oracle.is_of_weight, before)))  # views of weights are where their readers are
    limit_bytes = data.draw(st.integers(0, 200))
    pieces = cut_finer(run, oracle.weights, limit_bytes)
    assert [node for piece in pieces for node in piece] == run
    assert all(pieces)
    assert positions(pieces) == oracle.best_cuts(limit_bytes), text

    renamed = text.replace("weight s", "weight z").replace("c1", "zz1").replace("w1", "aa1")
    other = build_program(renamed)
    run = run_of(other)[first : first + len(run)]
    assert positions(cut_finer(run, weights_of(other), limit_bytes)) == positions(pieces)


@pytest.fixture(scope="module", params=[False, True], ids=["inference", "training"])
def llama(request: pytest.FixtureRequest) -> Program:
    """Four layers, without values. Half of a layer's weights are attention's."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=4, use_cache=False, **sizes))
    torch._dynamo.reset()
    tokens = torch.zeros(1, 16, dtype=torch.int64, device="meta")
    with torch.set_grad_enabled(request.param):
        programs = capture_programs(model.eval().to(torch.bfloat16), (tokens,), {}, parse_options({"device": "cpu"}))
    return programs[0]


def layers_of(program: Program) -> list[list[fx.Node]]:
    layers: dict[str, list[fx.Node]] = {}
    for node in run_of(program):
        if node.meta[LAYER] is not None:
            layers.setdefault(node.meta[LAYER], []).append(node)
    return list(layers.values())


@pytest.mark.parametrize(("parts", "n_pieces"), [(1, 1), (2, 3), (3, 5), (6, 7), (1000, 9)])
def test_layers_of_a_llama_are_cut_alike(llama: Program, parts: int, n_pieces: int) -> None:
    """Alike are runs of the same operators: in training the first layer also makes what all layers read."""
    weights = weights_of(llama)
    layers = layers_of(llama)
    assert len(layers) == 4
    layer_bytes = sum(weight.nbytes for weight in Oracle(layers[1], weights).reads(0, len(layers[1])))
    cuts: dict[str, set[tuple[int, ...]]] = {}
    for layer in layers:
        pieces = cut_finer(layer, weights, layer_bytes // parts)
        assert len(pieces) == n_pieces
        cuts.setdefault(" ".join(str(node.target) for node in layer), set()).add(positions(pieces))
    assert len(cuts) <= 2
    assert all(len(each) == 1 for each in cuts.values())


def test_a_layer_of_a_llama_is_cut_as_well_as_can_be(llama: Program) -> None:
    weights = weights_of(llama)
    for layer in layers_of(llama)[1:3]:
        oracle = Oracle(layer, weights)
        for limit_bytes in (12000, 10000):
            pieces = cut_finer(layer, weights, limit_bytes)
            assert len(pieces) == 2
            assert positions(pieces) == oracle.best_cuts(limit_bytes)
