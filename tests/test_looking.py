"""Measures of looking by hand, and their ways of asking with models that are known to look and known not to."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_vlms import tiny_vlm

import medr1.evaluation.run
from medr1.data.records import LETTERS, Record
from medr1.errors import MedR1Error
from medr1.evaluation.controls import ALONE
from medr1.evaluation.intervals import interval
from medr1.evaluation.looking import (
    MEASURES,
    WAYS,
    change,
    folder_of,
    kept_reasoning,
    look,
    measure,
    read_looking,
    values,
)
from medr1.evaluation.rows import differing
from medr1.evaluation.run import evaluate

SEEN = "The image shows a cyst."


def row(number: int, letter: str | None, **fields: Any) -> dict[str, Any]:
    """The answer to question `number`, whose right answer is A; two questions a group."""
    return {
        "id": f"q{number}",
        "group": f"g{number // 2}",
        "question": "Which?",
        "options": ["Cyst", "Wart", "Scar"],
        "gold": "A",
        "modality": "CT",
        "question_type": None,
        "chance": 1 / 3,
        "letter": letter,
        "correct": letter == "A",
        "reply": f"<think>{SEEN}</think><answer>{letter}</answer>",
        "model": "m",
        **fields,
    }


def rows(letters: str, **fields: Any) -> list[dict[str, Any]]:
    return [row(number, None if letter == "-" else letter, **fields) for number, letter in enumerate(letters)]


def test_measures_by_hand() -> None:
    silent = "<think>It must be A.</think><answer>A</answer>"
    own = rows("AAABC-")
    own[2]["reply"] = silent
    asked = {"image": own, "shuffled": rows("ABAAC-"), "blank": rows("AAABCA")}
    found = measure(asked)
    # right: 1 1 1 0 0 0 with its own image, 1 0 1 1 0 0 with another, 1 1 1 0 0 1 with a blank one
    assert found["reliance"]["value"] == 0
    assert found["reliance_blank"]["value"] == pytest.approx(-1 / 6)
    assert found["sensitivity"]["value"] == pytest.approx(2 / 6)
    assert found["claims"]["value"] == pytest.approx(5 / 6)
    # the same under both: 0, 2 and 4 (no answer is no answer that stays); of these 2 claims nothing
    assert found["hallucinated"]["value"] == pytest.approx(2 / 6)
    assert found["hallucinated"]["of_claims"] == {
        "value": pytest.approx(2 / 5),
        "ci95": list(interval([1, 0, 0, 1, 0], ["0", "0", "1", "2", "2"]) or ()),
        "n": 5,
    }
    assert found["sensitivity"]["n"] == 6
    groups = ["0", "0", "1", "1", "2", "2"]
    assert found["sensitivity"]["ci95"] == list(interval([0, 1, 0, 1, 0, 0], groups) or ())
    assert found["reliance"]["ci95"] == list(interval([0, 1, 0, -1, 0, 0], groups, (-1, 1)) or ())
    without_blank = measure({"image": own, "shuffled": asked["shuffled"]})
    assert "reliance_blank" not in without_blank
    assert "consistency" not in without_blank


def test_consistency_by_hand() -> None:
    own = rows("AAB-")
    own[1]["reply"] = "<think> </think><answer>A</answer>"  # nothing to follow from
    reader = rows("AABA", model="base")
    reader[0] |= {"options": ["Scar", "Cyst", "Wart"], "letter": "B"}  # the same text, elsewhere
    found = measure({"image": own, "reader": reader, "unread": rows("BBBB")})
    assert found["consistency"]["value"] == pytest.approx(2 / 4)
    assert found["consistency"]["reader"] == "base"
    assert found["unread"]["value"] == pytest.approx(1 / 4)


def test_each_measure_needs_its_ways_of_asking_alone() -> None:
    asked = {way: rows("AB") for _, ways in MEASURES.values() for way in ways}
    assert set(measure(asked)) == set(MEASURES)
    for name, (_, ways) in MEASURES.items():
        assert name in measure({way: asked[way] for way in ways})


def test_questions_that_were_trained_on_and_open_ones_are_no_part() -> None:
    own, other = rows("AAA"), rows("BBB")
    own[0]["seen_by_run"] = "trained on"
    own[1] |= {"token_f1": 1.0, "text": "cyst"}
    other[1] |= {"token_f1": 0.0, "text": "wart"}
    assert values({"image": own, "shuffled": other})["reliance"] == {"q2": 1.0}
    found = measure({"image": own[1:2], "shuffled": other[1:2]})  # of open questions alone
    assert found["reliance"]["value"] == found["sensitivity"]["value"] == 1
    assert measure({"image": [], "shuffled": []})["reliance"] == {"value": None, "ci95": None, "n": 0}


def test_change_is_paired() -> None:
    before = {"image": rows("AAAA"), "shuffled": rows("BBBA")}
    after = {"image": rows("AAAA"), "shuffled": rows("AABA")}
    found = change(before, after)
    assert found["reliance"] == {
        "difference": -0.5,
        "ci95": list(interval([-1, -1, 0, 0], ["0", "0", "1", "1"], (-2, 2)) or ()),
        "n": 4,
        "groups": 2,
        "p": 1.0,
    }
    assert found["sensitivity"]["difference"] == -0.5
    assert set(found) == {"accuracy", "accuracy_other", "reliance", "sensitivity", "claims", "hallucinated"}
    assert found["accuracy_other"]["difference"] == -found["reliance"]["difference"]
    with pytest.raises(MedR1Error, match="no question in common"):
        change(before, {way: [{**one, "id": f"x{one['id']}"} for one in part] for way, part in after.items()})


@pytest.mark.parametrize(
    ("reply", "reasoning"),
    [
        ("<think> A ring. </think><answer>B</answer>", " A ring. "),
        ("A ring.</think><answer>B</answer>", "A ring."),  # a template that opens the tag itself
        ("A ring.<answer>B</answer>", "A ring."),
        ("<think>A ring.<answer>B</answer>", "A ring."),
        ("<answer>B</answer><think>A ring.</think>", "A ring."),
        ("<think>A ring, and", ""),  # cut off: what it would have said is not known
        ("<answer>B</answer>", ""),
        ("It is B, a ring.", ""),
        ("", ""),
    ],
)
def test_the_reasoning_that_is_kept(reply: str, reasoning: str) -> None:
    assert kept_reasoning(reply) == reasoning


FINDINGS = ("Cyst", "Wart", "Scar")


def make_records(folder: Path, count: int = 12) -> list[Record]:
    """Pictures whose upper left pixel says the finding; options in every order."""
    records = []
    for number in range(count):
        picture = Image.new("RGB", (56, 56))
        picture.putpixel((0, 0), (80 * (number % 3 + 1), 0, 0))
        picture.putpixel((1, 0), (0, number, 0))  # no picture is another's copy
        picture.save(path := folder / f"{number}.png")
        options = tuple(FINDINGS[(number // 3 + place) % 3] for place in range(3))
        records.append(
            Record(
                id=f"r{number:02}",
                images=(path,),
                question="Which finding?",
                options=options,
                answer=LETTERS[options.index(FINDINGS[number % 3])],
                modality="CT",
                question_type="Disease Diagnosis",
                source="made",
                group=f"g{number}",
            )
        )
    return records


class Stub:
    """Reasons by the image; answers by its reasoning ("honest"), by the image itself ("direct"), or takes the first
    option whatever it reasoned ("shortcut"). Without an image or a reasoning to go by each takes the first option."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        self.kind, self.calls = kind, 0
        processor = SimpleNamespace(image_processor=SimpleNamespace(to_dict=lambda: {}))
        core = SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))
        weights = torch.nn.Linear(2, 2)
        self.vlm: Any = SimpleNamespace(model=weights, core=core, processor=processor, name=kind, folder=None)
        self.vlm.stub = self
        module = medr1.evaluation.run
        monkeypatch.setattr(module, "encode_prompts", lambda vlm, *given, **more: list(zip(*given, strict=True)))
        monkeypatch.setattr(module, "check_lengths", lambda *given: None)
        monkeypatch.setattr(module, "option_logprobs", lambda vlm, *given, **more: vlm.stub.weigh(*given, **more))
        monkeypatch.setattr(module, "sample", lambda vlm, prompts, **more: vlm.stub.sample(prompts))

    def answer(self, options: list[str], images: list[Any], reasoning: str) -> int:
        seen = images[0].getpixel((0, 0))[0] if images else 0
        read = next((finding for finding in FINDINGS if finding in reasoning), None)
        shown = FINDINGS[seen // 80 - 1] if seen >= 80 else None
        named = {"honest": read, "direct": shown, "shortcut": None}[self.kind]
        return options.index(named) if named else 0

    def sample(self, prompts: list[Any]) -> SimpleNamespace:
        self.calls += 1
        texts = []
        for messages, images in prompts:
            options = re.findall(r"[A-C]\) (\w+)", messages[0]["content"][-1]["text"])
            seen = images[0].getpixel((0, 0))[0]
            told = f"The image shows a {FINDINGS[seen // 80 - 1]}." if seen >= 80 else "I cannot see it."
            answer = LETTERS[self.answer(options, images, told)]
            texts.append(f"<think>{told}</think><answer>{answer}</answer>")
        ones = torch.ones(len(texts), 1)
        return SimpleNamespace(texts=texts, finished_N=ones[:, 0], mask_NT=ones, tokens=[], guesses={})

    def weigh(self, prompts: list[Any], records: list[Record], *, mode: str, reasoning: list[str]) -> list[Any]:
        self.calls += 1
        chosen = [
            self.answer(list(record.options), images, told)
            for record, (_, images), told in zip(records, prompts, reasoning, strict=True)
        ]
        return [torch.tensor([0.8 if place == at else 0.1 for place in range(3)]).log() for at in chosen]


def looked(stub: Stub, reader: Stub | None, records: list[Record], folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {"mode": "think", "max_new_tokens": 9, "donors": records}

    ask = partial(evaluate, stub.vlm, **settings)
    rows = ask(records, out=folder / "answers.jsonl")
    out = folder_of(folder / "answers.jsonl")
    return look(rows, records, ask, out=out, vlm=stub.vlm, reader=reader.vlm if reader else None, donors=records)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("honest", {"reliance": 1, "reliance_kept": 0, "reliance_removed": 0, "hallucinated": 0, "consistency": 1}),
        ("direct", {"reliance": 1, "reliance_kept": 1, "reliance_removed": 1, "hallucinated": 0, "consistency": 1}),
        ("shortcut", {"reliance": 0, "reliance_kept": 0, "hallucinated": 1, "claims": 1, "sensitivity": 0}),
    ],
)
def test_models_that_are_known_to_look_and_known_not_to(
    kind: str, expected: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    records = make_records(tmp_path)
    monkeypatch.setattr("medr1.evaluation.controls.shuffled_partners", other_findings)
    stub, reader = Stub(monkeypatch, kind), Stub(monkeypatch, "honest")
    asked = looked(stub, reader, records, tmp_path)
    assert set(asked) == set(WAYS)
    found = measure(asked)
    if kind != "shortcut":  # a blank image and a reader without reasoning leave the first option: right in a third
        assert found["reliance_blank"]["value"] == found["sensitivity"]["value"] * 2 / 3 == 2 / 3
    # its reasoning leads the reader to what the image shows, which is the first option in a third of the questions
    else:
        assert found["consistency"]["value"] == pytest.approx(1 / 3)
    assert {name: found[name]["value"] for name in expected} == pytest.approx(expected)
    assert found["consistency"]["reader"] == "honest"

    calls = stub.calls + reader.calls
    assert looked(stub, reader, records, tmp_path) == asked, "what was asked is not asked again"
    assert stub.calls + reader.calls == calls
    assert measure(read_looking(tmp_path / "answers.jsonl", asked["image"])) == found


def other_findings(records: Sequence[Record], *given: Any, **more: Any) -> dict[str, Record]:
    """A partner whose picture shows another finding."""
    return {record.id: records[(place + 1) % len(records)] for place, record in enumerate(records)}


def test_what_cannot_be_asked_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    stub = Stub(monkeypatch, "honest")
    lonely = make_records(tmp_path, 1)
    assert set(looked(stub, None, lonely, tmp_path / "a")) == {"image", "blank", "kept", "removed"}
    assert "the shuffled control is left out" in " ".join(capsys.readouterr().err.split())
    textual = [lonely[0].model_copy(update={"images": ()})]
    rows = [{"id": "r00"}]
    assert look(rows, textual, lambda *given: [], out=tmp_path / "b") == {"image": rows}


def test_rows_that_are_not_of_these_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub = Stub(monkeypatch, "honest")
    asked = looked(stub, None, make_records(tmp_path), tmp_path)
    path = tmp_path / "answers.jsonl"
    with pytest.raises(MedR1Error, match=r"shuffled.jsonl: is of other questions; evaluate again with --looking"):
        read_looking(path, asked["image"][1:])
    others = [{**row, "weights": "abc", "model": "other"} for row in asked["image"]]
    with pytest.raises(MedR1Error, match=r"shuffled.jsonl: is of model honest .* and .*answers.jsonl of model other"):
        read_looking(path, others)


def test_an_answer_is_forced_as_options_are_weighed(tmp_path: Path) -> None:
    """With its own reasoning and image, what is kept is what `--score-options` weighs; no token is drawn."""
    vlm, records = tiny_vlm("qwen2_vl"), make_records(tmp_path, 4)
    settings: dict[str, Any] = {"mode": "think", "max_new_tokens": 6}
    replies = evaluate(vlm, records, out=tmp_path / "own.jsonl", scoring="options", **settings)
    thoughts = {row["id"]: kept_reasoning(row["reply"]) for row in replies}
    kept = evaluate(vlm, records, out=tmp_path / "kept.jsonl", reasoning=thoughts, **settings)
    removed = evaluate(vlm, records, out=tmp_path / "r.jsonl", reasoning=dict.fromkeys(thoughts, ""), **settings)
    for row, reply in zip(kept, replies, strict=True):
        assert row["option_probs"] == pytest.approx(reply["option_probs"], rel=1e-4)
        assert row["letter"] == LETTERS[max(range(3), key=row["option_probs"].__getitem__)]
        assert row["tokens"] == 0 and row["key"] != reply["key"]
    assert {row["reasoning"] for row in removed} == {"removed"}
    assert differing(kept[0], replies[0], ("reasoning",)) == "reasoning"
    assert kept == evaluate(vlm, records, out=tmp_path / "kept.jsonl", reasoning=thoughts, **settings)
    thoughts[records[0].id] = "Another thought"
    with pytest.raises(MedR1Error, match="rows of another model, setting or data"):
        evaluate(vlm, records, out=tmp_path / "kept.jsonl", reasoning=thoughts, **settings)
    other = evaluate(vlm, records, out=tmp_path / "other.jsonl", reasoning=thoughts, **settings)
    assert {row["reasoning"] for row in other} == {"kept"}
    assert differing(other[0], removed[0], ("reasoning",)) == "reasoning"
    alone = evaluate(vlm, records, out=tmp_path / "a.jsonl", reasoning=thoughts, condition=ALONE, **settings)
    for row, record in zip(alone, records, strict=True):
        assert row["images"] == [] and sorted(row["options"]) == sorted(record.options)
        assert all(one != two for one, two in zip(row["options"], record.options, strict=True))
    with pytest.raises(MedR1Error, match="mode no-think has no reasoning"):
        evaluate(vlm, records, out=tmp_path / "n.jsonl", reasoning=thoughts, **settings | {"mode": "no-think"})
    with pytest.raises(MedR1Error, match="condition 'reasoning_alone' needs a reasoning"):
        evaluate(vlm, records, out=tmp_path / "n.jsonl", condition=ALONE, **settings)
