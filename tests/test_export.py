"""An exported folder against the model that it came from; the upload against a hub of our own on this machine."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, get_peft_model
from test_evaluation import make_records
from tiny_vlms import ragged_prompts, tiny_vlm, token_kinds
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from medr1 import NOTICE
from medr1.bases.export import export_model, push_to_hub
from medr1.cli import app
from medr1.config import load_config
from medr1.data.parts import tell_older
from medr1.data.records import read_jsonl, write_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.run import evaluate
from medr1.policy.adapters import add_lora
from medr1.policy.vlm import VLM, load_vlm
from medr1.training.base import write_recipe


def save(vlm: VLM, folder: Path) -> Path:
    vlm.model.save_pretrained(folder)  # type: ignore[operator]
    vlm.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with an adapter of size."""
    folder = tmp_path_factory.mktemp("run")
    vlm = add_lora(load_vlm(str(save(tiny_vlm("qwen2_vl"), folder / "base")), device="cpu"), rank=4, alpha=8)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    save(vlm, folder / "model")
    write_recipe(load_config(overrides={"model.lora_rank": 4, "model.name": str(folder / "base")}), folder)
    return folder


def logits(vlm: VLM, model: Any) -> torch.Tensor:
    prompts = ragged_prompts(vlm)
    with torch.no_grad():
        return model(
            input_ids=prompts.input_ids_BP,
            attention_mask=prompts.attention_mask_BP,
            **token_kinds(vlm, prompts.input_ids_BP),
            **prompts.vision,
        ).logits[:, -8:]


def test_a_merged_adapter_is_the_same_model_for_transformers_alone(adapter: Path, tmp_path: Path) -> None:
    trained = load_vlm(str(adapter / "model"), device="cpu")
    assert not torch.allclose(logits(trained, trained.model), logits(trained, load_vlm(str(adapter / "base")).model))
    result = export_model(str(adapter), tmp_path / "out")
    plain, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    assert plain.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(trained, plain), logits(trained, trained.model), atol=1e-5, rtol=0)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.chat_template == trained.processor.chat_template
    assert plain.generation_config.eos_token_id == trained.core.generation_config.eos_token_id
    assert result["merged"] and result["base"] == "base"
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    for file in ("README.md", "medr1.json", "recipe.toml", "config.json"):
        assert str(adapter) not in (tmp_path / "out" / file).read_text(), (
            "folders of this machine are nobody's business"
        )
    assert load_config(tmp_path / "out" / "recipe.toml").model.lora_rank == 4
    # Again, in half precision: the float32 result rounded once, in the place of the former one.
    export_model(str(adapter), tmp_path / "out", dtype="bfloat16")
    rounded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert rounded.dtype == torch.bfloat16
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight.bfloat16(), rounded.state_dict()[name]), name


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_an_adapter_on_weights_that_head_and_embeddings_share(layer: str, tmp_path: Path) -> None:
    """As other programs train them: merged in place it would be added to both."""
    vlm = load_vlm(str(save(tiny_vlm("qwen2_vl"), tmp_path / "base")), device="cpu")
    vlm.model = get_peft_model(vlm.core, LoraConfig(target_modules=["q_proj", layer], init_lora_weights=False))
    vlm.core.name_or_path = vlm.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    expected = logits(vlm, vlm.model.eval())
    export_model(str(save(vlm, tmp_path / "adapter")), tmp_path / "out")
    plain, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    torch.testing.assert_close(logits(vlm, plain), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_whole_models_of_every_family(family: str, tmp_path: Path) -> None:
    original = tiny_vlm(family)
    result = export_model(str(save(original, tmp_path / "model")), tmp_path / "out")
    assert not result["merged"] and result["parameters"] == original.core.num_parameters()
    plain, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    torch.testing.assert_close(logits(original, plain), logits(original, original.model), atol=1e-5, rtol=0)


def test_card(adapter: Path, tmp_path: Path) -> None:
    answers = tmp_path / "blank.jsonl"
    vlm = load_vlm(str(adapter / "model"), device="cpu")
    evaluate(vlm, make_records(tmp_path), mode="no-think", out=answers, max_new_tokens=3, condition="blank")
    export_model(str(adapter), tmp_path / "out", answers=[answers], name="me/ct")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.tags == ["medr1", "research-use-only"] and card.data.base_model is None, "a local folder"
    assert card.data.eval_results and card.data.eval_results[0].metric_type == "accuracy"
    assert NOTICE in card.text and "base with a LoRA adapter merged" in card.text
    assert "condition blank, mode no-think." in card.text
    assert "| CT                | 3   | 0.0" in card.text and "| all " in card.text
    [source] = {row["source"] for row in read_jsonl(answers)}
    assert card.data.eval_results[0].dataset_name == f"{source}, condition blank", "not what was trained on"
    # Known by its weights under another name; another model's are refused, also where its name is no folder.
    rows = read_jsonl(answers)
    write_jsonl(answers, [{**row, "model": "moved"} for row in rows])
    export_model(str(adapter), tmp_path / "out", answers=[answers])
    write_jsonl(answers, [{**row, "model": "tiny", "weights": "0" * 16} for row in rows])
    with pytest.raises(MedR1Error, match=r"holds answers of model tiny \(weights 00000000\), not of"):
        export_model(str(adapter), tmp_path / "out", answers=[answers])
    write_jsonl(answers, [{**row, "seen_by_run": "trained on"} for row in rows])
    with pytest.raises(MedR1Error, match="no answer to a multiple-choice question"):
        export_model(str(adapter), tmp_path / "out", answers=[answers])


def test_an_export_says_nothing_of_this_machine_and_can_be_exported_again(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "model.name": str(adapter / "base"),
        "rollout.vllm_url": "http://ward-7:8000",
        "grpo.rewards": {"accuracy": 1, "/home/anna/rewards.py:short": 1, "judge": 1},
        "grpo.judge": "openai:Qwen/Qwen3-8B@http://ward-7:8001/v1",
        "draws.weights": "/home/anna/draws.py:rare",
    }
    run = tmp_path / "run"
    shutil.copytree(adapter / "model", run / "model")
    write_recipe(load_config(overrides=settings), run)
    export_model(str(run), tmp_path / "out")
    text = (tmp_path / "out" / "recipe.toml").read_text()
    assert "anna" not in text and "ward-7" not in text
    recipe = load_config(tmp_path / "out" / "recipe.toml")
    assert list(recipe.grpo.rewards) == ["accuracy", "rewards.py:short", "judge"]
    assert (recipe.draws.weights, recipe.grpo.judge) == ("draws.py:rare", "openai:Qwen/Qwen3-8B")
    (tmp_path / "out" / "recipe.toml").write_text(text.replace('name = "base"', 'name = "acme/base@v1"'))
    assert export_model(str(tmp_path / "out"), tmp_path / "half", dtype="float16")["dtype"] == "float16"
    card = ModelCard.load(tmp_path / "half" / "README.md")
    assert card.data.base_model == "acme/base" and "Weights of acme/base@v1" in card.text
    tell_older(str(tmp_path / "out"))
    assert "is an export, which carries no list of what its run held out" in capsys.readouterr().err


def test_mistakes_are_one_line(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    (tmp_path / "recipe.toml").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    cases = [
        (lambda: export_model("tiny", tmp_path / "full"), "holds files that are not of an export"),
        (lambda: export_model("tiny", tmp_path / "out", dtype="int4"), "choose float32, bfloat16, float16"),
        (lambda: export_model(str(tmp_path), tmp_path / "out"), "holds no model yet; train to the end"),
        (
            lambda: export_model("tiny", tmp_path / "out", answers=[tmp_path / "empty.jsonl"]),
            "holds no evaluation rows",
        ),
        (lambda: push_to_hub(tmp_path / "full", "me/x"), "does not carry the research notice"),
    ]
    for call, message in cases:
        with pytest.raises(MedR1Error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as one upload of small files needs."""

    repositories: dict[str, dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.repositories:
                return self.answer(409, {"error": "You already created this model repo", "url": self.url(name)})
            self.repositories[name] = {"private": asked["visibility"] == "private", "files": {}}
            return self.answer(200, {"url": self.url(name), "name": name})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        name = self.path.removeprefix("/api/models/").rsplit("/", 2)[0]
        if "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.repositories[name]["files"][line["value"]["path"]] = content
        self.answer(200, {"commitUrl": f"{self.url(name)}/commit/1", "commitOid": "1", "hookOutput": ""})

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").split("/revision/")[0]
        if name not in self.repositories:
            return self.answer(404, {"error": "not here"})
        self.answer(200, {"id": name, "private": self.repositories[name]["private"], "siblings": []})

    def url(self, name: str) -> str:
        return f"http://{self.headers['Host']}/{name}"

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """The repositories of a hub on this machine, which the hub's client talks to with a good token."""
    Hub.repositories = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield Hub.repositories
    server.shutdown()


def test_push_to_hub(
    adapter: Path, hub: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["export", str(adapter / "model"), "--out", str(out), "--push-to-hub", "me/ct", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["commit"].endswith("/me/ct/commit/1")
    assert hub["me/ct"]["private"]
    assert hub["me/ct"]["files"] == {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= hub["me/ct"]["files"].keys()
    readme = hub["me/ct"]["files"]["README.md"].decode()
    assert NOTICE in readme and 'from_pretrained("me/ct")' in readme

    hub["me/ct"]["private"] = False
    with pytest.raises(MedR1Error, match="me/ct: is a public repository; add --public to publish there"):
        push_to_hub(out, "me/ct")
    assert push_to_hub(out, "me/ct", public=True).endswith("/commit/1")
    assert push_to_hub(out, "me/open", public=True) and not hub["me/open"]["private"]
    for name in ("me/a/b", "me/.."):
        with pytest.raises(MedR1Error, match="--push-to-hub me/"):
            push_to_hub(out, name)
    hub["me/ct"]["private"] = True
    for change in (("setenv", "HF_TOKEN", "hf_wrong"), ("delenv", "HF_TOKEN")):
        getattr(monkeypatch, change[0])(*change[1:])
        with pytest.raises(MedR1Error, match="log in with `hf auth login`") as caught:
            push_to_hub(out, "me/ct")
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MedR1Error, match="check name and network"):
        push_to_hub(out, "me/ct")
