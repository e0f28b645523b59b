"""Recipes: TOML and overrides, unknown keys, values out of range, and a round trip."""

from pathlib import Path

import pytest

from medr1.config import Config, load_config, parse_override, to_toml
from medr1.errors import MedR1Error


def test_toml_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('method = "sft"\n[optimizer]\nsteps = 7\nlearning_rate = 1e-5\n')
    config = load_config(path, {"optimizer.steps": 9, "data.modalities": ["CT"]})
    assert (config.method, config.optimizer.steps, config.optimizer.learning_rate) == ("sft", 9, 1e-5)
    assert config.data.modalities == ("CT",)
    assert config.grpo == Config().grpo


def test_one_reward_of_an_override_stands_beside_the_others(tmp_path: Path) -> None:
    assert load_config(overrides={"grpo.rewards.consistency": 0.5}).grpo.rewards == {
        "accuracy": 1.0,
        "format": 0.2,
        "consistency": 0.5,
    }
    path = tmp_path / "recipe.toml"
    path.write_text("[grpo]\nrewards = { accuracy = 2.0 }\n")
    assert load_config(path, {"grpo.rewards.mine.py:f": 1, "grpo.rewards.accuracy": 3}).grpo.rewards == {
        "accuracy": 3.0,
        "mine.py:f": 1.0,
    }
    assert load_config(overrides={"grpo.rewards": {"format": 1.0}}).grpo.rewards == {"format": 1.0}


def test_round_trip_of_every_field(tmp_path: Path) -> None:
    config = load_config(
        overrides={
            "grpo.rewards": {"accuracy": 1.0, "my.module:f": 0.5},
            "data.sources": ['a "b"', "c"],
            "log.trackers": ["x"],
        }
    )
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(config))
    assert load_config(path) == config


def test_every_field_is_explained() -> None:
    lines = to_toml(Config()).splitlines()
    fields = [number for number, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(fields) > 30
    assert all(lines[number - 1].startswith("# ") and len(lines[number - 1]) > 4 for number in fields)


def test_shipped_recipes_are_valid() -> None:
    folder = Path(__file__).parents[1] / "configs"
    recipes = [path for path in folder.glob("*.toml") if not path.name.startswith("study-")]
    assert recipes
    for recipe in recipes:
        load_config(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[optimizer]\nlerning_rate = 1",
            r"unknown key optimizer\.lerning_rate; did you mean optimizer\.learning_rate",
        ),
        ("[optimiser]\nsteps = 3", r"unknown key optimiser\.steps; did you mean optimizer\.steps\?"),
        ("[optim]\nlerning_rate = 1e-5", r"did you mean optimizer\.learning_rate\?"),
        ("steps = 3", r"unknown key steps; did you mean optimizer\.steps\?"),
        ("[model]\nlearning_rate = 1e-5", r"did you mean optimizer\.learning_rate\?"),
        ("[data]\nmodality = 'CT'", r"did you mean data\.modalities\?"),
        ("[grpo]\nG = 4", r"unknown key grpo\.G; known: grpo\.rewards, "),
        ('[rollout]\nmode = "no_think"', r"did you mean no-think\?"),
        (
            "[optimizer]\nsteps = -1\nsed = 3\n[rollout]\nmode = 'loud'",
            r"\(1\) rollout\.mode = 'loud': .* \(2\) optimizer\.steps = -1: .* \(3\) unknown key optimizer\.sed;",
        ),
        ("[optimizer]\nsteps = -1", r"optimizer\.steps = -1"),
        ('[rollout]\nmode = "loud"', r"rollout\.mode = 'loud'"),
        ("steps = = 1", "not TOML"),
    ],
)
def test_mistakes_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(MedR1Error, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file() -> None:
    with pytest.raises(MedR1Error, match=r"nowhere\.toml: no such file"):
        load_config(Path("nowhere.toml"))


def test_override_values_are_toml_or_text() -> None:
    assert parse_override("a.b=3") == ("a.b", 3)
    assert parse_override("a.b = [1, 2]") == ("a.b", [1, 2])
    assert parse_override("a.b=Qwen/Qwen2-VL-2B") == ("a.b", "Qwen/Qwen2-VL-2B")
    with pytest.raises(MedR1Error, match="KEY=VALUE"):
        parse_override("a.b")
