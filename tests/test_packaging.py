"""Checkout, installation, wheel and sdist hold the same packages, with or without the link to ``passes``."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE", "spcompile", "passes")


def configuration() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def modules_on_disk() -> set[str]:
    """Every module as a path in an installation: ``passes/x.py`` counts as ``spcompile/passes/x.py``."""
    own = {path.relative_to(ROOT) for path in (ROOT / "spcompile").rglob("*.py")}
    passes = {Path("spcompile") / path.relative_to(ROOT) for path in (ROOT / "passes").rglob("*.py")}
    return {path.as_posix() for path in own | passes}


def copy_without_link(target: Path) -> Path:
    """Copy what a build needs into ``target``, without the link: as a checkout on a file system that has no links."""
    target.mkdir()
    for name in BUILD_FILES:
        source = ROOT / name
        if source.is_file():
            shutil.copy(source, target)
            continue
        shutil.copytree(source, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (target / "spcompile" / "passes").unlink(missing_ok=True)
    return target


def build(source: Path, kind: str, target: Path) -> Path:
    """Build a ``wheel`` or an ``sdist`` of ``source`` with the setuptools installed here: without the network."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(target)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


def modules_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}


@pytest.fixture(scope="module")
def wheel_from_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The longest way: a checkout without the link, an sdist of it, a wheel of that."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is too old to build with (77 or later)")
    folder = tmp_path_factory.mktemp("build")
    sdist = build(copy_without_link(folder / "checkout"), "sdist", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build(folder / sdist.name.removesuffix(".tar.gz"), "wheel", folder)


def test_every_package_folder_is_listed() -> None:
    folders = {Path(module).parent.as_posix().replace("/", ".") for module in modules_on_disk()}
    assert folders == set(configuration()["tool"]["setuptools"]["packages"])


def test_every_package_has_an_init_file() -> None:
    folders = {Path(module).parent for module in modules_on_disk()}
    assert {(folder / "__init__.py").as_posix() for folder in folders} <= modules_on_disk()


def test_wheel_holds_every_module(wheel_from_sdist: Path) -> None:
    assert modules_in(wheel_from_sdist) == modules_on_disk()
    assert "spcompile/py.typed" in zipfile.ZipFile(wheel_from_sdist).namelist()


def test_wheel_holds_what_pages_are_made_of(wheel_from_sdist: Path) -> None:
    folder = Path("spcompile") / "viz"
    on_disk = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).iterdir() if path.is_file()}
    assert {name for name in zipfile.ZipFile(wheel_from_sdist).namelist() if name.startswith(f"{folder}/")} == on_disk
    assert f"{folder}/page.html" in on_disk


def test_link_changes_nothing_in_the_wheel(wheel_from_sdist: Path, tmp_path: Path) -> None:
    checkout = copy_without_link(tmp_path / "checkout")
    (checkout / "spcompile" / "passes").symlink_to("../passes", target_is_directory=True)
    assert modules_in(build(checkout, "wheel", tmp_path)) == modules_in(wheel_from_sdist)


def test_passes_of_a_wheel_import_under_their_name_only(wheel_from_sdist: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel_from_sdist).extractall(tmp_path)
    assert (tmp_path / "spcompile" / "passes" / "__init__.py").is_file()
    assert not (tmp_path / "passes").exists()


def test_passes_refuses_to_be_a_global_package() -> None:
    done = subprocess.run([sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "import spcompile.passes" in done.stderr


def test_link_leads_to_passes() -> None:
    assert (ROOT / "spcompile" / "passes").readlink() == Path("../passes")


def test_backend_is_registered() -> None:
    """Where spcompile is installed, ``backend="superpipeline"`` is known without importing it."""
    try:
        metadata.distribution("spcompile")
    except metadata.PackageNotFoundError:
        pytest.skip("spcompile is not installed here: the tests run from the checkout")
    (entry,) = metadata.entry_points(group="torch_dynamo_backends", name="superpipeline")
    assert entry.value == "spcompile.backend:superpipeline"


def test_constraints_pin_exact_public_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert [pin for pin in pins if pin.count("==") != 1 or "+" in pin] == []
