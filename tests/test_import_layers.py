"""Imports point down only.

``LAYERS`` lists the modules from the bottom to the top; a module may import those in lower rows, and a package written
``name.*`` may import itself. ``ONLY`` narrows that further where the design promises more. Imports inside functions and
under ``TYPE_CHECKING`` count too. The source is parsed, not imported, so the test needs neither torch nor a device.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("options", "sizes", "collector", "environment"),
    ("progress",),
    ("ir",),
    ("wording",),
    ("timeline", "page_table", "lanes"),
    ("text",),
    ("verify", "verify.violations"),
    ("verify.plans",),
    ("planner.*", "module_tree", "plan_details"),
    ("plan_summary", "plan_parser"),
    ("viz.*",),
    # From here on torch may be imported.
    ("ops",),
    ("graph", "joint"),
    ("graph_text", "cuda_decompositions", "costs"),
    ("verify.graphs", "partition", "dump"),
    ("passes.base",),
    ("passes.structure", "passes.cut_finer"),
    ("passes.runs",),
    ("passes.pages",),
    ("passes.*",),
    ("segments", "runtime.*", "regions"),
    ("outline",),
    ("capture", "rehome", "cuda_attention"),
    ("pipeline", "offload", "arrival", "absent", "training"),
    ("transformers_inputs", "first_layer"),
    ("example_inputs", "weights_only"),
    ("backend", "dry_run"),
    ("planning",),
    ("explain",),
    ("spcompile",),  # the package's own __init__, which collects the interface
    ("cli.output", "cli.checks", "cli.models"),
    ("cli.plan", "cli.show", "cli.doctor"),
    ("cli.main",),
    ("cli",),
    ("__main__",),
)

FIRST_ROW_WITH_TORCH = LAYERS.index(("ops",))

ONLY: dict[str, tuple[str, ...]] = {
    # A verifier that shared code with what it checks would share its mistakes; so the other two do not see it either.
    "verify": (),
    "verify.violations": ("errors", "ir", "text"),
    "verify.plans": ("errors", "sizes", "ir", "text", "verify.violations"),
    "verify.graphs": ("errors", "ir", "text", "ops", "graph_text", "verify.violations", "verify.plans"),
    "planner.*": ("errors", "options", "ir", "text", "lanes", "planner.*"),
    "viz.*": ("errors", "sizes", "ir", "wording", "text", "lanes", "planner.*", "viz.*"),
    # A pass sees its base, never another pass.
    "passes.base": ("errors", "options", "ir", "text", "planner.*", "ops", "graph", "dump"),
    "passes.*": (
        *(
            "errors",
            "options",
            "ir",
            "text",
            "planner.*",
            "module_tree",
            "ops",
            "graph",
            "joint",
            "costs",
            "passes.base",
        ),
        "passes.structure",  # not a pass: what find_layers does where names say nothing
        *("passes.cut_finer", "passes.runs", "passes.pages"),  # nor are these: what make_schedule consists of
    ),
    "runtime.*": ("errors", "environment", "progress", "ir", "text", "lanes", "ops", "runtime.*"),
}

EXCEPTIONS = {
    *(("ir", "plan_details"), ("ir", "plan_parser"), ("ir", "plan_summary")),
    *(("ir", "planner.choose"), ("ir", "lanes"), ("ir", "viz"), ("ir", "viz.picture")),
}
"""Methods of ``Plan`` that import when they are called (`to_text`, `print`, `tradeoff`, `visualize`), or name a type
for the type checker: only conveniences reach up."""


def modules() -> dict[str, Path]:
    """All modules by name without the leading ``spcompile.``; a package has the name of its folder."""
    paths = {path.relative_to(ROOT / "spcompile"): path for path in (ROOT / "spcompile").rglob("*.py")}
    paths |= {path.relative_to(ROOT): path for path in (ROOT / "passes").rglob("*.py")}  # not followed through the link
    found = {}
    for relative, path in sorted(paths.items()):
        parts = relative.parent.parts if relative.name == "__init__.py" else relative.with_suffix("").parts
        found[".".join(parts) or "spcompile"] = path
    return found


MODULES = modules()


def entry_of(module: str) -> str:
    """The entry of ``LAYERS`` that places ``module``: its own name, or else the ``name.*`` of its package."""
    package = module.split(".")[0] + ".*"
    for entry in (module, package):
        if any(entry in row for row in LAYERS):
            return entry
    pytest.fail(f"give it a layer: spcompile.{module} is not in LAYERS of {Path(__file__).name}")


def row_of(entry: str) -> int:
    return next(index for index, row in enumerate(LAYERS) if entry in row)


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a file imports, ``from a import b`` as ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import: write it in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def own_module(name: str) -> str | None:
    """The module of ours that importing ``name`` reads: ``spcompile.ir.Plan`` is ``ir``. None for other people's."""
    if name.split(".")[0] == "passes":
        pytest.fail("import it as spcompile.passes, not as passes")
    if name.split(".")[0] != "spcompile":
        return None
    module = name.removeprefix("spcompile").lstrip(".")
    while module and module not in MODULES:
        module = module.rpartition(".")[0]
    return module or "spcompile"


def may_import(module: str, other: str) -> bool:
    if (module, other) in EXCEPTIONS:
        return True
    own, target = entry_of(module), entry_of(other)
    if own in ONLY:
        return target in ONLY[own]
    return row_of(target) < row_of(own)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    entry_of(module)  # also where it imports nothing
    path = MODULES[module]
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module} must not import {name}"
        for line, name in imported_names(path)
        if (other := own_module(name)) is not None and not may_import(module, other)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", MODULES)
def test_planning_needs_no_torch(module: str) -> None:
    if row_of(entry_of(module)) >= FIRST_ROW_WITH_TORCH:
        return
    lines = [line for line, name in imported_names(MODULES[module]) if name.split(".")[0] == "torch"]
    assert not lines, f"{MODULES[module].relative_to(ROOT)} imports torch in line {lines}: move that above the planner"


def test_narrower_rules_also_point_down() -> None:
    """The tables agree: nothing in ``ONLY`` opens a way up."""
    wrong = [(entry, each) for entry, seen in ONLY.items() for each in seen if row_of(each) > row_of(entry)]
    assert wrong == []


def test_exceptions_are_in_use() -> None:
    for module, other in EXCEPTIONS:
        assert other in {own_module(name) for _, name in imported_names(MODULES[module])}
