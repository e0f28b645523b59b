"""The wheel alone, in a new environment that has the package's core dependencies and nothing else.

The environment is a real one, made in seconds: its core dependencies are links to those of this environment. So this
tests what is in the wheel and that no command of the core imports an extra; it does not test that an index has versions
to satisfy pyproject.toml, which `make demo` in CI does.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from medr1.data.phantoms import write_phantoms

ROOT = Path(__file__).parents[1]
SHORT_DEMO = """
import fork_server, medr1.cli, sys
sys.argv = ["medr1", "demo", "--out", "demo"]
medr1.cli.main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, as a clean clone has them."""
    copy = tmp_path_factory.mktemp("clone")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, copy]
    subprocess.run(command, check=True)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a new environment with the wheel and the core dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in core():
        for file in metadata.distribution(name).files or ():
            top = file.parts[0]
            if top != ".." and not (site / top).exists():
                (site / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    install = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--no-index", wheel], check=True)
    return folder / "bin"


def core() -> set[str]:
    """The distributions that the core needs, and what these need in turn."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    wanted = list(project["dependencies"])
    while wanted:
        requirement = wanted.pop()
        words, _, marker = requirement.partition(";")
        name = re.match(r"[\w.-]+", words)
        if name is None or "extra ==" in marker or name[0] in found:
            continue
        try:
            more = metadata.requires(name[0]) or []
        except metadata.PackageNotFoundError:  # of another platform or Python
            continue
        found.add(name[0])
        wanted += more
    return found


def run(environment: Path, folder: Path, *words: str) -> str:
    """What a command says, in a folder, without this repository on the path."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [environment / words[0], *words[1:]],
        cwd=folder,
        env=variables | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_the_wheel_holds(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    for preset in (ROOT / "configs").rglob("*.*"):
        assert f"medr1/cli/configs/{preset.relative_to(ROOT / 'configs').as_posix()}" in names
    for file in (ROOT / "src").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert file.relative_to(ROOT / "src").as_posix() in names
    assert not [name for name in names if "tests" in Path(name).parts]


def test_the_wheel_alone(environment: Path, tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "phantoms", num_images=24, seed=0)
    picture = next(data.glob("Images/*/*.png"))
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] in run(
        environment, tmp_path, "medr1", "--version"
    )
    present = "import importlib.util as u; print([*map(u.find_spec, ('gradio', 'pydicom', 'trl', 'pytest'))])"
    assert run(environment, tmp_path, "python", "-c", present) == "[None, None, None, None]\n"
    assert str(environment.parent) in run(environment, tmp_path, "python", "-c", "import medr1; print(medr1.__file__)")
    shutil.copy(ROOT / "tests" / "fork_server.py", tmp_path)
    run(environment, tmp_path, "python", "-c", SHORT_DEMO)
    assert (tmp_path / "demo" / "report.html").is_file()
    run(environment, tmp_path, "medr1", "data", "check", str(data), "--out", "check")
    assert (tmp_path / "check" / "check.html").is_file()
    options = ("--option", "CT", "--option", "MRI", "--max-new-tokens", "8", "--json")
    said = run(environment, tmp_path, "medr1", "ask", str(picture), "Which modality?", *options)
    assert "reply" in json.loads(said.splitlines()[-1])
    assert "modality" in run(environment, tmp_path, "medr1", "study", "--preset", "tiny", "--out", "study", "--list")
