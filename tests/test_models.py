"""Loading, and prompts as tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlms import FAMILIES, conversation, picture, plain_logprobs, ragged_images, ragged_prompts, tiny_vlm
from transformers import (
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from medr1.config import Config, to_toml
from medr1.errors import MedR1Error
from medr1.policy import names
from medr1.policy import vlm as models
from medr1.policy.adapters import add_lora, freeze_vision
from medr1.policy.encoding import encode_prompts
from medr1.policy.rollouts import sample
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM, computes_in_bfloat16, load_vlm
from medr1.training.plan import count


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    vlm = tiny_vlm("qwen2_vl")
    vlm.core.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_folder_loads_as_the_same_model(saved: Path) -> None:
    original, loaded = tiny_vlm("qwen2_vl"), load_vlm(str(saved), device="cpu")
    assert loaded.core.dtype == torch.float32
    prompts = ragged_prompts(original)
    again = ragged_prompts(loaded)
    assert torch.equal(prompts.input_ids_BP, again.input_ids_BP)
    ids, mask = torch.full((3, 2), 65), torch.ones(3, 2)
    expected, _ = completion_logprobs(original, prompts, ids, mask)
    torch.testing.assert_close(completion_logprobs(loaded, again, ids, mask)[0], expected)
    assert load_vlm(str(saved), dtype="bfloat16", device="cpu").core.dtype == torch.bfloat16


def test_tiny_is_the_packaged_folder(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(names, "TINY", saved)
    assert load_vlm("tiny").name == "tiny"
    monkeypatch.setattr(names, "TINY", tmp_path / "absent")
    with pytest.raises(MedR1Error, match="reinstall medr1"):
        load_vlm("tiny")


def test_an_adapter_folder_loads_its_base(saved: Path, tmp_path: Path) -> None:
    vlm = add_lora(load_vlm(str(saved), device="cpu"), rank=4, alpha=8)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    vlm.model.save_pretrained(tmp_path / "adapter")
    loaded = load_vlm(str(tmp_path / "adapter"), device="cpu")
    prompts = ragged_prompts(vlm)
    ids, mask = torch.full((3, 2), 65), torch.ones(3, 2)
    expected, _ = completion_logprobs(vlm, prompts, ids, mask)
    torch.testing.assert_close(completion_logprobs(loaded, prompts, ids, mask)[0], expected)
    # A second adapter on top starts from the first, and loads as the chain of both.
    second = add_lora(loaded, rank=2, alpha=2)
    torch.testing.assert_close(completion_logprobs(second, prompts, ids, mask)[0], expected, atol=1e-5, rtol=0)
    second.model.save_pretrained(tmp_path / "second")
    chain = load_vlm(str(tmp_path / "second"), device="cpu")
    torch.testing.assert_close(completion_logprobs(chain, prompts, ids, mask)[0], expected, atol=1e-5, rtol=0)


def test_an_adapter_names_the_folder_its_base_came_from(saved: Path, tmp_path: Path) -> None:
    """And no run's folder, which stands for other weights once the run has more steps."""
    (tmp_path / "recipe.toml").write_text(to_toml(Config()))
    assert saved.parent == tmp_path
    vlm = add_lora(load_vlm(str(tmp_path), device="cpu"), rank=1, alpha=1)
    assert vlm.model.peft_config["default"].base_model_name_or_path == str(saved.resolve())
    assert add_lora(load_vlm("tiny"), rank=1, alpha=1).model.peft_config["default"].base_model_name_or_path == "tiny"


def changed(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_adapter_whose_weights_do_not_fit_its_base_is_refused(saved: Path, tmp_path: Path) -> None:
    """PEFT warns and goes on with the base alone: Qwen2-VL's layers had other names before transformers 4.52."""
    folder = tmp_path / "adapter"
    add_lora(load_vlm(str(saved), device="cpu"), rank=2, alpha=4).model.save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    head = {f"base_model.model.lm_head.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    for found, message in (
        ({name.replace(".language_model", ""): weight for name, weight in weights.items()}, "56 weights"),
        ({name: weight for name, weight in weights.items() if "layers.0" in name}, "14 weights .*layers.1.mlp"),
        (weights | head, "2 weights .*, such as base_model.model.lm_head.lora_A.weight"),
    ):
        save_file(found, folder / "adapter_model.safetensors")
        with pytest.raises(MedR1Error, match=message) as caught:
            load_vlm(str(folder), device="cpu")
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_the_base_of_an_adapter(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the revision that it was trained on; one that is not there any more is told by the adapter's file."""
    folder = tmp_path / "adapter"
    add_lora(load_vlm(str(saved), device="cpu"), rank=2, alpha=4).model.save_pretrained(folder)
    asked = []

    def on_hub(name: str, weights: bool) -> names.Place:
        asked.append(name)
        return names.Place(saved, saved)

    monkeypatch.setattr(names, "_on_hub", on_hub)
    for base, revision in (("acme/base", "v1"), ("acme/base", None), ("acme/base@v2", "v1"), (str(saved), "v1")):
        changed(folder / "adapter_config.json", base_model_name_or_path=base, revision=revision)
        load_vlm(str(folder), device="cpu")
    assert asked == ["acme/base@v1", "acme/base", "acme/base@v2"]
    changed(folder / "adapter_config.json", base_model_name_or_path="/data/moved")
    with pytest.raises(MedR1Error, match=r"adapter_config.json: base_model_name_or_path is /data/moved: no such"):
        load_vlm(str(folder), device="cpu")


def test_a_chat_template_that_lies_in_the_tokenizer_alone(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As other programs leave it: without it prompts would silently be an image mark and the text."""
    before = ragged_prompts(load_vlm(str(saved), device="cpu"))
    template = (saved / "chat_template.jinja").read_text()
    (saved / "chat_template.jinja").unlink()
    changed(saved / "tokenizer_config.json", chat_template=template)
    assert torch.equal(ragged_prompts(load_vlm(str(saved), device="cpu")).input_ids_BP, before.input_ids_BP)
    assert "no chat template" not in capsys.readouterr().err
    changed(saved / "tokenizer_config.json", chat_template=None)
    load_vlm(str(saved), device="cpu")
    assert "holds no chat template; a prompt is its image marks and texts alone" in capsys.readouterr().err


def test_auto_is_bfloat16_where_a_gpu_has_it_and_not_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not computes_in_bfloat16("auto", "cuda") and computes_in_bfloat16("bfloat16", "cuda")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    assert computes_in_bfloat16("auto", "cuda") and not computes_in_bfloat16("float32", "cuda")


def test_lora_trains_the_text_model_only() -> None:
    for family, text_model in (("qwen3_vl", "language_model"), ("idefics3", "text_model")):
        vlm = add_lora(tiny_vlm(family), rank=2, alpha=4)
        trained = [name for name, parameter in vlm.model.named_parameters() if parameter.requires_grad]
        assert len(trained) == 2 * 2 * 7, "two layers, A and B, seven linear layers each"
        assert all(text_model in name and "lora_" in name for name in trained)


def test_freeze_vision() -> None:
    for family, tower in (("qwen2_vl", {"visual"}), ("idefics3", {"vision_model", "connector"})):
        vlm = tiny_vlm(family)
        freeze_vision(vlm)
        modules = {name.split(".")[1]: set() for name, _ in vlm.model.named_parameters() if name.startswith("model.")}
        for name, parameter in vlm.model.named_parameters():
            if name.startswith("model."):
                modules[name.split(".")[1]].add(parameter.requires_grad)
        assert {name for name, trained in modules.items() if trained == {False}} == tower


def test_errors_are_one_line_with_a_remedy(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    torn = tmp_path / "torn"
    saved.rename(torn)
    file = torn / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    half = tmp_path / "half"
    vlm = tiny_vlm("qwen2_vl")
    weights = {name: tensor for name, tensor in vlm.core.state_dict().items() if "layers.1.mlp" not in name}
    vlm.core.save_pretrained(half, state_dict=weights)
    vlm.processor.save_pretrained(half)
    tokens_only = tmp_path / "text"
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=300, num_key_value_heads=1, **text)).save_pretrained(tokens_only)
    tiny_vlm("qwen2_vl").tokenizer.save_pretrained(tokens_only)
    cases = {
        str(tmp_path / "empty"): "holds no config.json",
        str(tmp_path / "absent"): "no such folder",
        str(broken): "not a readable vision-language model",
        str(torn): "not a readable vision-language model",
        str(half): "3 weights are missing, such as model.language_model.layers.1.mlp.down_proj.weight",
        str(tokens_only): "vision-language model",
        "nobody/no-such-model": "On a machine without network",
    }
    for name, message in cases.items():
        with pytest.raises(MedR1Error, match=message) as caught:
            load_vlm(name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(MedR1Error, match="choose auto, float32"):
        load_vlm(str(torn), dtype="int3")


def test_no_pickle_is_loaded_and_no_code_of_a_repository_is_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the user asked whether to; whoever said yes by habit would have run it."""

    def asked(*_: object) -> str:
        return "y"

    monkeypatch.setattr("builtins.input", asked)
    (saved / "ran.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((saved / "config.json").read_text())
    code = {"AutoConfig": "ran.Config", "AutoModelForImageTextToText": "ran.Model", "AutoProcessor": "ran.Processor"}
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "unheard of", "auto_map": code}))
    with pytest.raises(MedR1Error, match="custom code"):
        load_vlm(str(saved))
    with pytest.raises(MedR1Error, match="custom code"):
        count(str(saved))
    assert not (tmp_path / "ran").exists()
    (saved / "config.json").write_text(json.dumps(config))
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    with pytest.raises(MedR1Error, match="safetensors"):
        load_vlm(str(saved))
    adapter = tmp_path / "adapter"
    add_lora(tiny_vlm("qwen2_vl"), rank=2, alpha=4).model.save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "tiny"}))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(MedR1Error, match=r"holds no adapter_model\.safetensors; save the adapter as safetensors"):
        load_vlm(str(adapter))


def test_a_package_that_a_family_needs_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ImportError("Install num2words.\nIt is small.")

    monkeypatch.setattr(models.AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(MedR1Error, match=r"needs a package that is not installed \(Install num2words.\)$"):
        load_vlm(str(saved))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_left_padded_and_select_keeps_their_images(family: str) -> None:
    vlm = tiny_vlm(family)
    prompts = ragged_prompts(vlm)
    assert prompts.image_counts == [1, 2, 0] and len(prompts) == 3
    assert prompts.attention_mask_BP[:, -1].all() and not prompts.attention_mask_BP.all()
    chosen = prompts.select([2, 1])
    assert chosen.image_counts == [0, 2]
    alone = encode_prompts(vlm, [conversation("Which of the two shows a lesion?", 2)], [ragged_images()[1]])
    assert chosen.vision.keys() == alone.vision.keys()
    for name, tensor in alone.vision.items():
        assert torch.equal(chosen.vision[name], tensor)
    text = prompts.select([2])
    assert text.vision == {} and text.attention_mask_BP.all()
    assert text.next_position_B.tolist() == [text.input_ids_BP.shape[1]]
    with_images = prompts.select([1])
    assert torch.equal(with_images.input_ids_BP, alone.input_ids_BP)
    if family == "idefics3":
        assert with_images.position_ids_ABP.tolist() == [[list(range(alone.input_ids_BP.shape[1]))]]
        return
    types = (with_images.input_ids_BP == vlm.core.config.image_token_id).int()
    positions, delta = vlm.core.base_model.get_rope_index(
        with_images.input_ids_BP, types, image_grid_thw=with_images.vision["image_grid_thw"]
    )
    assert torch.equal(with_images.position_ids_ABP, positions)
    assert with_images.next_position_B.tolist() == (with_images.input_ids_BP.shape[1] + delta[:, 0]).tolist()


def test_real_vocabulary_and_chat_format(shared: Path) -> None:
    """Qwen's own tokenizer (151,936 rows) and template: ids of the special tokens, texts, and exact log-probs."""
    folder = shared / "data" / "qwen2vl_files"
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=pixels),
        AutoTokenizer.from_pretrained(folder),
        Qwen2VLVideoProcessor(size=pixels),
        chat_template=json.loads((folder / "chat_template.json").read_text())["chat_template"],
    )
    config = tiny_vlm("qwen2_vl").core.config
    config.text_config.vocab_size = 151936
    config.text_config.eos_token_id, config.text_config.pad_token_id = 151645, 151643
    config.image_token_id, config.video_token_id = 151655, 151656
    config.vision_start_token_id, config.vision_end_token_id = 151652, 151653
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = [151645, 151643]
    vlm = VLM(model, processor, "real vocabulary")
    assert vlm.banned_token_ids == [151652, 151653, 151654, 151655, 151656]
    assert vlm.stop_token_ids == [151643, 151645]
    assert vlm.pad_token_id == 151643
    prompts = encode_prompts(vlm, [conversation("Which finding?", 1), conversation("Why?", 0)], [[picture(1)], []])
    text = vlm.tokenizer.decode(prompts.input_ids_BP[0])
    assert text.endswith("<|vision_end|>Which finding?<|im_end|>\n<|im_start|>assistant\n")
    rollout = sample(vlm, prompts, num_completions=2, max_new_tokens=5, seed=0)
    logp, _ = completion_logprobs(vlm, prompts, rollout.completion_ids_NT, rollout.mask_NT)
    torch.testing.assert_close(logp.detach(), rollout.logp_NT, atol=1e-5, rtol=0)
    expected = plain_logprobs(vlm, prompts, rollout.completion_ids_NT, rollout.mask_NT)
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
