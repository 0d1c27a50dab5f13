"""Plans drawn at random, right or wrong, for what must work on any plan (its text, its JSON, the verifier); and graphs
to be placed, for what must hold of every plan that is made.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from spcompile.ir import Interval, Machine, Page, Plan, Slot, Step, Weight
from spcompile.planner.machine import PROFILES

NAMES = st.text(max_size=60) | st.from_regex(r"[a-z]{1,8}(\.[a-z0-9_]{1,12}){0,5}", fullmatch=True)
SMALL = st.integers(-3, 12)
SIZES_BYTES = st.integers(-(2**10), 2**45)

WEIGHTS = st.builds(Weight, NAMES, SIZES_BYTES)
PAGES = st.builds(Page, NAMES, st.lists(WEIGHTS, max_size=3).map(tuple))
STEPS = st.builds(Step, NAMES, st.none() | NAMES, st.lists(SMALL, max_size=30).map(tuple))
SLOTS = st.builds(Slot, SIZES_BYTES, SIZES_BYTES)
INTERVALS = st.builds(
    Interval, SMALL, st.integers(-10, 10), st.integers(-10, 10), st.lists(SMALL, max_size=9).map(tuple)
)


def plans() -> st.SearchStrategy[Plan]:
    """Any plan whose fields have the right types."""
    return st.builds(
        Plan,
        device=NAMES,
        k=SMALL,
        m=SMALL,
        wraps=st.booleans(),
        pages=st.lists(PAGES, max_size=8).map(tuple),
        leftovers=st.lists(WEIGHTS, max_size=3).map(tuple),
        residents=st.lists(SMALL, max_size=3).map(tuple),
        steps=st.lists(STEPS, max_size=8).map(tuple),
        slots=st.lists(SLOTS, max_size=5).map(tuple),
        period=st.integers(-1, 9),
        intervals=st.lists(INTERVALS, max_size=8).map(tuple),
    )


TIMES_US = st.floats(0, 1e9)
MONOMIALS = st.sampled_from(["1", "s0", "s0*s1**2", "((s0 + 7)//8)*s1", "s0//0", "Max()", "2**2**99", "", "\0", "s9"])
POLYNOMIALS = st.lists(st.tuples(MONOMIALS, SIZES_BYTES), max_size=3).map(tuple)
RATES = st.floats(1, 1e15)
MACHINES = st.builds(
    Machine,
    name=NAMES,
    h2d_bytes_per_s=RATES,
    d2h_bytes_per_s=RATES,
    both_bytes_per_s=RATES,
    copy_us=TIMES_US,
    flops_per_s=st.lists(st.tuples(NAMES, RATES), max_size=2).map(tuple),
    memory_bytes_per_s=RATES,
    kernel_us=TIMES_US,
    workspace_bytes=SIZES_BYTES,
    device_bytes=SIZES_BYTES,
    host_bytes=SIZES_BYTES,
)
COSTLY_STEPS = st.builds(
    Step,
    NAMES,
    st.none() | NAMES,
    st.lists(SMALL, max_size=5).map(tuple),
    TIMES_US,
    SIZES_BYTES,
    st.lists(st.tuples(SMALL, SIZES_BYTES), max_size=2).map(tuple),
    SIZES_BYTES,
)


@st.composite
def full_plans(draw: st.DrawFn) -> Plan:
    """Any plan in which fields that plans without costs leave at their defaults have values, too."""
    plan = draw(plans())
    return replace(
        plan,
        steps=draw(st.lists(COSTLY_STEPS, max_size=5).map(tuple)),
        machine=draw(st.none() | MACHINES),
        sizes=draw(st.lists(st.tuples(st.sampled_from(["s0", "s1"]), SMALL), max_size=2).map(tuple)),
        inputs=draw(POLYNOMIALS),
        activations=draw(st.lists(POLYNOMIALS, max_size=3).map(tuple)),
        workspace_bytes=draw(SIZES_BYTES),
        other_bytes=draw(SIZES_BYTES),
        mapped=draw(st.lists(SMALL, max_size=3).map(tuple)),
        backward_step=draw(st.none() | SMALL),
    )


PARTS_BYTES = st.sampled_from([0, 1, 255, 256, 300, 1000, 1024, 4096])

Reads = list[list[int]]


@st.composite
def use_orders(draw: st.DrawFn) -> Reads:
    """Which pages each step reads: every page is read."""
    n_pages = draw(st.integers(3, 8))
    chain = [[page] for page in range(n_pages)]
    kind = draw(st.sampled_from(["chain", "back", "repeated", "tied", "several", "branches", "any"]))
    match kind:
        case "back":
            return chain + chain[::-1]
        case "repeated":
            return chain * draw(st.integers(2, 3))
        case "tied":
            return [*chain, [0]]
        case "several":
            return [[page, (page + 1) % n_pages] for page in range(n_pages)]
        case "branches":
            return _branches(n_pages, draw(st.integers(1, n_pages - 1)))
        case "any":
            some_pages = st.lists(st.integers(0, n_pages - 1), max_size=3, unique=True)
            return draw(st.permutations(chain + draw(st.lists(some_pages, max_size=5))))
    return chain


def _branches(n_pages: int, split: int) -> Reads:
    """A stem, two branches whose steps take turns, and a join that reads the stem and the ends of both."""
    one, two = list(range(1, split)), list(range(split, n_pages))
    turns = [page for pair in zip(one, two, strict=False) for page in pair]
    rest = [page for page in (*one, *two) if page not in turns]
    ends = dict.fromkeys([0, *one[-1:], *two[-1:]])
    return [[page] for page in (0, *turns, *rest)] + [list(ends)]


@st.composite
def graphs(draw: st.DrawFn) -> Plan:
    """Graphs to be placed: pages of any sizes, tables, inputs, values, workspaces; a machine of even speeds."""
    reads = draw(use_orders())
    order = list(dict.fromkeys(page for each in reads for page in each))
    number = {page: index for index, page in enumerate(order)}
    even_bytes = draw(st.none() | PARTS_BYTES)
    sizes = [draw(st.lists(PARTS_BYTES, min_size=1, max_size=3)) if even_bytes is None else [even_bytes] for _ in order]
    pages = tuple(
        Page(f"p{index}", tuple(Weight(f"p{index}.w{part}", nbytes) for part, nbytes in enumerate(each)))
        for index, each in enumerate(sizes)
    )
    tables = draw(st.sets(st.integers(0, len(order) - 1), max_size=1))
    steps = []
    for index, each in enumerate(reads):
        mine = tuple(number[page] for page in each)
        gathers = tuple((page, 8) for page in mine if page in tables)
        tables -= {page for page, _ in gathers}  # whoever reads it later reads all of it
        values_bytes = draw(st.sampled_from([0, 100, 5000]))
        steps.append(Step(f"s{index}", None, mine, draw(st.sampled_from([0.5, 5.0])), values_bytes, gathers))
    leftovers = (Weight("leftover", 77),) if draw(st.booleans()) else ()
    most_bytes = max(step.activations_bytes for step in steps)
    machine = replace(PROFILES["h100"], h2d_bytes_per_s=1e9, copy_us=0.5)
    graph = Plan("cpu", 1, 1, draw(st.booleans()), pages, leftovers, (), tuple(steps), (), 1, (), machine)
    return replace(
        graph,
        sizes=(("s0", 3),),
        inputs=(("s0", 7),),
        activations=((("1", most_bytes),),),
        workspace_bytes=50,
        other_bytes=draw(st.sampled_from([0, 9])),
    )
