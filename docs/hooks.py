"""Pages that are made while the documentation is built, so that they cannot fall behind.

- in layout.md the first sentence of every module;
- reference/commands.md from the Typer program, reference/recipe.md from the Pydantic recipe and study;
- files that lie elsewhere in the repository: CONTRIBUTING, CHANGELOG, LICENSE, benchmarks/, results/small/.
"""

import ast
import builtins
import logging
import posixpath
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "benchmarks/*", "results/small/**/*")

LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "length at least"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    files.append(File.generated(config, "reference/recipe.md", content=recipe()))
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.suffix not in (".pyc", ".gz", ".jsonl"):
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Links are written for the repository, in which docs/ is a folder; on the site it is the root."""
    uri = page.file.src_uri
    in_repository = f"docs/{uri}" if (ROOT / "docs" / uri).is_file() or not (ROOT / uri).is_file() else uri

    def link(found: re.Match[str]) -> str:
        target, sharp, anchor = found[1].partition("#")
        if not target or "://" in target:
            return found[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), target)).removeprefix("docs/")
        return f"]({posixpath.relpath(there, posixpath.dirname(uri) or '.')}{sharp}{anchor})"

    markdown = re.sub(r"\]\(([^)\s]+)\)", link, markdown)
    head, marker, _ = markdown.partition("<!-- modules -->")
    return f"{head}{modules()}" if marker and uri == "layout.md" else markdown


def on_post_page(output: str, page: Page, **kwargs: Any) -> str:
    """A warning, which `--strict` makes an error, where a page would fetch something from elsewhere."""
    for tag in re.findall(
        r"<(?:script|img|iframe|link(?! rel=.?canonical))[^>]* (?:src|href)=[\"']?https?://[^>]*>", output
    ):
        logging.getLogger("mkdocs.hooks").warning("%s fetches from elsewhere: %s", page.file.src_uri, tag)
    return output


def modules() -> str:
    """Each wing's modules with the first sentence of their docstrings."""
    package = ROOT / "src" / "medr1"
    lines = []
    for folder in (package, *sorted(path for path in package.rglob("*") if path.is_dir())):
        rows = []
        for path in sorted(folder.glob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            if docstring and path.name != "__init__.py":
                sentence = " ".join(docstring.split("\n\n")[0].split())
                rows.append(f"| `{path.name}` | {_cell(sentence)} |")
        if rows:
            lines += [f"### {folder.relative_to(package.parent).as_posix()}/", "\n".join(["| | |", "|---|---|", *rows])]
    return "\n\n".join(lines) + "\n"


def commands() -> str:
    """Every command with its arguments and options."""
    from medr1.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="medr1"), name="medr1", call_prefix="")
    text = re.sub(r"^\[bold\](.+)\[/bold\]\n((?:  .+\n)+)", _examples, text, flags=re.M)
    for name, part in _parts(command):  # Typer cuts their sentences
        sentence = " ".join((part.help or "").split("\n\n")[0].split())
        text = re.sub(rf"^\* `{name}`: .*\.\.\.$", f"* `{name}`: {sentence}", text, flags=re.M)
    return text.replace("# `medr1`", "# Commands", 1)


def _examples(found: re.Match[str]) -> str:
    return f"{found[1]}:\n\n```bash\n{textwrap.dedent(found[2])}```\n"


def _parts(command: Any) -> Iterator[tuple[str, Any]]:
    """A group's commands by name, and theirs."""
    for name, part in getattr(command, "commands", {}).items():
        yield name, part
        yield from _parts(part)


def recipe() -> str:
    """Every field of a recipe and of a study with its type, default and meaning."""
    from medr1.config import Config
    from medr1.study.run import Study

    parts = [
        "# Recipe fields",
        "A recipe is TOML and says what differs from these defaults: `medr1 train --config FILE`. On the command line "
        "`--set SECTION.FIELD=VALUE` says it. `medr1 config` prints all of them. An unknown key is refused, and the "
        "resolved recipe is written into [the run's folder](run-folder.md) as `recipe.toml`.",
        "## Top level",
        _table(Config),
    ]
    for name, field in Config.model_fields.items():
        if _is_section(field):
            parts += [f"## `[{name}]`", (field.annotation.__doc__ or "").strip(), _table(field.annotation)]
    parts += ["## A study", "`medr1 study FILE`: see [the whole study](../study.md).", _table(Study)]
    return "\n\n".join(parts) + "\n"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _table(model: type[BaseModel]) -> str:
    rows = [
        f"| `{name}` | {_kind(field)} | {_default(field)} | {_cell(field.description or '')} |"
        for name, field in model.model_fields.items()
        if not _is_section(field)
    ]
    return "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows])


def _kind(field: FieldInfo) -> str:
    """`think` or `no-think`; int, at least 1; list of str; …"""
    limits = [
        f"{words} {getattr(limit, name)}"
        for limit in field.metadata
        for name, words in LIMITS.items()
        if hasattr(limit, name)
    ]
    return _cell(", ".join([_type(field.annotation), *limits]))


def _type(annotation: Any) -> str:
    arguments = [argument for argument in get_args(annotation) if argument is not Ellipsis]
    match get_origin(annotation):
        case typing.Literal:
            return " or ".join(f"`{value}`" for value in arguments)
        case builtins.tuple:
            return f"list of {_type(arguments[0])}"
        case builtins.dict:
            return f"table of {_type(arguments[1])} by name"
        case None:
            return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
                name := getattr(annotation, "__name__", str(annotation)), name
            )
        case _:
            return " or ".join(_type(argument) for argument in arguments if argument is not type(None))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{_cell(str(list(value) if isinstance(value, tuple) else value))}`" if value != "" else "empty"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
