"""One HTML file that shows plans: styles, scripts and data are inside, and nothing comes from elsewhere.

Why not a plotting library: plotly.js alone is 4.8 MB, in every saved page and every cell of a notebook, and takes
0.4 s to start; lanes, memory and tables that all follow one pointer would be ours all the same. The scripts here are
30 KB, and the bars are elements of the page that keyboard, style sheet and tests can reach.

How: ``page.html`` is a template, and ``page.js`` fills it from the JSON text in ``#plan-data``: a list of views
(`View`, field by field). Names come from the model, so they reach the page as JSON and as text nodes, never as markup.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Sequence
from importlib import resources
from string import Template

from spcompile.viz.view import View

SCRIPTS = ("base.js", "timeline.js", "zoom.js", "tables.js", "curve.js", "page.js")
"""In this order they are one script."""


def make_page(views: Sequence[View]) -> str:
    """The text of the file."""
    folder = resources.files(__package__)
    read = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)}
    title = views[0].title if len(views) == 1 else f"Plans of {len(views)} graphs"
    return Template(read["page.html"]).substitute(
        title=html.escape(title),
        style=read["page.css"],
        script="\n".join(read[name] for name in SCRIPTS),
        data=page_data(views),
    )


def page_data(views: Sequence[View]) -> str:
    """The data of the page as JSON text that may stand in a script element: ``<`` is escaped, as it could end it."""
    graphs = [dataclasses.asdict(view) for view in views]
    return json.dumps({"graphs": graphs}, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
