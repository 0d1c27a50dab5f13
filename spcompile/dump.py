"""Where a graph on its way through the compiler leaves its texts, for debugging: ``$SPCOMPILE_DUMP_DIR``.

    folder/003-LlamaForCausalLM-forward/
        0-captured.txt  1-sink_weight_views.txt  2-sink_mutations.txt ...  6-insert_transfers.txt
        plan.txt  plan.json  outer.py

Every graph takes the next number, also beside other processes that write to the same folder. Nothing of this may make a
compilation fail: what cannot be written is left out, and said once for each folder.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from torch import fx

from spcompile.environment import DUMP_DIR, dump_folder
from spcompile.graph_text import format_graph

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dump:
    """The folder of one graph; None where nothing is wanted."""

    folder: Path | None = None

    def write(self, name: str, text: Callable[[], str]) -> None:
        """Write a file, whose text is made only where it is wanted."""
        if self.folder is None:
            return
        try:
            (self.folder / name).write_text(text() + "\n", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            _warn(self.folder.parent, str(error))

    def write_graph(self, name: str, module: fx.GraphModule) -> None:
        """Write a graph, and below it those of the segments that it calls."""
        self.write(name, lambda: graph_with_segments(module))


NOWHERE = Dump()


def new_dump(name: str) -> Dump:
    """A folder for one more graph.

    Args:
        name: of the graph, for people.
    """
    folder = dump_folder()
    if folder is None:
        return NOWHERE
    safe = re.sub(r"[^\w.-]+", "_", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        first = 1 + max((int(each.name[:3]) for each in folder.glob("[0-9][0-9][0-9]-*")), default=-1)
        for number in count(first):
            if any(folder.glob(f"{number:03}-*")):
                continue
            own = folder / f"{number:03}-{safe}"
            own.mkdir()
            return Dump(own)
    except OSError as error:
        _warn(folder, str(error))
    return NOWHERE


def graph_with_segments(module: fx.GraphModule) -> str:
    """The graph, one line per node, and each segment that it calls; equal ones once."""
    parts = ["\n".join(format_graph(module.graph))]
    seen: dict[str, str] = {}
    for name, child in module.named_children():
        if not isinstance(child, fx.GraphModule):
            continue
        text = "\n".join(f"  {line}" for line in format_graph(child.graph))
        same = seen.setdefault(text, name)
        parts.append(f"{name}:\n{text}" if same == name else f"{name}: as {same}")
    return "\n\n".join(parts)


@functools.cache
def _warn(folder: Path, error: str) -> None:
    """Once for each folder and error."""
    logger.warning("%s: what is compiled is not written to %s: %s", DUMP_DIR.name, folder, error)
