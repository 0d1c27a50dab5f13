"""What all tests share: the hypothesis profiles.

``HYPOTHESIS_PROFILE=fuzz`` (``make fuzz``) runs 10 000 examples of every property test, those included that ask for
another number of their own. In CI the default profile draws the same examples every time, so that a red run is about
the change that it tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

FUZZ_EXAMPLES = 10_000

# Neither deadlines nor the too_slow check: both measure the machine, which compiles other things at the same time.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.register_profile("fuzz", settings.get_profile("default"), max_examples=FUZZ_EXAMPLES, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden text cases instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` compares a text with ``cases/<name>.txt`` beside the test file.

    ``pytest --update-golden`` writes the file instead; the diff of the checkout then shows what has changed.
    """
    folder = request.path.parent / "cases"

    def compare(name: str, text: str) -> None:
        path = folder / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            folder.mkdir(exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
        assert path.is_file(), f"no golden case {path.name} yet: run pytest --update-golden and read what it wrote"
        assert text + "\n" == path.read_text(encoding="utf-8")

    return compare


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under the fuzz profile, raise the number of examples also where a test's own ``@settings`` fixes it."""
    if os.environ.get("HYPOTHESIS_PROFILE") != "fuzz":
        return
    for item in items:
        test = getattr(item, "obj", None)
        test = getattr(test, "__func__", test)  # the function of a bound method
        if getattr(test, "is_hypothesis_test", False):
            # Hypothesis has no public way to change the settings of a decorated test; this is where it reads them.
            own: settings = test._hypothesis_internal_use_settings  # type: ignore[union-attr]
            test._hypothesis_internal_use_settings = settings(own, max_examples=FUZZ_EXAMPLES)  # type: ignore[union-attr]
