"""What `medr1 eval` asks, and whose images its controls show."""

from pathlib import Path
from typing import Any

import pytest

import medr1.evaluation.named as module
from medr1.config import load_config
from medr1.data.parts import load_parts
from medr1.data.records import Record
from medr1.evaluation.named import evaluate_named


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The records and settings of the last evaluation, none of which is run."""
    seen: dict[str, Any] = {}

    def evaluate(vlm: None, records: list[Record], **settings: Any) -> list[dict[str, Any]]:
        seen.update(settings, records=records)
        return []

    monkeypatch.setattr(module, "evaluate", evaluate)
    monkeypatch.setattr(module, "load_vlm", lambda *_, **__: None)
    return seen


@pytest.mark.parametrize(("condition", "modalities"), [("shuffled", ()), ("shuffled_other", ("CT",))])
def test_donors_are_of_the_whole_part(condition: str, modalities: tuple, asked: dict[str, Any], tmp_path: Path):
    """They were drawn from the few that --limit left, or the one modality that was asked about: often none."""
    data = {"data.path": "phantoms", "data.num_phantoms": 80, "data.modalities": modalities}
    config = load_config(overrides=data)
    evaluate_named("tiny", config, tmp_path / "rows.jsonl", condition=condition, limit=3)
    whole = load_parts(load_config(overrides=data | {"data.modalities": ()}).data)[1]
    assert len(asked["records"]) == 3
    assert [record.id for record in asked["donors"]] == [record.id for record in whole]
    if modalities:
        assert {record.modality for record in asked["records"]} == {"CT"} < {r.modality for r in asked["donors"]}
    evaluate_named("tiny", config, tmp_path / "rows.jsonl", condition="blank", limit=3)
    assert asked["donors"] is None
