"""The compiler, as one tuple of passes.

Each pass rewrites the `Program` in place. With ``verify`` on, the graph is checked behind every pass and the plan
when it appears; what is found is shown as the printed graph or plan with a mark under the guilty line.
"""

from __future__ import annotations

import logging

from spcompile.dump import new_dump
from spcompile.passes.base import Pass, Program
from spcompile.passes.find_layers import find_layers
from spcompile.passes.insert_transfers import insert_transfers
from spcompile.passes.make_schedule import make_schedule
from spcompile.passes.sink_mutations import sink_mutations
from spcompile.passes.sink_weight_views import sink_weight_views
from spcompile.passes.split_segments import split_segments
from spcompile.text import format_plan
from spcompile.verify.graphs import check_graph
from spcompile.verify.plans import verify_plan
from spcompile.verify.violations import raise_if_any

logger = logging.getLogger(__name__)

PASSES: tuple[Pass, ...] = (
    Pass(sink_weight_views),  # views and casts of weights go to their readers, so that nothing outlives a page
    Pass(sink_mutations),  # updates of inputs go beside their producers, so that caches are written in place
    Pass(find_layers),  # every node learns its layer
    Pass(make_schedule, together=True),  # segments, pages, slots and intervals: the plan
    Pass(split_segments),  # the outer graph calls one module per segment
    Pass(insert_transfers),  # prefetch, load and evict, as the plan says
)


N_PLANNING = 1 + [each.run for each in PASSES].index(make_schedule)

PLANNING, REWRITING = PASSES[:N_PLANNING], PASSES[N_PLANNING:]
"""The passes up to the plan, and those that carry it out. In training the plan is made of both graphs as soon as there
are two, and each is rewritten when it is compiled: backward at the first ``.backward()``."""


def run_passes(program: Program, passes: tuple[Pass, ...] = PASSES) -> None:
    """Run the passes in order. Up to the plan, also on the graph that is planned together with this one.

    Raises:
        OptionError: the plan that was asked for is impossible.
        VerificationError: a pass broke a rule (a bug in this package, never the user's mistake).
    """
    if program.plan is None:
        for graph in program.graphs:
            graph.dump = new_dump(graph.label)
            graph.dump.write_graph("0-captured.txt", graph.module)
    for each in passes:
        planned_before = program.plan is not None
        graphs = (program,) if planned_before else program.graphs
        for graph in graphs[:1] if each.together else graphs:
            each.run(graph)
        for graph in graphs:
            logger.debug("after %s:\n%s", each.name, graph.graph)
            graph.dump.write_graph(f"{PASSES.index(each) + 1}-{each.name}.txt", graph.module)
            if not planned_before and graph.plan is not None:
                graph.dump.write("plan.txt", graph.plan.to_text)
                graph.dump.write("plan.json", graph.plan.to_json)
        if not program.options.verify:
            continue
        if program.plan is not None and not planned_before:
            violations = verify_plan(program.plan, program.options.budget)
            if violations:  # the text of a plan takes as long as checking it
                raise_if_any("the plan", format_plan(program.plan).splitlines(), violations)
        for graph in graphs:
            names = {name: source.weight.name for name, source in graph.weights.items()}
            steps = graph.steps() if graph.plan is not None else None
            check_graph(graph.module, graph.plan, names, steps=steps, after=each.name, final=each is PASSES[-1])
    if passes[-1:] == PASSES[-1:]:
        program.dump.write("outer.py", lambda: program.graph.python_code("self").src)
