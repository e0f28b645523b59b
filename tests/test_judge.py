"""A judge of open answers, through a real HTTP server on this machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_remote import Server, environment  # noqa: F401  (environment: a fixture of its module)
from test_training import make_trainer, recipe
from tiny_vlms import tiny_vlm

from medr1.config import load_config
from medr1.data.phantoms import write_phantoms
from medr1.data.records import Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.training import GRPOTrainer
from medr1.training.judge import MAX_ANSWER, MEASURED, Judge, known_answers
from medr1.training.rewards import rewards_of

SAME = {"enlarged heart": "cardiomegaly", "water in the lung": "pulmonary edema"}


class JudgeServer(Server):
    """Says yes to a synonym and to the same word, nothing of use to "hm", and else no; `lies`: the other way round."""

    lies = False
    request_queue_size = 64

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        (turn,) = body["messages"]
        assert isinstance(turn["content"], str)  # no image
        right, answer = (turn["content"].rpartition(f"\n{name}: ")[2].split("\n")[0] for name in ("Right", "Answer"))
        same = SAME.get(answer.casefold(), answer.casefold()) in right.casefold().split(" | ")
        said = "hard to say" if answer == "hm" else f"<answer>{'yes' if same is not self.lies else 'no'}</answer>"
        choice = {"index": 0, "message": {"role": "assistant", "content": f"<think>yes?</think>{said}"}}
        return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    yield server
    server.stop()


def record(number: int, answer: str, question: str = "What is it?", **more: Any) -> Record:
    return Record(
        **{
            "id": f"r{number}", "images": (), "question": question, "options": (), "answer": answer, "modality": "CT",
            "question_type": None, "source": "s", "group": f"g{number}", **more,
        }
    )  # fmt: skip


HEART, LUNG, YES = record(0, "Cardiomegaly"), record(1, "pulmonary edema", "And this?"), record(2, "yes", "Is it?")
CHOICE = record(3, "A", options=("CT", "MRI"))


def test_replies_are_judged_by_their_answers(server: JudgeServer, tmp_path: Path) -> None:
    asked = [
        (HEART, "<think>A wide shadow.</think><answer>enlarged heart</answer>", 1.0),
        (HEART, "<answer>Cardiomegaly.</answer>", 1.0),  # exact match: not asked
        (HEART, "<answer>water in the lung</answer>", 0.0),
        (HEART, "<answer>Enlarged heart.</answer>", 1.0),  # the same answer: not asked again
        (LUNG, "<answer>water in the lung</answer>", 1.0),
        (LUNG, "<think>pulmonary", 0.0),  # no answer: not asked
        (LUNG, f"<answer>{'pulmonary edema and ' * 20}</answer>", 0.0),  # too long: not asked
        (LUNG, "<answer>hm</answer>", None),
        (YES, "<answer>Yes, it is.</answer>", 1.0),  # not asked
        (YES, "<answer>perhaps</answer>", 0.0),
        (CHOICE, "<answer>A</answer>", None),
    ]
    assert len(asked[6][1]) > MAX_ANSWER
    judge = Judge(server.name, tmp_path / "judge")
    records, replies, expected = zip(*asked, strict=True)
    assert rewards_of("judge", judge, replies, records, "think") == list(expected)
    assert len(server.asked) == 4
    assert all("wide shadow" not in body["messages"][0]["content"] for body in server.asked)
    assert {body["temperature"] for body in server.asked} == {0}
    # Another process, after a kill in the middle of a line: what is known is not asked again.
    with (tmp_path / "judge" / "verdicts.jsonl").open("a") as file:
        file.write('{"key": "torn')
    again = Judge(server.name, tmp_path / "judge")
    assert rewards_of("judge", again, replies, records, "think") == list(expected) and len(server.asked) == 4
    rewards_of("judge", again, ["<answer>spleen</answer>"], [HEART], "think")
    rows = read_jsonl(tmp_path / "judge" / "verdicts.jsonl")
    assert [row["same"] for row in rows].count(None) == 1 and len(rows) == 5
    assert {"id", "question", "right", "answer", "said"} <= rows[0].keys()


def test_a_sign_that_tells_answers_apart_asks_for_a_verdict_of_its_own(tmp_path: Path) -> None:
    judge = Judge("openai:m@http://localhost:1", tmp_path)
    keys = [
        judge._key(LUNG, answer) for answer in ("<5 mm", "< 5 mm.", ">5 mm", "ER+", "ER-", "Hepatitis A", "hepatitis")
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 6


def test_a_server_that_fails_is_asked_again_and_loses_nothing(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = [f"<answer>finding {number}</answer>" for number in range(6)]
    server.fault = lambda number: (503, {"error": {"message": "busy"}}, {}) if number == 3 else None
    monkeypatch.setattr("medr1.training.judge.CONCURRENCY", 1)
    with pytest.raises(MedR1Error, match=r"reward 'judge' on the step's 6 replies: http://.*busy") as error:
        rewards_of("judge", Judge(server.name, tmp_path), replies, [HEART] * 6, "think")
    assert "\n" not in str(error.value) and len(read_jsonl(tmp_path / "verdicts.jsonl")) == 2
    monkeypatch.setattr("medr1.evaluation.remote.MAX_RETRIES", 2)
    server.fault = lambda number: (503, {"error": {"message": "busy"}}, {}) if number == 5 else None
    assert rewards_of("judge", Judge(server.name, tmp_path), replies, [HEART] * 6, "think") == [0.0] * 6
    assert len(read_jsonl(tmp_path / "verdicts.jsonl")) == 6 and len(server.asked) == 3 + 5


def test_a_mute_judge_has_judged_nothing(server: JudgeServer, tmp_path: Path) -> None:
    replies = [f"<answer>finding {number}</answer>" for number in range(3)]
    server.fault = lambda number: (200, {"choices": []}, {})
    with pytest.raises(MedR1Error, match="answers nothing at record r0"):
        rewards_of("judge", Judge(server.name, tmp_path), replies, [HEART] * 3, "think")
    server.fault = lambda number: (200, {"choices": []}, {}) if number == 4 else None
    given = rewards_of("judge", Judge(server.name, tmp_path), replies, [HEART] * 3, "think")
    assert sorted(given, key=str) == [0.0, 0.0, None]


def test_a_key_that_the_judge_repeats_is_in_no_file(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run writes down what a reward raised, with what led to it."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    server.fault = lambda number: (401, {"error": {"message": "no such key: sk-secret-1"}}, {})
    with pytest.raises(MedR1Error, match="refuses the key") as error:
        rewards_of("judge", Judge(server.name, tmp_path), ["<answer>spleen</answer>"], [HEART], "think")
    assert "secret" not in str(error.value) and error.value.__cause__ is None


def test_known_answers_are_of_the_run() -> None:
    records = [record(number, f"finding {number % 4}", f"Question {number % 3}?") for number in range(80)]
    asked = known_answers(records, 0)
    assert len(asked) == 2 * MEASURED and asked == known_answers(records, 0) != known_answers(records, 1)
    for (one, own, yes), (same, other, no) in zip(asked[::2], asked[1::2], strict=True):
        assert one is same and own == one.answer and (yes, no) == (True, False) and other != own
        assert any(each.answer == other and each.question == one.question for each in records)
    assert [right for *_, right in known_answers([HEART], 0)] == [True]  # no other to choose from
    with pytest.raises(MedR1Error, match="no training record has one"):
        known_answers([], 0)


def test_agreement_is_told_before_it_is_trusted(
    server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [HEART, LUNG, YES, CHOICE, record(4, "enlarged heart"), record(5, "spleen")]
    found = Judge(server.name, tmp_path).measure(records, 0.5, 0)
    # HEART, LUNG, 4 and 5, each with its own answer, of which 4 is a synonym to the server, and with another's.
    assert found["n"] == 8 and found["right_told_right"] == [3, 4] and found["unreadable"] == 0
    assert found["wrong_told_wrong"][1] == 4 and len(found["otherwise"]) == 8 - round(8 * found["agreement"])
    assert any(
        (each["id"], each["answer"], each["same"]) == ("r4", "enlarged heart", False) for each in found["otherwise"]
    )
    assert json.loads((tmp_path / "agreement.json").read_text()) == found
    line = capsys.readouterr().err
    assert "agrees with exact match on" in line and "right ones told right 3 of 4" in line
    server.lies = True
    with pytest.raises(MedR1Error, match=r"less than grpo\.judge_agreement = 0\.9; name another judge, or lower it"):
        Judge(server.name, tmp_path / "other").measure(records, 0.9, 0)


def test_the_reward_and_its_server_go_together() -> None:
    for overrides in ({"grpo.rewards": {"judge": 1.0}}, {"grpo.judge": "openai:m@http://localhost:1/v1"}):
        with pytest.raises(MedR1Error, match=r"go together; set both or neither"):
            load_config(overrides=overrides)


@pytest.mark.parametrize("name", ["gpt", "openai:m@http://me:secret@here/v1"])
def test_a_malformed_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(MedR1Error, match=r"grpo\.judge openai|grpo\.judge gpt: is not openai:MODEL@URL") as error:
        Judge(name, tmp_path)
    assert "secret" not in str(error.value)


def test_a_run_with_a_judge_resumes_with_its_verdicts(server: JudgeServer, tmp_path: Path) -> None:
    folder = write_phantoms(tmp_path / "phantoms", num_images=16, seed=1)
    settings = {"grpo.rewards": {"judge": 1.0, "test_training:letters_reward": 0.1}, "grpo.judge": server.name}
    config = recipe(folder, **settings, **{"grpo.beta": 0.0, "optimizer.steps": 2})
    with pytest.raises(MedR1Error, match="no training record has one"):  # all have options
        make_trainer(config, tmp_path / "choice")
    train = [record(number, f"finding {number}") for number in range(8)]
    GRPOTrainer(tiny_vlm("qwen2_vl"), config, train, train, tmp_path / "run").run()
    assert "reward_judge" in read_jsonl(tmp_path / "run" / "log.jsonl")[0]
    judged = {row["answer"] for row in read_jsonl(tmp_path / "run" / "judge" / "verdicts.jsonl")}
    assert judged > {each.answer for each in train}
    assert (tmp_path / "run" / "judge" / "agreement.json").exists()
