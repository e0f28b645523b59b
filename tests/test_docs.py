"""What README and the documentation say can be done: no link is dead, and no command fails.

The shell blocks of README and tutorials are run as they stand, each document in a folder of its own that has what its
reader has: OmniMedVQA/ (phantoms in its layout), clinic/ (a table and images), configs/. What differs from a reader's
machine is here and nowhere else: settings that make a command small are added to it (SMALL), published weights are
replaced by the tiny model, `make demo` is its last line, and pip installs nothing. A block under a comment
`<!-- not run: why -->` is not run. Every `medr1` line of every page is parsed against the program.
"""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from medr1.cli import app
from medr1.data.phantoms import write_phantoms
from medr1.data.records import Record
from medr1.evaluation.rows import NEEDED, STATED, read_reply
from medr1.evaluation.run import record_fields

ROOT = Path(__file__).parents[1]
PAGES = [
    page for place in ("*.md", "docs/**/*.md", "benchmarks/*.md", "results/*/*.md") for page in sorted(ROOT.glob(place))
]
RUN = [ROOT / "README.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
SHELL = ("bash", "sh")

TRAIN = (
    "--model tiny --steps 1 --set data.num_phantoms=640 --set optimizer.prompts_per_step=2"
    " --set optimizer.prompts_per_forward=0 --set rollout.num_completions=2 --set rollout.max_new_tokens=8"
)
SMALL = {
    "train": TRAIN,
    "run": TRAIN,
    "eval": "--max-new-tokens 8 --set data.num_phantoms=640",
    "explain": "--limit 2 --set rollout.max_new_tokens=64",  # a reply that is cut off chose nothing to explain
    "faithfulness": "--limit 2 --max-new-tokens 8",
    "plan": "--model tiny",
}
"""What is added to a command, by its name, or takes the place of the option that it has."""

MEDR1 = """#!{python} -SE
import json, os, socket, sys
launcher = os.path.basename(sys.argv[0]) == "torchrun"
place = sys.argv.index("medr1") + 1 if launcher else 1
argv = ["tiny" if word == "Qwen/Qwen2-VL-2B-Instruct" else word for word in sys.argv[place:]]
added = iter(json.loads({small!r}).get(argv[0], "").split() if argv else [])
for option, value in zip(added, added):
    if option in argv and option != "--set":
        argv[argv.index(option) + 1] = value
    else:
        argv += [option, value]
if launcher:
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *sys.argv[1:place], *argv])
files = {{name: f"/proc/{{os.getpid()}}/fd/{{number}}" for name, number in (("stdout", 1), ("stderr", 2))}}
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    server.sendall(json.dumps({{"argv": argv, "cwd": os.getcwd(), **files}}).encode() + b"\\n")
    sys.exit(int(server.makefile().readline() or 70))
"""
MAKE = """#!/usr/bin/env bash
if [ "$1" = demo ]; then exec medr1 demo --out runs/demo; fi
"""


def blocks(page: Path, languages: tuple[str, ...]) -> Iterator[re.Match[str]]:
    return (block for block in BLOCK.finditer(page.read_text(encoding="utf-8")) if block["language"] in languages)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for PATH with what the documents call."""
    folder = tmp_path_factory.mktemp("bin")
    path = folder / "socket"
    medr1 = MEDR1.format(python=sys.executable, small=json.dumps(SMALL), path=str(path))
    scripts = {"medr1": medr1, "torchrun": medr1, "make": MAKE, "pip": "#!/usr/bin/env bash\n"}
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    command = [sys.executable, str(ROOT / "tests" / "fork_server.py"), str(path)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    yield folder
    server.kill()
    server.wait()


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_no_command_fails(page: Path, programs: Path, tmp_path: Path) -> None:
    write_phantoms(tmp_path / "OmniMedVQA", num_images=320, seed=0)
    write_clinic(tmp_path / "clinic")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    for block in blocks(page, SHELL):
        if block["why"]:
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block["text"]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block['text']}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def write_clinic(folder: Path) -> None:
    """Twelve patients with two pictures each, as the tutorial's reader has them."""
    pictures = sorted(write_phantoms(folder.parent / "pictures", num_images=24, seed=1).glob("Images/*/*.png"))
    folder.mkdir()
    lines = ["image,question,option_a,option_b,answer,modality,question_type,group"]
    for number, picture in enumerate(pictures):
        (folder / f"{number}.png").write_bytes(picture.read_bytes())
        lines.append(
            f"{number}.png,Is there a lesion?,Yes,No,{'AB'[number % 2]},X-Ray,Disease Diagnosis,p{number // 2}"
        )
    (folder / "questions.csv").write_text("\n".join(lines) + "\n")


def commands(page: Path) -> list[list[str]]:
    """The words of every `medr1` command in a page's shell blocks."""
    found = []
    for block in blocks(page, SHELL):
        text = block["text"].replace("\\\n", " ")
        for variable, value in re.findall(r"^for (\w+) in (\S+)", text, re.M):
            text = text.replace(f"${variable}", value)
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words):
                if word == "medr1" and words[0] != "pip":
                    found.append(words[place + 1 :])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_understood(page: Path) -> None:
    for words in commands(page):
        command = typer.main.get_command(app)
        rest = list(words)
        while hasattr(command, "commands"):
            assert rest and rest[0] in command.commands, f"no command {' '.join(words)!r}"
            command = command.commands[rest.pop(0)]
        with command.make_context("medr1", [word for word in rest if word != "…"]):
            pass


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_named_in_a_sentence_exist(page: Path) -> None:
    names = typer.main.get_command(app).commands
    for name in re.findall(r"`medr1 ([a-z]+)", page.read_text(encoding="utf-8")):
        assert name in names, f"{page.name} names medr1 {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_link_to_a_file_is_dead(page: Path) -> None:
    made = ("reference/commands.md", "reference/recipe.md")  # when the site is built; see docs/hooks.py
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path = target.partition("#")[0]
        if path and not target.startswith(("http://", "https://")) and not path.endswith(made):
            assert (page.parent / path).exists(), f"{page.name} links to {target}"


def test_python_of_the_api_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own lines, on few records and few tokens."""
    write_phantoms(tmp_path / "OmniMedVQA", num_images=24, seed=0)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "docs" / "reference" / "api.md", ("python",))
    small = '"optimizer.steps": 1, "optimizer.prompts_per_step": 2, "rollout.max_new_tokens": 8'
    text = block["text"].replace('"optimizer.steps": 50', small).replace("test, mode=", "test, max_new_tokens=8, mode=")
    assert small in text and "max_new_tokens=8, mode=" in text
    exec(compile(text, "api.md", "exec"), {})
    assert (tmp_path / "runs" / "mine" / "test.jsonl").is_file()


def test_every_column_of_a_row_is_told() -> None:
    """What any row has, what is stated of a model in its run's folder, and what is read from an open reply."""
    page = (ROOT / "docs" / "reference" / "run-folder.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(\w+)`", page.partition("## Rows of `medr1 eval`")[2].partition("\n## ")[0]))
    about = {"modality": None, "question_type": None, "source": "mine", "group": "a", "alternatives": ("bones",)}
    record = Record(id="a", images=(), question="What?", options=(), answer="bone", **about)
    row = record_fields(record, Path()) | dict.fromkeys((*STATED, "weights", "seen_by_run"), "") | {"mode": "think"}
    row |= {"reply": "<answer>bone</answer>"}
    assert (NEEDED.keys() | row.keys() | read_reply(row).keys()) - told == set()
