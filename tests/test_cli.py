"""The command line as a user meets it: results, and one clear line with a non-zero status for every mistake."""

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from medr1.cli import main
from medr1.data.datasets import load_records
from medr1.data.phantoms import write_phantoms
from medr1.data.records import read_jsonl
from medr1.data.splits import split_by_group

ROOT = Path(__file__).parents[1]
SMALL = [
    "--set",
    "rollout.num_completions=2",
    "--set",
    "rollout.max_new_tokens=4",
    "--set",
    "optimizer.prompts_per_step=2",
]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_images=40, seed=2)


class Said:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["medr1", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        said = capsys.readouterr()
        return Said(status, said.out, said.err)

    return call


def test_train_eval_score_report_ask(run: Any, phantoms: Path, tmp_path: Path) -> None:
    trained = run("train", "--data", phantoms, "--steps", "2", "--out", tmp_path / "run", *SMALL, "--json")
    assert trained.status == 0 and trained.json["steps"] == 2
    files = {}
    for name, model, condition in (
        ("base", "tiny", "image"),
        ("trained", tmp_path / "run" / "model", "image"),
        ("blank", tmp_path / "run" / "model", "blank"),
    ):
        files[name] = tmp_path / f"{name}.jsonl"
        said = run(
            "eval", "--model", model, "--data", phantoms, "--condition", condition, "--out", files[name],
            "--max-new-tokens", "48", "--json", *(["--looking"] if name == "trained" else []),
        )  # fmt: skip
        assert said.status == 0, said.err
        if name == "trained":
            assert {"reliance_blank", "claims", "consistency", "unread"} <= said.json["looking"].keys()
            assert said.json["looking"]["consistency"]["reader"] == "tiny"  # the run's base
            assert {"blank", "reader"} <= {path.stem for path in (tmp_path / "trained.looking").glob("*.jsonl")}
        assert {"accuracy", "ci95", "n", "chance", "by_modality", "by_question_type", "unparsed"} <= said.json.keys()
        assert said.json["n"] == len(read_jsonl(files[name])) == 50  # by hash, of ten of the 40 images
        assert set(said.json["by_modality"]["CT"]) == {"accuracy", "ci95", "n", "chance"}
    again = run("score", files["trained"], "--json")
    assert again.json["n"] == 50
    page = tmp_path / "report.html"
    said = run(
        "report", "--base", files["base"], "--trained", files["trained"], "--run", tmp_path / "run",
        "--control", f"blank={files['blank']}", "--out", page, "--json",
    )  # fmt: skip
    assert said.status == 0, said.err
    assert "not for clinical use" in page.read_text() and "Does it look?" in page.read_text()
    assert {"after", "before", "change"} == set(said.json["looking"])
    wrong = run("eval", "--data", phantoms, "--looking", "--condition", "blank", "--out", tmp_path / "wrong.jsonl")
    assert wrong.status == 1 and "leave --condition blank out" in wrong.err
    image = next((phantoms / "Images" / "Phantom CT").glob("*.png"))
    said = run("ask", image, "Which modality made this image?", *options("MRI", "CT", "OCT", "X-Ray"), "--json")
    assert said.status == 0, said.err
    assert (said.json["letter"], said.json["answer"]) == ("B", "CT")
    heat = (
        "--compare",
        "tiny",
        "--mode",
        "no-think",
        "--heatmap",
        tmp_path / "heat.png",
        "--out",
        tmp_path / "case.html",
    )
    said = run("ask", image, "Which modality made this image?", *options("MRI", "CT"), *heat)
    assert said.status == 0, said.err
    for number in (1, 2):
        assert (tmp_path / f"heat-{number}.png").is_file() and f"heat-{number}.png" in said.out
    assert (tmp_path / "case.html").is_file()


def test_a_model_is_asked_about_what_its_own_run_held_out(run: Any, phantoms: Path, tmp_path: Path) -> None:
    split = ("--set", "data.test_fraction=0.5", "--set", "data.split_seed=7")
    assert run("train", "--data", phantoms, "--steps", "1", "--out", tmp_path / "run", *SMALL, *split).status == 0
    model = tmp_path / "run" / "model"

    def asked(name: str, *arguments: Any) -> set[str]:
        out = tmp_path / f"{name}.jsonl"
        said = run("eval", "--out", out, "--mode", "no-think", "--score-options", *arguments)
        assert said.status == 0, said.err
        return {row["id"] for row in read_jsonl(out)}

    held_out = asked("base", "--model", "tiny", "--data", phantoms, *split)
    assert asked("trained", "--model", model, "--data", phantoms) == held_out
    assert len(asked("told", "--model", model, "--data", phantoms, "--set", "data.test_fraction=0.2")) < len(held_out)
    elsewhere = write_phantoms(tmp_path / "other", num_images=40, seed=3)  # nothing of it was trained on
    other = asked("other", "--model", model, "--data", elsewhere)
    assert other == {record.id for record in split_by_group(load_records(elsewhere), 0.2, 0)[1]}  # as by default


def options(*texts: str) -> list[str]:
    return [argument for text in texts for argument in ("--option", text)]


def test_phantoms_with_a_shortcut_on_request(run: Any, tmp_path: Path) -> None:
    plain = run("data", "phantoms", "--n", 16, "--out", tmp_path / "plain", "--json")
    assert len(load_records(Path(plain.json["data"]))) == 80
    ways = ("--shortcut", 0.9, "--shortcut-in", "positions")
    planted = run("data", "phantoms", "--n", 16, *ways, "--out", tmp_path / "planted", "--json").json
    assert sum(record.answer == "A" for record in load_records(Path(planted["train"]))) > 60
    assert len(load_records(Path(planted["test"]))) == 20
    assert_one_line(run("data", "phantoms", "--n", 16, "--out", tmp_path / "plain"), "holds something already")
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / "plain"
    assert_one_line(run("data", "phantoms", "--n", 16, "--out", nowhere), "plain: cannot be written (Not a directory)")
    assert_one_line(run("data", "check", tmp_path / "plain", "--out", nowhere), "cannot be a folder of results")


def test_data_check_and_config(run: Any, phantoms: Path, tmp_path: Path) -> None:
    assert run("data", "check", phantoms, "--json").json["records"] == 200
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(run("config", "--set", "optimizer.steps=3").out)
    assert "steps = 3" in run("config", "--config", recipe).out


def break_data(phantoms: Path, folder: Path, kind: str) -> Path:
    """A copy of the phantoms with one defect."""
    shutil.copytree(phantoms, folder)
    file = folder / "QA_information" / "Open-access" / "Phantom CT.json"
    rows = json.loads(file.read_text())
    if kind == "json":
        file.write_text(file.read_text()[:-40])
        return folder
    if kind == "image":
        (folder / rows[0]["image_path"]).write_bytes(b"no picture")
    if kind == "gold":
        rows[0]["gt_answer"] = "Something else"
    if kind == "duplicate":
        rows[0]["option_A"] = rows[0]["option_B"] = rows[0]["gt_answer"]
    if kind == "modality":
        rows[0]["modality_type"] = "Telepathy"
    if kind == "escape":
        rows[0]["image_path"] = "../../secret.png"
    file.write_text(json.dumps(rows))
    return folder


def test_what_a_file_says_is_shown_and_not_obeyed_by_the_terminal(run: Any, phantoms: Path, tmp_path: Path) -> None:
    """A title, a cleared screen, hidden text: sequences in a cell of a table, which errors and findings quote."""
    shutil.copy(next(phantoms.rglob("*.png")), tmp_path / "a.png")
    rows = ["id,image,question,option_a,option_b,answer", "1,a.png,What?,CT,MRI,A"]
    rows += ["2,a.png,Which?,CT,MRI,\x1b[8mZ", '"\x1b]0;owned\x07\x9b2J3",\x1b[2Jb.png,Where?,CT,MRI,A']
    (tmp_path / "questions.csv").write_text("\n".join(rows), encoding="utf-8")
    told = run("data", "check", tmp_path)
    refused = run("data", "convert", tmp_path, "--to", "csv", "--out", tmp_path / "out")
    assert told.status == 0 and "b.png" in told.out
    assert_one_line(refused, "owned")
    for text in (told.out, told.err, refused.out, refused.err):
        assert not {"\x1b", "\x07", "\x9b"} & set(text)


def test_a_name_that_is_not_utf_8_ends_in_one_line(run: Any, phantoms: Path, tmp_path: Path) -> None:
    """As folders of older systems have them; rows and pages, which are UTF-8, would name it."""
    latin = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    shutil.copytree(phantoms, latin)
    for words in (
        ("eval", "--data", latin, "--limit", "1", "--max-new-tokens", "2", "--out", tmp_path / "rows.jsonl"),
        ("data", "check", latin, "--out", tmp_path / "check"),
        ("data", "show", latin, "--out", tmp_path / "show.html"),
        ("train", "--data", latin, "--steps", "1", "--out", tmp_path / "run", *SMALL),
    ):
        assert_one_line(run(*words), "is not UTF-8, near ")
    image = next(phantoms.rglob("*.png"))
    assert_one_line(run("ask", image, "caf\udce9?"), "the question cannot be asked: it is not in UTF-8")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("json", "Phantom CT.json"),
        ("image", "00000.png"),
    ],
)
def test_bad_data(run: Any, phantoms: Path, tmp_path: Path, kind: str, message: str) -> None:
    data = break_data(phantoms, tmp_path / "data", kind)
    said = run("eval", "--data", data, "--part", "all", "--out", tmp_path / "rows.jsonl")
    assert_one_line(said, message)
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gold", "the answer 'Something else' is not among the options"),
        ("duplicate", "duplicate options"),
        ("modality", "unknown modality 'Telepathy'"),
        ("escape", "image path '../../secret.png' leads out of the data folder"),
    ],
)
def test_a_bad_row_is_left_out_and_told(run: Any, phantoms: Path, tmp_path: Path, kind: str, reason: str) -> None:
    data = break_data(phantoms, tmp_path / "data", kind)
    rows = tmp_path / "rows.jsonl"
    said = run("eval", "--data", data, "--part", "all", "--limit", "1", "--max-new-tokens", "1", "--out", rows)
    assert said.status == 0, said.err
    assert len(read_jsonl(rows)) == 1
    assert f"{data}: 1 of 200 rows left out, first " in said.err
    assert f"Phantom CT.json: row 1: {reason}" in said.err
    assert f"`medr1 data check {data}` lists them" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["train", "--data", "DATA", "--modality", "Telepathy"], "Telepathy"),
        (["train", "--data", "DATA", "--modality", "CT", "--set", 'data.sources=["Phantom MRI"]'], "Phantom MRI"),
        (["train", "--data", "DATA", "--set", "rollout.num_completions=1"], "set 2 or more"),
        (["train", "--data", "DATA", "--set", "grpo.betta=0"], "did you mean grpo.beta"),
        (["train", "--data", "DATA", "--model", "./no-model"], "no such folder"),
        (["train", "--data", "DATA", "--method", "dpo"], "--method: 'dpo' is not one of"),
        (["train", "--data", "DATA", "--config", "no.toml"], "no.toml: no such file"),
        (["eval", "--data", "DATA", "--mode", "loud"], "loud"),
        (["eval", "--data", "DATA", "--condition", "dark"], "dark"),
        (["eval", "--data", "DATA", "--part", "half"], "--part: 'half' is not one of"),
    ],
)
def test_mistakes(run: Any, phantoms: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    arguments = [str(phantoms) if argument == "DATA" else argument for argument in arguments]
    said = run(*arguments, "--out", tmp_path / "out")
    assert_one_line(said, message)
    assert not (tmp_path / "out" / "model").exists()


def test_more_mistakes(run: Any, tmp_path: Path) -> None:
    assert_one_line(run("score", tmp_path / "no.jsonl"), "no.jsonl")
    assert_one_line(run("ask", tmp_path / "no.png", "What?", "--option", "CT", "--option", "MRI"), "no.png")
    assert_one_line(run("ask", tmp_path / "no.png", "What?", "--option", "CT"), "two options or more")
    assert_one_line(run("ask", tmp_path / "no.png", "What?", "--out", tmp_path / "a.pdf"), "name it a.html")
    assert_one_line(run("ask", tmp_path / "no.png", "What?", "--heatmap", tmp_path / "a.jpg"), "name it a.png")
    assert_one_line(run("ask", tmp_path, "What?"), "holds no DICOM image")
    assert_one_line(run("data", "show", "phantoms", "--out", tmp_path / "a.pdf"), "name it a.html")
    assert_one_line(run("data", "check", tmp_path / "none"), "none")
    assert_one_line(run("eval", "--out", tmp_path), "is a folder; name a .jsonl file")
    (tmp_path / "file").write_text("mine")
    for command in ("explain", "faithfulness", "train"):
        said = run(command, "--limit" if command != "train" else "--steps", "1", "--out", tmp_path / "file")
        assert_one_line(said, "file: cannot be a folder of results (it is a file)")
    assert (tmp_path / "file").read_text() == "mine"
    assert_one_line(run("eval", "tiny", "--checkpoints", "--calibration", "c.json"), "leave it out")


def test_an_answer_is_said_also_where_its_heatmap_cannot_be_written(run: Any, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64), (0, 90, 0)).save(image)
    said = run(
        "ask", image, "Which?", "--max-new-tokens", "4", "--heatmap", tmp_path / "a.png", "--out", tmp_path / "a.html"
    )
    assert_one_line(said, "there is no heatmap")
    assert "answer" in said.out and (tmp_path / "a.html").is_file()


def test_a_terminal_that_is_not_utf_8_is_written_to(run: Any, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code = "import sys; from medr1.cli.main import main; sys.argv = ['medr1', 'score', 'né.jsonl']; main()"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert said.returncode == 1 and b"n?.jsonl" in said.stderr and b"Traceback" not in said.stderr


def assert_one_line(said: Said, message: str) -> None:
    assert said.status != 0
    lines = [line for line in said.err.splitlines() if line.startswith("medr1: ")]
    assert len(lines) == 1 and message in lines[0], said.err
    assert "Traceback" not in said.err


def test_a_killed_process_resumes_to_the_same_model(run: Any, phantoms: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a real process, then the same command again."""

    def command(out: Path) -> list[str]:
        settings = ["--set", "log.save_every=2", "--set", "optimizer.learning_rate=1e-3", *SMALL]
        return ["train", "--data", str(phantoms), "--steps", "12", "--out", str(out), *settings]

    whole = run(*command(tmp_path / "whole"))
    assert whole.status == 0, whole.err
    lines = whole.out.splitlines()
    assert lines[0].startswith("trained 12 steps") and len(lines) < 7, "log lines go to log.jsonl and trackers"
    again = command(tmp_path / "killed")
    killed = subprocess.Popen([sys.executable, "-m", "medr1", *again], cwd=ROOT / "src", stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "checkpoint-4").exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "model").exists()
    assert run(*again).status == 0
    whole, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all((whole[name] == resumed[name]).all() for name in whole)
    steps = [row["step"] for row in read_jsonl(tmp_path / "killed" / "completions.jsonl")]
    assert steps == sorted(steps) and len(steps) == 12 * 2 * 2


def test_explain_writes_numbers_overlays_and_a_page(run: Any, phantoms: Path, tmp_path: Path) -> None:
    asked = ("explain", "--data", phantoms, "--question-type", "Lesion Grading", "--limit", "2")
    said = run(*asked, "--out", tmp_path / "maps", "--json")
    assert said.status == 0 and said.json["n"] == 2 and said.json["pointing"]["about the region"]["n"] == 2
    assert said.json["page"] == str(tmp_path / "maps/explain.html")
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {
        "answers.jsonl",
        "explain.html",
        "heatmaps.json",
        "heatmaps.jsonl",
        "overlays",
    }
    assert len(list((tmp_path / "maps/overlays").glob("*.png"))) == 2
    said = run(*asked, "--out", tmp_path / "maps", "--method", "gradient")
    assert said.status == 1 and "rows of another model" in said.err


IMPORTS_NO_TORCH = (
    "import sys; from medr1.__main__ import main; sys.argv = ['medr1', *sys.argv[1:]]\n"
    "try: main()\n"
    "except SystemExit as stop: print('status', stop.code or 0, 'torch' in sys.modules, file=sys.stderr)"
)


def alone(*arguments: str | Path, cwd: Path = ROOT / "src", **environment: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, which says its status and whether torch was imported on its last line."""
    command = [sys.executable, "-c", IMPORTS_NO_TORCH, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",), ("data",), ("build",), ("train", "-h")])
def test_help_is_no_mistake_and_quick(arguments: tuple[str, ...]) -> None:
    said = alone(*arguments)
    assert said.stderr.splitlines()[-1] == "status 0 False"
    assert "Usage: medr1" in said.stdout and said.stdout.count("Usage:") == 1


def test_version_without_torch() -> None:
    said = alone("--version")
    assert said.stdout.startswith("medr1 0.") and said.stderr.splitlines()[-1] == "status 0 False"


@pytest.mark.parametrize("command", ["eval", "run", "study", "data"])
def test_only_training_is_shared_by_a_launcher(command: str) -> None:
    """Two processes would answer everything twice, into one file; one of them says so."""
    launched = {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    first, second = (alone(command, "--out", "out", **launched, RANK=rank) for rank in ("0", "1"))
    assert first.stderr.splitlines()[-1] == second.stderr.splitlines()[-1] == "status 1 False"
    assert f"medr1 {command} is for one process, and a launcher started 2; only `medr1 train`" in first.stderr
    assert len(first.stderr.splitlines()) == 2 and len(second.stderr.splitlines()) == 1
    named = alone("train", "--config", "none.toml", **launched, RANK="0").stderr
    assert "a launcher" not in named and "none.toml" in named


def test_every_command_shows_examples_and_choices(run: Any) -> None:
    for command in ("demo", "run", "train", "study", "plan", "config", "export", "eval", "score", "report", "ask"):
        assert f"medr1 {command}" in run(command, "-h").out.split("For example")[1], command
    said = run("train", "-h").out
    assert "<grpo|sft>" in said and "think|no-think|think-after" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("train", "--method", "gpro", "--out", "x"),
            "--method: 'gpro' is not one of 'grpo', 'sft'; did you mean grpo?",
        ),
        (("train", "--stpes", "3", "--out", "x"), "no such option --stpes; did you mean --steps?"),
        (("traim",), "no such command 'traim'. Did you mean 'train'?"),
        (("train", "--data", "a", "--data", "b", "--out", "x"), "--data is given 2 times, and takes one value"),
        (("report", "--base", "b", "--trained", "x", "--out", "y", "--out", "z"), "--out is given 2 times"),
        (("eval", "--mode", "no_think", "--out", "x"), "did you mean no-think?"),
        (("train",), "--out is missing"),
        (("train", "--model", "tinyy", "--out", "x"), "did you mean tiny?"),
        (("train", "--set", "optimiser.steps=3", "--out", "x"), "did you mean optimizer.steps?"),
        (("train", "--preset", "omnimedvqa", "--out", "x"), "did you mean omnimedvqa-qwen2vl-2b?"),
        (("study", "--out", "x"), "no study is named"),
        (("eval", "--data", "x"), "--out is missing"),
    ],
)
def test_wrong_words_are_one_line_before_torch(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    said = alone(*arguments, cwd=tmp_path)
    *lines, status = said.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("medr1: ") and message in lines[0], said.stderr
    assert status in ("status 1 False", "status 2 False") and not said.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("seen", ["pydantic", "typer", "torch", "transformers"])
def test_ctrl_c_within_imports_is_one_line(seen: str, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "medr1", "train", "--out", str(tmp_path / "run"), *SMALL]
    process = subprocess.Popen(command, cwd=ROOT / "src", stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("import time:") and line.split("|")[-1].strip().startswith(seen):
            break
    process.send_signal(signal.SIGINT)
    said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.wait() == 130
    assert said == ["medr1: stopped; the same command goes on from what is saved\n"]


def test_ctrl_c_after_the_last_line_says_nothing_more() -> None:
    program = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from medr1.processes import heed_interrupts, say_stopped
heed_interrupts()
say_stopped()
os.kill(os.getpid(), signal.SIGINT)
"""
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "src", stderr=subprocess.PIPE, text=True)
    assert said.returncode == 130
    assert said.stderr == "medr1: stopped; the same command goes on from what is saved\n"


def test_ctrl_c_while_training_on_a_terminal(phantoms: Path, tmp_path: Path) -> None:
    """The last line stands alone, and the terminal's cursor is back."""
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "medr1", "train", "--data", str(phantoms), "--steps", "1000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run"), *SMALL], cwd=ROOT / "src", stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    while b"2/1000" not in shown:
        shown += (more := os.read(screen, 4096))
        assert more and process.poll() is None, shown
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # what Linux says once nobody writes
        while more := os.read(screen, 4096):
            shown += more
    assert process.wait() == 130
    assert b"Traceback" not in shown
    last = shown.decode().rstrip().splitlines()[-1]
    assert last == "medr1: stopped; the same command goes on from what is saved"
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


def test_a_run_ends_with_what_came_out_and_says_at_once_that_it_is_complete(
    run: Any, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a run"
    schedule = ("--set", "optimizer.schedule=constant_with_warmup", "--set", "log.save_every=1")
    asked = ("train", "--data", phantoms, "--out", out, *SMALL, *schedule, "--steps")
    first = run(*asked, "2", "--json")
    assert first.status == 0 and "\r" not in first.err
    assert [line.split("  ")[0] for line in first.err.splitlines() if line.startswith("step")] == [
        "step 1/2",
        "step 2/2",
    ]
    again = alone(*asked, "2")
    assert again.stdout.startswith(f"complete: {out}/model had its 2 steps")
    assert f"next         medr1 eval --model '{out}' --data {phantoms}" in again.stdout
    assert again.stderr.splitlines()[-1] == "status 0 False"
    assert json.loads(alone(*asked, "2", "--json").stdout.splitlines()[-1]) == first.json

    said = run(*asked, "4", "--set", "optimizer.seed=1", "--set", "grpo.beta=0.5")
    assert_one_line(said, "grpo.beta was 0.04 and is now 0.5")
    assert "optimizer.seed was 0 and is now 1" in said.err
    assert_one_line(run(*asked, "1"), "a run can be extended, not shortened")

    longer = run(*asked, "4", "--json")
    whole = run(*asked[:4], tmp_path / "whole", *asked[5:], "4", "--json")
    assert longer.status == whole.status == 0, longer.err
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (out, tmp_path / "whole")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert read_jsonl(out / "extensions.jsonl") == [
        {"step": 2, "from_steps": 2, "to_steps": 4, "schedule": "constant_with_warmup"}
    ]

    held_out = ("--limit", "4")
    table = run("eval", out, "--checkpoints", *held_out, "--json")
    assert table.status == 0, table.err
    assert [line["name"] for line in table.json["checkpoints"]] == ["base", "checkpoint-3", "model"]
    assert [line["step"] for line in table.json["checkpoints"]] == [0, 3, 4]
    assert all(line["n"] == 4 for line in table.json["checkpoints"])
    assert len(read_jsonl(out / "evaluations" / "base.jsonl")) == 4


def test_a_schedule_that_came_down_is_extended_only_if_asked(run: Any, phantoms: Path, tmp_path: Path) -> None:
    asked = ("train", "--data", phantoms, "--out", tmp_path / "run", *SMALL, "--steps")
    assert run(*asked, "1").status == 0
    assert_one_line(run(*asked, "2"), "its linear schedule came down to 0 at the old end")
    assert run(*asked, "2", "--extend", "--json").json["steps"] == 2
    assert "complete" in run(*asked, "2").out


def test_a_recipe_in_one_go(run: Any, phantoms: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(run("config", "--set", "optimizer.steps=1", "--set", "rollout.mode=no-think", *SMALL[0:]).out)
    asked = ("run", recipe, "--data", phantoms, "--limit", "8", "--out", tmp_path / "all")
    said = run(*asked)
    assert said.status == 0, said.err
    for words in ("before training", "after 1 steps", "image blanked", "option texts alone", "report.html", "next"):
        assert words in said.out
    assert "Does it look?" in (tmp_path / "all" / "report.html").read_text()
    again = alone(*asked, "--json")
    assert again.stderr.splitlines()[-1] == "status 0 False"
    result = json.loads(again.stdout.splitlines()[-1])
    assert result["looking"]["after"]["reliance_blank"]["n"] == 8
    assert result["n"] == 8 and set(result["ci95"]) >= {"base_macro", "trained_macro", "blank", "gain_points"}


def test_replies_that_came_to_nothing_are_told_with_the_remedy(run: Any, phantoms: Path, tmp_path: Path) -> None:
    said = run("eval", "--data", phantoms, "--limit", "5", "--max-new-tokens", "2", "--out", tmp_path / "rows.jsonl")
    assert "5 of 5 replies had no answer (5 cut at 2 tokens): raise --max-new-tokens" in said.out
