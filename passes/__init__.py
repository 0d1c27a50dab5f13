"""The passes over the captured graph, one file each, in the order that ``spcompile.pipeline`` runs them.

The folder lies at the top of the repository, but its import name is ``spcompile.passes``. The guard keeps the checkout
from offering it a second time as a global ``passes``: the same dataclasses would then exist twice, and be unequal.
"""

if __name__ != "spcompile.passes":
    raise ImportError(
        f"this package is spcompile.passes, not {__name__!r}: write 'import spcompile.passes' "
        "(or 'from spcompile.passes import ...')"
    )
