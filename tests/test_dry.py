"""The dry step: it takes what a run takes, changes nothing, and tells in one line what would fit."""

import gc
import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from test_training import LETTERS, recipe
from tiny_vlms import tiny_vlm
from typer.testing import CliRunner

from medr1.cli import app
from medr1.config import Config
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.data.records import Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.run import weights_fingerprint
from medr1.training import GRPOTrainer, SFTTrainer, dry
from medr1.training.base import RecordTrainer
from medr1.training.run import train


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_images=24, seed=1)


def make_trainer(config: Config, out: Path) -> RecordTrainer:
    kind = GRPOTrainer if config.method == "grpo" else SFTTrainer
    vlm = tiny_vlm("qwen2_vl")
    for layer in vlm.core.model.language_model.layers:
        layer.self_attn.config.attention_dropout = layer.self_attn.attention_dropout = 0.1  # draws in training
    return kind(vlm, config, *load_parts(config.data), out)


@pytest.mark.parametrize(
    "overrides",
    [
        LETTERS | {"grpo.beta": 0.1},
        LETTERS | {"grpo.beta": 0.0, "model.lora_rank": 2, "grpo.num_iterations": 2},
        LETTERS | {"model.train_vision": False, "optimizer.name": "adamw_8bit"},
        {"method": "sft", "rollout.mode": "no-think"},
    ],
    ids=["grpo", "lora", "frozen-8-bit", "sft"],
)
def test_it_changes_nothing(overrides: dict[str, object], phantoms: Path, tmp_path: Path) -> None:
    found = []
    for name in ("with", "without"):
        trainer = make_trainer(recipe(phantoms, **overrides), tmp_path / name)
        asked: list[list[Record]] = []
        learn = trainer.rehearse
        trainer.rehearse = lambda model, records, learn=learn, asked=asked: (
            asked.append(records),
            learn(model, records),
        )  # type: ignore[method-assign]
        trainer.run(dry_step=name == "with")
        lines = [
            {key: value for key, value in row.items() if "second" not in key and "runtime" not in key}
            for row in read_jsonl(tmp_path / name / "log.jsonl")
        ]
        found.append((weights_fingerprint(trainer.vlm.model), lines))
        assert len(asked) == (name == "with")
        if asked:  # the longest two, of all
            lengths = trainer.encode(trainer.train_records).attention_mask_BP.sum(1).tolist()
            chosen = trainer.encode(asked[0]).attention_mask_BP.sum(1).tolist()
            assert sorted(chosen) == sorted(lengths)[-2:]
    assert found[0] == found[1]


def test_a_training_leaves_nothing_behind(phantoms: Path, tmp_path: Path) -> None:
    """Its model and optimizer would stay on the GPU beside the model that is loaded next."""
    gc.disable()  # or chance would free them
    try:
        train(recipe(phantoms, **{"model.name": "tiny", "optimizer.steps": 1}), tmp_path / "run")
        assert not [found for found in gc.get_objects() if issubclass(type(found), RecordTrainer)]
    finally:
        gc.enable()


def test_completions_are_of_full_length_and_every_group_learns(phantoms: Path, tmp_path: Path) -> None:
    trainer = make_trainer(recipe(phantoms, **LETTERS, **{"rollout.max_new_tokens": 7}), tmp_path / "run")
    assert isinstance(trainer, GRPOTrainer)
    seen = []
    update = trainer._update
    trainer._update = lambda model, experience: (seen.append(experience), update(model, experience))[1]  # type: ignore[method-assign]
    told = trainer.dry_run()
    assert [experience.rollout.mask_NT.shape for experience in seen] == [(6, 7)]
    assert bool(seen[0].rollout.mask_NT.all()) and bool((seen[0].advantages_BG.abs().sum(1) > 0).all())
    for of_group in seen[0].rollout.completion_ids_NT.view(2, 3, 7):  # else they were computed as one
        assert len(set(of_group[:, 0].tolist())) == 3
    assert not set(seen[0].rollout.completion_ids_NT.flatten().tolist()) & set(trainer.vlm.banned_token_ids)
    assert 0 < told["peak_gb"] < told["memory_gb"] and told["prompts"] == 2
    assert not (tmp_path / "run" / "log.jsonl").exists()
    assert not trainer._bare_optimizer.state
    assert all(parameter.grad is None for parameter in trainer.vlm.model.parameters())


def test_what_does_not_fit_is_one_line_with_settings_that_do(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(recipe(phantoms, **LETTERS), tmp_path / "run")
    before = weights_fingerprint(trainer.vlm.model)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(trainer, "rehearse", full)
    with pytest.raises(
        MedR1Error, match=r"a step does not fit into .* GB \(longest prompt: record .* tokens\)"
    ) as error:
        trainer.run(dry_step=True)
    line = str(error.value)
    assert (
        "\n" not in line and "--set optimizer.gradient_checkpointing=true" in line and "--set model.lora_rank=" in line
    )
    assert weights_fingerprint(trainer.vlm.model) == before
    monkeypatch.setattr(trainer, "rehearse", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.run(dry_step=True)
    # A container with less memory than the process takes.
    monkeypatch.undo()
    limit = tmp_path / "memory.max"
    limit.write_text("1000000\n")
    monkeypatch.setattr(dry, "CGROUP", limit)
    with pytest.raises(MedR1Error, match=r"a step does not fit into 0\.0 GB .*: add --set"):
        make_trainer(recipe(phantoms, **LETTERS), tmp_path / "again").dry_run()


def test_a_picture_too_large_to_open_is_one_line(tmp_path: Path) -> None:
    """20,000 x 20,000 pixels by its header, of which Pillow opens none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    path = tmp_path / "huge.png"
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(MedR1Error, match=r"huge\.png") as error:
        dry._pixels(path)
    assert "\n" not in str(error.value)


def test_of_the_command(phantoms: Path, tmp_path: Path) -> None:
    said = ["train", "--model", "tiny", "--data", str(phantoms), "--mode", "no-think", "--steps", "1", "--json"]
    said += ["--set", "optimizer.prompts_per_step=2", "--set", "rollout.max_new_tokens=8"]
    alone = CliRunner().invoke(app, [*said, "--dry-run", "--out", str(tmp_path / "run")])
    assert alone.exit_code == 0, alone.output
    assert json.loads(alone.stdout.splitlines()[-1])["peak_gb"] > 0
    assert not (tmp_path / "run").exists()
    trained = CliRunner().invoke(app, [*said, "--out", str(tmp_path / "run")])
    assert trained.exit_code == 0 and "dry step: " in trained.stderr
    again = CliRunner().invoke(app, said)
    assert again.exit_code == 1 and "--out is missing" in str(again.exception)
