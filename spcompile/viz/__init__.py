"""Pictures of plans: what `Plan.visualize` and `Plans.visualize` call.

`make_view` computes all that is shown, once; `page`, `images` and `chrome_trace` draw it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spcompile.errors import OptionError
from spcompile.ir import Machine, Plan
from spcompile.lanes import Recording
from spcompile.viz.make_view import make_view
from spcompile.viz.picture import Picture


def visualize(
    plans: Sequence[Plan],
    path: str | Path | None = None,
    *,
    machine: str | Machine | None = None,
    recording: Recording | None = None,
    remarks: Sequence[str] = (),
) -> Picture:
    """A picture of the plans of one model's graphs; see `Plan.visualize`.

    Args:
        plans, path, machine, recording: as there.
        remarks: sentences to show above the figures.

    Raises:
        OptionError: no plans, a machine that no profile is named after, a recording of none of the plans, or a file
            that cannot be written.
    """
    if not plans:
        raise OptionError("there is no plan to show: the model has no graphs")
    of_recording = [recording is not None and plan == recording.plan for plan in plans]
    if recording is not None and len(plans) > 1 and not any(of_recording):
        raise OptionError("the recording is of none of these plans: show it with the plan that ran")
    picture = Picture(
        tuple(
            make_view(
                plan,
                machine=machine,
                recording=recording if is_recorded or len(plans) == 1 else None,
                remarks=remarks,
            )
            for plan, is_recorded in zip(plans, of_recording, strict=True)
        )
    )
    if path is not None:
        picture.save(path)
    return picture
