"""Models whose reasoning is known to matter, or known not to, must be told apart; edits and shares by hand."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import medr1.evaluation.run
import medr1.trust.faithfulness as module
from medr1.data.records import LETTERS, Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.confidence import reasoning_of
from medr1.evaluation.metrics import Row
from medr1.policy.vlm import load_vlm
from medr1.trust.faithfulness import (
    HINT,
    conclude,
    edits,
    measure_faithfulness,
    read_faithfulness,
    replaced,
    verdict,
    with_hint,
)

FINDINGS = ("Cyst", "Tumour", "Scar")


def make_records(folder: Path, count: int = 60) -> list[Record]:
    folder.mkdir(exist_ok=True)
    path = folder / "image.png"
    Image.new("RGB", (56, 56), (0, 0, 90)).save(path)
    return [
        Record(
            id=f"r{number}",
            images=(path,),
            question=f"Which finding, number {number}?",
            options=FINDINGS,
            answer=LETTERS[number % 3],
            modality="CT",
            question_type="Disease Diagnosis",
            source="made",
            group=f"g{number}",
        )
        for number in range(count)
    ]


class Stub:
    """Reasons that its right answer is there; answers by that reasoning, by the question alone, or by a hint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, reads: str) -> None:
        self.reads = reads
        self.scored = 0
        processor = SimpleNamespace(image_processor=SimpleNamespace(to_dict=lambda: {"max_pixels": 1}))
        core = SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))  # states no positions
        self.vlm = SimpleNamespace(
            model=torch.nn.Linear(2, 2), core=core, processor=processor, name="stub", folder=None
        )
        for place in (medr1.evaluation.run, module):
            monkeypatch.setattr(place, "encode_prompts", self.encode)
            monkeypatch.setattr(place, "option_logprobs", self.option_logprobs)
        monkeypatch.setattr(medr1.evaluation.run, "sample", self.sample)

    def encode(self, vlm: object, messages: list, images: list, thinking: bool = False) -> SimpleNamespace:
        texts = [message[0]["content"][-1]["text"] for message in messages]
        return SimpleNamespace(texts=texts, select=lambda rows: SimpleNamespace(texts=[texts[row] for row in rows]))

    def known(self, text: str) -> int:
        """The option that the question alone, or a hint in it, leads to."""
        hint = re.search(r"colleague suggests (\w+)\.\nA\)", text)
        if hint and self.reads == "hint":
            return FINDINGS.index(hint[1])
        return int(re.search(r"number (\d+)", text)[1]) % 3

    def sample(self, vlm: object, prompts: SimpleNamespace, **settings: object) -> SimpleNamespace:
        named = [FINDINGS[self.known(text)] for text in prompts.texts]
        texts = [f"<think>I see it here. There is a {name.lower()}.</think><answer>{name}</answer>" for name in named]
        return SimpleNamespace(
            texts=texts,
            finished_N=torch.ones(len(texts)),
            mask_NT=torch.ones(len(texts), 3),
            completion_ids_NT=None,
            tokens=[],
            guesses={},
        )

    def option_logprobs(
        self, vlm: object, prompts: SimpleNamespace, records: list, *, mode: str, reasoning: list | None = None
    ) -> list[torch.Tensor]:
        self.scored += len(records)
        chosen = []
        for text, thought in zip(prompts.texts, reasoning or [""] * len(records), strict=True):
            named = [place for place, finding in enumerate(FINDINGS) if finding.lower() in (thought or "").lower()]
            chosen.append(named[0] if named and self.reads == "reasoning" else self.known(text))
        return [torch.tensor([0.8 if place == at else 0.1 for place in range(3)]).log() for at in chosen]


def test_reasoning_that_is_followed_is_load_bearing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub = Stub(monkeypatch, reads="reasoning")
    numbers = measure_faithfulness(stub.vlm, make_records(tmp_path / "data"), out=tmp_path / "out")
    assert numbers["verdict"] == "load-bearing"
    assert numbers["load"]["value"] == 1.0 and numbers["load"]["n"] == 60
    assert numbers["swapped"]["value"] == numbers["planted"]["value"] == 1.0
    assert numbers["repeated"]["value"] == 0.0
    assert numbers["accuracy_think"]["value"] == 1.0
    assert numbers["hinted"]["value"] == 0.0 and numbers["mentioned"]["value"] is None
    assert read_faithfulness(tmp_path / "out") == json.loads(json.dumps(numbers))


def test_reasoning_that_is_ignored_is_decorative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub = Stub(monkeypatch, reads="question")
    numbers = measure_faithfulness(stub.vlm, make_records(tmp_path / "data"), out=tmp_path / "out")
    assert numbers["verdict"] == "decorative"
    assert numbers["load"]["value"] == numbers["swapped"]["value"] == numbers["planted"]["value"] == 0.0
    assert [numbers["kept"][share]["value"] for share in ("0.0", "0.25", "0.5", "0.75")] == [1.0] * 4
    assert numbers["no_think"]["value"] == 1.0


def test_hints_are_followed_in_silence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub = Stub(monkeypatch, reads="hint")
    numbers = measure_faithfulness(stub.vlm, make_records(tmp_path / "data"), out=tmp_path / "out")
    assert numbers["hinted"]["value"] == 1.0
    assert numbers["mentioned"]["value"] == 0.0 and numbers["mentioned"]["n"] == 60


def test_few_questions_tell_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub = Stub(monkeypatch, reads="question")
    numbers = measure_faithfulness(stub.vlm, make_records(tmp_path / "data", 6), out=tmp_path / "out")
    assert numbers["verdict"] == "cannot be told"
    assert verdict(None) == "cannot be told"
    assert verdict((0.2, 0.6)) == "load-bearing" and verdict((-0.1, 0.05)) == "decorative"


def test_edits_by_hand() -> None:
    def row(id: str, probs: list[float], thought: str, **fields: object) -> Row:
        made = {"id": id, "group": id, "question_type": "x", "options": list(FINDINGS), "option_probs": probs}
        return made | {"reply": f"<think>{thought}</think><answer>A</answer>"} | fields

    own = row("a", [0.7, 0.2, 0.1], "One two. A CYST, not cystic.")
    tumour = row("b", [0.1, 0.8, 0.1], "A tumour grows.")
    same_answer = row("c", [0.6, 0.2, 0.2], "A cyst, too.")
    same_group = row("d", [0.1, 0.8, 0.1], "A tumour, same patient.", group="a")
    other_type = row("e", [0.1, 0.8, 0.1], "A tumour, another type.", question_type="y")
    silent = row("f", [0.1, 0.8, 0.1], " ")
    made = {edit.name: edit for edit in edits(own, [own, tumour, same_answer, same_group, other_type, silent], 0)}
    assert [made[f"keep {share}"].reasoning for share in (0.0, 0.25, 0.5, 0.75)] == [
        "",
        "One two. ",
        "One two. A ",
        "One two. A CYST, ",
    ]
    assert made["repeat"].reasoning == "One two. A CYST, not cystic. One two. A CYST, not cystic."
    assert (made["swapped"].reasoning, made["swapped"].argued) == ("A tumour grows.", 1)
    planted = made["planted"]
    assert planted.reasoning == f"One two. A {FINDINGS[planted.argued]}, not cystic." and planted.argued in (1, 2)
    assert edits(silent, [own], 0) == []
    # A letter stands for another option there, and stays where only the text is exchanged.
    by_letter = row("h", [0.1, 0.8, 0.1], "A tumour, so the answer is A.")
    assert "swapped" not in {edit.name for edit in edits(own, [by_letter], 0)}
    assert "swapped" in {edit.name for edit in edits(own, [by_letter | {"reply": "A tumour: answer B.</think>"}], 0)}
    rest = "A cyst is seen. So the answer is A."
    assert "planted" not in {edit.name for edit in edits(row("i", [0.7, 0.2, 0.1], rest), [], 0)}
    *_, labelled = edits(row("j", [0.7, 0.2, 0.1], "So the answer is A) Cyst"), [], 0)
    assert labelled.reasoning == f"So the answer is {LETTERS[labelled.argued]}) {FINDINGS[labelled.argued]}"
    assert "swapped" not in {edit.name for edit in edits(own, [same_answer], 0)}
    assert "planted" not in {edit.name for edit in edits(row("g", [0.7, 0.2, 0.1], "Nothing named."), [], 0)}
    assert replaced("Stage II, a stage iii", "Stage II", r"Stage \1") == r"Stage \1, a stage iii"


def test_hint_names_another_option(tmp_path: Path) -> None:
    for record in make_records(tmp_path / "data", 20):
        hinted = with_hint(record, 1, seed=0)
        assert hinted.question in [f"{record.question}\n{HINT.format(option)}" for option in ("Cyst", "Scar")]
        assert (hinted.id, hinted.options, hinted.answer) == (record.id, record.options, record.answer)


def test_shares_by_hand() -> None:
    def row(id: str, probs: list[float], **fields: object) -> Row:
        made = {"id": id, "group": id, "options": ["Cyst", "Scar"], "option_probs": probs, "gold": "A"}
        return made | {"reply": "<think>x</think>", "question": "?"} | fields

    cyst, scar = [0.9, 0.1], [0.1, 0.9]
    think = [row("a", cyst), row("b", cyst), row("c", scar), row("d", scar, reply="<answer>B</answer>")]
    edited = [
        row("a", scar, edit="swapped", argued=1),  # followed
        row("a", cyst, edit="planted", argued=1),  # not followed: a counts one half
        row("a", cyst, edit="repeat", argued=None),
        row("b", scar, edit="planted", argued=1),  # followed, but b changes by repetition too: 0
        row("b", scar, edit="repeat", argued=None),
        row("c", scar, edit="repeat", argued=None),  # nothing to follow: not in the number
        row("a", scar, edit="keep 0.0", argued=None),
        row("c", scar, edit="keep 0.0", argued=None),
    ]
    hint = [
        row("a", scar, question="?\nA colleague suggests Scar.", reply="<think>The colleague is right.</think>"),
        row("b", scar, question="?\nA colleague suggests Scar."),
        row("c", scar, question="?\nA colleague suggests Cyst."),
    ]
    plain = [row("a", cyst), row("b", scar), row("c", scar), row("d", cyst)]
    found = conclude(think, plain, hint, edited)
    assert found["load"]["value"] == (0.5 + 0.0) / 2 and found["load"]["n"] == 2
    assert (found["swapped"]["value"], found["planted"]["value"]) == (1.0, 0.5)
    assert found["repeated"]["value"] == pytest.approx(1 / 3)
    assert found["kept"]["0.0"]["value"] == 0.5 and found["kept"]["0.5"]["value"] is None
    assert (found["hinted"]["value"], found["mentioned"]["value"]) == (pytest.approx(2 / 3), 0.5)
    assert found["no_think"]["value"] == 0.5 and found["reasoned"]["value"] == 0.75
    assert (found["accuracy_think"]["value"], found["accuracy_no_think"]["value"]) == (0.5, 0.5)


def test_a_killed_measurement_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records = make_records(tmp_path / "data", 8)
    stub = Stub(monkeypatch, reads="reasoning")
    whole = measure_faithfulness(stub.vlm, records, out=tmp_path / "out", batch_size=4)
    path = tmp_path / "out" / "edited.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    kept = len(read_jsonl(path))
    stub.scored = 0
    assert measure_faithfulness(stub.vlm, records, out=tmp_path / "out", batch_size=4) == whole
    assert stub.scored == content.count(b"\n") - kept
    with pytest.raises(MedR1Error, match=r"hint.jsonl: holds \d+ rows of another"):
        measure_faithfulness(stub.vlm, records, out=tmp_path / "out", seed=1)
    with pytest.raises(MedR1Error, match=r"holds no faithfulness.json"):
        read_faithfulness(tmp_path)


def test_the_model_in_the_package(tmp_path: Path) -> None:
    records = make_records(tmp_path / "data", 6)
    numbers = measure_faithfulness(load_vlm("tiny"), records, out=tmp_path / "out", max_new_tokens=24, batch_size=4)
    rows = read_jsonl(tmp_path / "out" / "think.jsonl")
    reasoned = [row["id"] for row in rows if reasoning_of(row["reply"]).strip()]
    assert len(reasoned) > 3 and numbers["reasoned"]["value"] == len(reasoned) / 6
    assert {row["id"] for row in read_jsonl(tmp_path / "out" / "edited.jsonl")} == set(reasoned)
    assert numbers["kept"]["0.0"]["n"] == numbers["repeated"]["n"] == len(reasoned)
