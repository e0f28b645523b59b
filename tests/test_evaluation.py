"""Evaluation with a real tiny model; kills, full disks and bad files with a stand-in for it."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from replies import OPTIONS_OF, REPLIES
from tiny_vlms import tiny_vlm

import medr1.evaluation.run as module
from medr1.data.records import Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation import rows as rows_module
from medr1.evaluation import scoring
from medr1.evaluation.metrics import summarise
from medr1.evaluation.run import evaluate, leave_out_too_long, weights_fingerprint
from medr1.evaluation.scoring import score
from medr1.policy.vlm import VLM
from medr1.processes import alone


def make_records(folder: Path, count: int = 6) -> list[Record]:
    """Questions of growing length; the right option is always the first."""
    folder.mkdir(exist_ok=True)
    records = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.new("RGB", (56, 28 + 28 * (number % 2)), (40 * number, 0, 90)).save(path)
        records.append(
            Record(
                id=f"r{number}",
                images=(path,),
                question="Which finding" + " really" * number + "?",
                options=("Cyst", "Tumour"),
                answer="A",
                modality=("CT", "OCT")[number % 2],
                question_type="Disease Diagnosis",
                source="made",
                group=f"g{number}",
            )
        )
    return records


class Stub:
    """Answers A to even records and B to odd ones; counts what it was asked and can die at a given batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[str]] = []
        self.images: list[Image.Image] = []
        self.die_at: int | None = None
        processor = SimpleNamespace(image_processor=SimpleNamespace(to_dict=lambda: {"max_pixels": 1}))
        core = SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))  # states no positions
        self.vlm = SimpleNamespace(
            model=torch.nn.Linear(2, 2), core=core, processor=processor, name="stub", folder=None
        )
        monkeypatch.setattr(module, "encode_prompts", self.encode)
        monkeypatch.setattr(module, "sample", self.sample)

    def encode(self, vlm: VLM, messages: list, images: list, thinking: bool) -> list[str]:
        self.images += [image for group in images for image in group]
        return [message[0]["content"][-1]["text"] for message in messages]

    def sample(self, vlm: VLM, prompts: list[str], **settings: object) -> SimpleNamespace:
        assert settings["greedy"]
        assert settings["num_completions"] == 1
        if self.die_at == len(self.batches):
            raise KeyboardInterrupt
        self.batches.append(prompts)
        letters = ["AB"[prompt.count("really") % 2] for prompt in prompts]
        return SimpleNamespace(
            texts=[f"<answer>{letter}</answer>" for letter in letters],
            finished_N=torch.tensor([letter == "A" for letter in letters]),
            mask_NT=torch.ones(len(prompts), 3),
            tokens=[],
            guesses={},
        )


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    return Stub(monkeypatch)


def run(stub: Stub, records: list[Record], out: Path, **settings: object) -> list[dict]:
    return evaluate(stub.vlm, records, mode="no-think", out=out, batch_size=2, **settings)


def without_time(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_one_row_a_record(stub: Stub, tmp_path: Path):
    records = make_records(tmp_path / "data")
    rows = run(stub, records, tmp_path / "run.jsonl")
    assert [row["id"] for row in rows] == [record.id for record in records]
    assert {row["key"] for row in rows} == {row["key"] for row in read_jsonl(tmp_path / "run.jsonl")}
    assert [row["correct"] for row in rows] == [True, False] * 3
    assert rows[1] == {
        "key": rows[1]["key"],
        "id": "r1",
        "modality": "OCT",
        "question_type": "Disease Diagnosis",
        "source": "made",
        "group": "g1",
        "images": ["data/1.png"],
        "question": "Which finding really?",
        "options": ["Cyst", "Tumour"],
        "gold": "A",
        "chance": 0.5,
        "model": "stub",
        "condition": "image",
        "mode": "no-think",
        "max_new_tokens": 256,
        "weights": weights_fingerprint(stub.vlm.model)[:16],
        "reply": "<answer>B</answer>",
        "finish": "length",
        "tokens": 3,
        "seconds": rows[1]["seconds"],
        "outcome": "letter",
        "letter": "B",
        "correct": False,
        "format_ok": True,
        "extractor_version": rows[1]["extractor_version"],
    }
    summary = summarise(rows)
    assert (summary["accuracy"], summary["truncated"], summary["by_modality"]["CT"]["accuracy"]) == (
        0.5,
        3,
        1.0,
    )


def test_batches_hold_prompts_of_like_length_longest_first(stub: Stub, tmp_path: Path):
    run(stub, make_records(tmp_path / "data"), tmp_path / "run.jsonl")
    assert [[prompt.count("really") for prompt in batch] for batch in stub.batches] == [
        [5, 4],
        [3, 2],
        [1, 0],
    ]


def test_questions_about_one_image_share_a_batch_and_the_image(stub: Stub, tmp_path: Path):
    first, second = make_records(tmp_path / "data", count=2)
    records = [
        owner.model_copy(update={"id": f"{owner.id}-{words}", "question": "Which finding" + " really" * words})
        for words in (0, 5, 2)
        for owner in (first, second)
    ]
    evaluate(stub.vlm, records, mode="no-think", out=tmp_path / "run.jsonl", batch_size=3)
    assert [[prompt.count("really") for prompt in batch] for batch in stub.batches] == [[5, 2, 0]] * 2
    assert len(stub.images) == 6 and len({id(image) for image in stub.images}) == 2


def test_nothing_of_paths_or_ids_reaches_the_prompt(stub: Stub, tmp_path: Path):
    run(stub, make_records(tmp_path / "secret"), tmp_path / "run.jsonl")
    text = "".join(prompt for batch in stub.batches for prompt in batch)
    assert "secret" not in text
    assert "png" not in text
    assert "r3" not in text


def test_a_killed_evaluation_goes_on(stub: Stub, tmp_path: Path):
    records = make_records(tmp_path / "data")
    whole = run(stub, records, tmp_path / "whole.jsonl")
    stub.batches, stub.die_at = [], 2
    out = tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(stub, records, out)
    assert len(read_jsonl(out)) == 4
    stub.batches, stub.die_at = [], None
    assert without_time(run(stub, records, out)) == without_time(whole)
    assert len(stub.batches) == 1
    assert without_time(read_jsonl(out)) == without_time(read_jsonl(tmp_path / "whole.jsonl"))
    assert without_time(run(stub, records, out)) == without_time(whole)  # complete: the model is not asked
    assert len(stub.batches) == 1


@pytest.mark.parametrize("cut", [1, 40, 700])
def test_a_torn_last_line_is_dropped_and_computed_again(stub: Stub, tmp_path: Path, cut: int):
    records = make_records(tmp_path / "data")
    records[0] = records[0].model_copy(update={"question": "Wélche?"})
    out = tmp_path / "run.jsonl"
    whole = run(stub, records, out)
    content = out.read_bytes()
    out.write_bytes(content[:-cut])
    stub.batches = []
    assert without_time(run(stub, records, out)) == without_time(whole)
    assert [len(batch) for batch in stub.batches] == [1 if cut < 600 else 2]
    assert len(read_jsonl(out)) == 6


def test_a_full_disk_leaves_whole_rows(stub: Stub, tmp_path: Path):
    records = make_records(tmp_path / "data")
    out = tmp_path / "run.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))  # the write is cut there, like on a full disk
    try:
        with pytest.raises(MedR1Error, match=r"run\.jsonl: cannot be written"):
            run(stub, records, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = out.read_text().splitlines(keepends=True)
    assert 0 < len(kept) < 6
    assert all(line.endswith("\n") and json.loads(line) for line in kept)
    assert [row["id"] for row in run(stub, records, out)] == [record.id for record in records]


def test_rows_of_another_evaluation_are_refused(stub: Stub, tmp_path: Path):
    records = make_records(tmp_path / "data")
    out = tmp_path / "run.jsonl"
    run(stub, records[:4], out)
    run(stub, records, out)  # more records of the same data: fine
    before = out.read_bytes()
    with pytest.raises(MedR1Error, match="holds 2 rows of another"):
        run(stub, records[:4], out)
    with pytest.raises(MedR1Error, match="holds 6 rows"):
        run(stub, records, out, max_new_tokens=5)
    with pytest.raises(MedR1Error, match="holds 6 rows"):
        run(stub, records, out, condition="blank")
    Image.new("RGB", (56, 56)).save(records[3].images[0])
    with pytest.raises(MedR1Error, match="holds 1 rows"):
        run(stub, records, out)
    with torch.no_grad():
        stub.vlm.model.weight[0, 0] += 1e-6
    with pytest.raises(MedR1Error, match="holds 6 rows"):
        run(stub, records, out)
    assert out.read_bytes() == before


def test_no_other_file_is_taken_for_rows(stub: Stub, tmp_path: Path):
    out = tmp_path / "notes.txt"
    out.write_text("no newline at the end")
    with pytest.raises(MedR1Error, match=r"notes\.txt: is no file of evaluation rows"):
        run(stub, make_records(tmp_path / "data"), out)
    assert out.read_text() == "no newline at the end"


def test_an_unreadable_image_stops_before_the_model_runs(stub: Stub, tmp_path: Path):
    records = make_records(tmp_path / "data")
    records[2].images[0].write_bytes(records[2].images[0].read_bytes()[:-30])
    records[4].images[0].unlink()
    with pytest.raises(MedR1Error, match=r"record r2: .*2\.png.*first of 2 unreadable images") as error:
        run(stub, records, tmp_path / "run.jsonl")
    assert "\n" not in str(error.value)
    assert not stub.batches
    assert not (tmp_path / "run.jsonl").exists()


def test_bad_requests(stub: Stub, tmp_path: Path):
    records = make_records(tmp_path / "data", 2)
    out = tmp_path / "run.jsonl"
    with pytest.raises(MedR1Error, match="no records"):
        run(stub, [], out)
    with pytest.raises(MedR1Error, match="record r0 is there twice"):
        run(stub, [records[0], records[0]], out)
    with pytest.raises(MedR1Error, match="'dark' is unknown; choose image, blank, shuffled"):
        run(stub, records, out, condition="dark")
    with pytest.raises(MedR1Error, match="mode 'loud'"):
        evaluate(stub.vlm, records, mode="loud", out=out)
    with pytest.raises(MedR1Error, match="r0: no image to blank"):
        run(stub, [records[0].model_copy(update={"images": ()})], out, condition="blank")


def test_controls_show_other_pictures(stub: Stub, tmp_path: Path):
    records = make_records(tmp_path / "data")
    run(stub, records, tmp_path / "blank.jsonl", condition="blank")
    assert [image.size for image in stub.images] == [(56, 28 + 28 * (n % 2)) for n in (5, 4, 3, 2, 1, 0)]
    assert all(len(image.getcolors()) == 1 for image in stub.images)
    rows = run(stub, records, tmp_path / "shuffled.jsonl", condition="shuffled")
    assert {row["condition"] for row in rows} == {"shuffled"}
    for number, row in enumerate(rows):
        shown = int(Path(row["images"][0]).stem)
        assert shown != number
        assert shown % 2 == number % 2  # the same modality


def test_score_reads_the_stored_replies_again(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = make_records(tmp_path / "data", 2)
    out = tmp_path / "run.jsonl"
    rows = run(stub, records, out)
    stale = [{**row, "correct": None, "outcome": "?", "letter": None, "format_ok": None} for row in rows]
    assert score(stale) == rows
    for one in (module, rows_module):
        monkeypatch.setattr(one, "EXTRACTOR_VERSION", 99)
    stub.batches = []
    assert [row["extractor_version"] for row in run(stub, records, out)] == [99, 99]
    assert [row["extractor_version"] for row in read_jsonl(out)] == [99, 99]
    assert not stub.batches


def test_several_processes_read_what_one_reads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scoring, "AT_ONCE", 250)
    of_all = {"id": "1", "gold": "A", "modality": "CT", "question_type": None, "source": "s", "group": "1"}
    replies = [
        of_all | {"question": "Which?", "options": list(OPTIONS_OF[name]), "mode": "think", "reply": reply}
        for name, reply, _ in REPLIES[:500]
    ]
    assert score(replies, 3) == score(replies)


def test_fingerprint_follows_content_not_identity():
    torch.manual_seed(0)
    first = torch.nn.Linear(3, 2)
    second = torch.nn.Linear(3, 2)
    assert weights_fingerprint(first) != weights_fingerprint(second)
    second.load_state_dict(first.state_dict())
    assert weights_fingerprint(first) == weights_fingerprint(second)
    assert weights_fingerprint(first) != weights_fingerprint(first.to(torch.bfloat16))


def test_a_real_model(tmp_path: Path):
    vlm = tiny_vlm("qwen2_vl")
    records = make_records(tmp_path / "data")
    rows = evaluate(vlm, records, mode="think", out=tmp_path / "a.jsonl", max_new_tokens=8, batch_size=4)
    one_by_one = evaluate(vlm, records, mode="think", out=tmp_path / "b.jsonl", max_new_tokens=8, batch_size=1)
    assert [row["reply"] for row in rows] == [row["reply"] for row in one_by_one]
    assert all(1 <= row["tokens"] <= 8 and row["finish"] in ("stop", "length") for row in rows)
    assert summarise(rows)["n"] == 6


def test_options_are_weighed_without_generating_in_no_think(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    vlm = tiny_vlm("qwen2_vl")
    records = make_records(tmp_path / "data")
    monkeypatch.setattr(module, "sample", None)
    options = {"mode": "no-think", "scoring": "options"}
    rows = evaluate(vlm, records, out=tmp_path / "a.jsonl", **options)
    for row in rows:
        assert row["scoring"] == "options" and row["tokens"] == 0
        assert sum(row["option_probs"]) == pytest.approx(1)
        assert row["confidence"] == max(row["option_probs"])
        assert row["letter"] == "AB"[row["option_probs"].index(row["confidence"])]
        assert row["correct"] == (row["letter"] == row["gold"])
    assert score(rows) == rows
    again = evaluate(vlm, records, out=tmp_path / "a.jsonl", **options)  # complete: read, not computed
    assert again == rows
    with pytest.raises(MedR1Error, match="holds 6 rows of another"):
        evaluate(vlm, records, mode="no-think", out=tmp_path / "a.jsonl")


def test_options_are_weighed_after_the_reasoning_that_was_written(tmp_path: Path):
    vlm = tiny_vlm("qwen2_vl")
    records = make_records(tmp_path / "data")
    plain, weighed = (
        evaluate(vlm, records, mode="think", out=tmp_path / f"{name}.jsonl", max_new_tokens=8, scoring=name)
        for name in ("reply", "options")
    )
    assert [row["reply"] for row in weighed] == [row["reply"] for row in plain]
    assert all(row["confidence"] is None for row in weighed if row["letter"] is None)
    assert {row["key"] for row in plain}.isdisjoint(row["key"] for row in weighed)


def test_votes(tmp_path: Path):
    vlm = tiny_vlm("qwen2_vl")
    records = make_records(tmp_path / "data")
    settings = {"mode": "think", "max_new_tokens": 8, "scoring": "votes", "batch_size": 4}
    rows = evaluate(vlm, records, out=tmp_path / "a.jsonl", num_samples=3, **settings)
    assert all(len(row["samples"]) == 3 and row["reply"] in [s["reply"] for s in row["samples"]] for row in rows)
    assert len({sample["reply"] for row in rows for sample in row["samples"]}) > 6, "samples differ"
    again = evaluate(vlm, records, out=tmp_path / "b.jsonl", num_samples=3, **settings)
    assert without_time(again) == without_time(rows)
    replies = ["<answer>B</answer>", "<answer>A</answer>", "?", "<answer>Tumour</answer>"]
    voted = score([{**rows[0], "samples": [{"reply": reply, "finish": "stop", "tokens": 5} for reply in replies]}])[0]
    assert voted["letter"] == "B" and voted["reply"] == replies[0]
    assert voted["option_probs"] == [1.5 / 4, 2.5 / 4]  # 1 and 2 votes, and one divided between the two
    assert voted["confidence"] == 2.5 / 4


def test_votes_depend_on_the_record_alone(tmp_path: Path):
    """Neither on the batch, nor on where a file was torn. In float64: a batch changes the last digits of logits, which
    in float32 may flip a rare draw that falls within them."""
    vlm = tiny_vlm("qwen2_vl", dtype=torch.float64)
    records = make_records(tmp_path / "data", count=10)
    settings = {"mode": "think", "max_new_tokens": 12, "scoring": "votes", "num_samples": 4}
    rows = evaluate(vlm, records, out=tmp_path / "16.jsonl", batch_size=16, **settings)
    assert len({sample["reply"] for row in rows for sample in row["samples"]}) > 10, "samples differ"
    for size in (8, 1):
        again = evaluate(vlm, records, out=tmp_path / f"{size}.jsonl", batch_size=size, **settings)
        assert without_time(again) == without_time(rows)
    lines = (tmp_path / "8.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "torn.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
    torn = evaluate(vlm, records, out=tmp_path / "torn.jsonl", batch_size=4, **settings)
    assert without_time(torn) == without_time(rows)


def test_two_at_once_into_one_file(stub: Stub, tmp_path: Path):
    """The second ends in a line and writes nothing; once the first has ended, or died, the next goes on."""
    records, out = make_records(tmp_path / "data"), tmp_path / "run.jsonl"

    class Second(Exception):
        pass

    def meanwhile(vlm: VLM, prompts: list[str], **settings: object) -> SimpleNamespace:
        with pytest.raises(MedR1Error, match=r"run\.jsonl: another process is writing it; let it end, or give another"):
            run(stub, records, out)
        raise Second

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sample", meanwhile)
        with pytest.raises(Second):
            run(stub, records, out)
    assert not out.exists()
    assert len(run(stub, records, out)) == len(read_jsonl(out)) == 6
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_two_wrote_is_not_gone_on_with(stub: Stub, tmp_path: Path):
    records, out = make_records(tmp_path / "data"), tmp_path / "run.jsonl"
    run(stub, records, out)
    out.write_bytes(out.read_bytes() * 2)
    with pytest.raises(MedR1Error, match=r"run\.jsonl: 12 rows of 6 questions: two evaluations wrote it"):
        run(stub, records, out)


def test_a_lock_dies_with_its_process(tmp_path: Path):
    code = (
        "import os, sys; from pathlib import Path; from medr1.processes import alone\n"
        "with alone(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        with pytest.raises(MedR1Error, match="another process is writing it"), alone(tmp_path):
            pass
        process.kill()
        process.wait()
    with alone(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), OSError(116, "stale file handle")])
def test_a_lock_whose_file_another_process_removes_is_taken_anew(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between opening and locking it; on NFS its handle is then stale."""
    told = [error]

    def samestat(*stats: os.stat_result, known=os.path.samestat) -> bool:
        if told:
            raise told.pop()
        return known(*stats)

    monkeypatch.setattr(os.path, "samestat", samestat)
    with alone(tmp_path):
        assert not told and (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("long", ["question", "image"])
def test_a_prompt_longer_than_the_models_positions(long: str, tmp_path: Path):
    vlm = tiny_vlm("qwen2_vl")
    records = make_records(tmp_path / "data", count=3)
    if long == "image":
        vlm.core.config.get_text_config().max_position_embeddings = 120
        pictures = tuple(record.images[0] for record in records)
        records[1] = records[1].model_copy(update={"images": pictures * 4})
        line = (
            r"^record r1: \d{3} tokens, images included, and a reply of 8 do not fit into the 120 positions of .*; sho"
        )
    else:
        records[1] = records[1].model_copy(update={"question": "Which finding" + " really" * 20_000 + "?"})
        line = r"^record r1: \d+,\d{3} tokens and a reply of 8 do not fit into the 1,024 positions of .*; shorten it or"
    with pytest.raises(MedR1Error, match=line):
        evaluate(vlm, records, mode="no-think", out=tmp_path / "run.jsonl", max_new_tokens=8, batch_size=1)
    if long == "question":
        assert not (tmp_path / "run.jsonl").exists(), "said before anything is asked"
        settings = {"mode": "no-think", "max_new_tokens": 8, "out": tmp_path / "run.jsonl"}
        assert leave_out_too_long(vlm, records, **settings) == [records[0], records[2]]
        assert [row["id"] for row in read_jsonl(tmp_path / "run.skipped.jsonl")] == ["r1"]
