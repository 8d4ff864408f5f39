"""The sdist, and the wheel that is built of it, work outside of the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

USE = """
import fresnet, torch

params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=10)
print(fresnet.__file__, *fresnet.forward(params, torch.ones(2, 3, 16, 16)).shape)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, the wheel that is built of it, and in `site` what pip installs."""
    folder = tmp_path_factory.mktemp("built")
    call(ROOT, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(folder))
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    call(source, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder))
    (wheel,) = folder.glob("*.whl")
    offline = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    call(folder, "-m", "pip", "install", *offline, "--target", str(folder / "site"), str(wheel))
    return folder


def call(folder: Path, *command: str, path: str = "") -> str:
    """What Python prints, run in this folder, where it finds packages in `path` first."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_what_the_checkout_has(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fresnet/")}
    files = {path for path in (ROOT / "fresnet").rglob("*") if path.is_file()}
    there = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"}
    assert names == there
    assert "fresnet/py.typed" in names


def test_it_is_imported_and_runs(built: Path) -> None:
    place, *shape = call(built, "-c", USE, path=str(built / "site")).split()
    assert Path(place).is_relative_to(built / "site")
    assert shape == ["2", "10"]


def test_it_is_a_command(built: Path) -> None:
    site = str(built / "site")
    assert call(built, f"{site}/bin/fresnet", "--help", path=site).startswith("usage: ")
    assert "resnet50" in call(built, "-m", "fresnet", "models", path=site)
