"""What people expect of a repository, and what keeps it easy to enter."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import medr1
from medr1.cli.presets import preset, presets
from medr1.config import load_config
from medr1.errors import MedR1Error
from medr1.study.run import load_study

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "medr1"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WINGS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")


def test_readme_is_short_and_has_one_picture() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert 1_000 < (ROOT / picture).stat().st_size < 200_000
    assert "arxiv.org/abs/2503.13939" in text and "not for clinical use" in text


def test_the_package_can_be_held_in_mind() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 16
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    layout = (ROOT / "docs" / "layout.md").read_text()
    for wing in WINGS:
        assert any(wing in layer.split(" | ") for layer in layers)
        assert f"  {wing}/" in layout
    for file in re.findall(r"`(\w+/[\w/]+\.py)`", layout):
        assert (PACKAGE / file).is_file(), f"docs/layout.md names {file}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_an_init_only_hands_on_names(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        lazy = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
        assert lazy or not isinstance(node, ast.ClassDef | ast.FunctionDef), f"{path}:{node.lineno}"


def quick() -> list[Path]:
    """The test files of `make quick`."""
    (names,) = re.findall(r"^QUICK := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)
    return [ROOT / "tests" / f"test_{name.partition('::')[0]}.py" for name in names.replace("\\\n", " ").split()]


def test_quick_reaches_every_wing() -> None:
    text = "".join(path.read_text() for path in quick())
    for wing in WINGS:
        assert f"medr1.{wing}" in text, f"no test of `make quick` imports {wing}"
    assert "test_cli.py" in {path.name for path in quick()}, "no command is run from end to end"


def test_every_public_name_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text().splitlines()
    for name in set(medr1.__all__) - {"NOTICE"}:
        assert f"::: medr1.{name}" in page


def test_make_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, re.M)
    said = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in phony.split():
        assert re.search(rf"make {target} +\w", said), f"make help does not explain {target}"


def test_citation_and_metadata_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = PROJECT["project"]
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert {"message", "title", "authors", "version", "license"} <= set(citation)
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    (method,) = citation["references"]
    assert method["identifiers"] == [{"type": "other", "value": "arXiv:2503.13939"}]
    assert [author["family-names"] for author in method["authors"]][0::6] == ["Lai", "Yang"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_repository_files_parse() -> None:
    folder = ROOT / ".github"
    for path in (*folder.rglob("*.yml"), ROOT / ".pre-commit-config.yaml"):
        assert yaml.safe_load(path.read_text())
    workflow = (folder / "workflows" / "test.yml").read_text()
    assert "make test" in workflow
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "END OF TERMS" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("name", presets("recipe"))
def test_every_recipe_preset_is_a_recipe(name: str) -> None:
    assert load_config(preset(name, "recipe")).method in ("grpo", "sft")


@pytest.mark.parametrize("name", presets("study"))
def test_every_study_preset_is_a_study(name: str) -> None:
    assert load_study(preset(name, "study"), None).name


def test_an_unknown_preset_is_one_line() -> None:
    with pytest.raises(MedR1Error, match="did you mean omnimedvqa-qwen2vl-2b"):
        preset("omnimedvqa-qwen2vl", "recipe")
    with pytest.raises(MedR1Error, match="There are: omnimedvqa, real, small-320, small-whole, small, tiny"):
        preset("nothing like it", "study")


@pytest.mark.parametrize(("in_ci", "reason", "status"), [
    ("", "needs Chromium", 0), ("1", "needs Chromium", 1), ("1", "needs a GPU", 0),
])  # fmt: skip
def test_a_skip_fails_in_ci_alone(tmp_path: Path, in_ci: str, reason: str, status: int) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(f"import pytest\ndef test_it():\n    pytest.skip({reason!r})\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-c", "/dev/null", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={"MEDR1_CI": in_ci, "PATH": "/usr/bin:/bin"})
    assert done.returncode == status, done.stdout + done.stderr
    assert reason in done.stdout
