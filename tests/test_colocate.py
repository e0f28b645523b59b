"""vLLM in the process that trains. What needs vLLM runs in its own environment, see tests/vllm_env.py."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_env
from safetensors.torch import load_file
from tiny_vlms import tiny_vlm
from torch import nn

from medr1.config import load_config, to_toml
from medr1.data.phantoms import write_phantoms
from medr1.data.records import read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.engines import check_engine
from medr1.policy.adapters import add_lora
from medr1.policy.rollouts_colocate import ColocatedVLLM, renew_heads, weights_as_saved
from medr1.policy.vlm import VLM, load_vlm, merged

TESTS = Path(__file__).parent
ENGINE: dict[str, Any] = {"mode": "think", "dtype": "float32", "memory": 0.3}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_images=48, seed=1)


def beside(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """What a command of Python does where vLLM and medr1 are."""
    try:
        python = vllm_env.build_beside()
    except vllm_env.Unavailable as reason:
        pytest.skip(str(reason))
    paths = os.pathsep.join(str(path) for path in (TESTS.parent / "src", TESTS, TESTS / "vllm_site"))
    environment = os.environ | vllm_env.SETTINGS | {"PYTHONPATH": paths}
    return subprocess.run([python, *command], env=environment, capture_output=True, text=True, timeout=1200)


def test_weights_for_a_server_are_sent_by_vllm_s_own_classes(tmp_path: Path) -> None:
    """From GPU to GPU, but that nothing is sent here."""
    done = beside(TESTS / "nccl_worker.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_engine_samples_from_the_policy_in_memory(phantoms: Path, tmp_path: Path) -> None:
    """A tied head, vision weights and adapters, each after an update; before a push the engine is far off."""
    done = beside(TESTS / "colocate_worker.py", phantoms, tmp_path / "told.json")
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    fresh = [told["first"], told["again"], *told["pushed"]]
    assert max(seen["off"] for seen in fresh) < 1e-4
    assert min(seen["off"] for seen in told["stale"]) > 0.05
    assert not told["check"]["causes"] and [told["check"][name] for name in ("prompts", "logps", "replies")] == [3] * 3
    assert not any(seen["banned"] for seen in [*fresh, *told["stale"]])
    assert told["first"]["replies"] == told["again"]["replies"], "the same seeds"
    assert len(set(told["pushed"][1]["replies"])) > 3, "were a group's draws equal, there would be 3"
    assert told["untouched"] == [True, True] and told["kept"]
    assert done.stderr.count("vLLM's CPU build kept language_model.lm_head, which is tied to the embeddings") == 1
    assert "tokens and rollout.max_new_tokens = 24 are more than the 4096 that vLLM has room for; raise" in told["long"]
    assert "reads the prompt of record" in told["other"] and told["other"].endswith("set rollout.engine to local")


def test_a_killed_run_goes_on(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `kill -9` in the middle of step 4; the log of the whole run is as of one that nobody killed."""
    overrides = {
        "data.path": str(phantoms),
        "rollout.engine": "vllm-colocate",
        "rollout.num_completions": 4,
        "rollout.max_new_tokens": 24,
        "grpo.rewards": {"colocate_worker:killing_reward": 1.0},
        "optimizer.steps": 6,
        "optimizer.prompts_per_step": 4,
        "optimizer.learning_rate": 3e-4,
        "log.save_every": 2,
    }
    run = tmp_path / "run"
    monkeypatch.setenv("MEDR1_TEST_RUN", str(run))
    (tmp_path / "recipe.toml").write_text(to_toml(load_config(overrides=overrides)))
    command = ("-m", "medr1", "train", "--config", tmp_path / "recipe.toml", "--out", run)
    assert beside(*command).returncode == -signal.SIGKILL
    assert [row["step"] for row in read_jsonl(run / "log.jsonl")] == [1, 2, 3]
    done = beside(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in read_jsonl(run / "log.jsonl") if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert max(row["rollout_difference"] for row in rows) < 1e-4
    assert [row["step"] for row in read_jsonl(run / "completions.jsonl")] == [n for n in range(1, 7) for _ in range(16)]
    assert (run / "model" / "model.safetensors").exists() and not (run / "vllm-weights").exists()


FAMILIES = ("qwen2_vl", "idefics3", "gemma3", "qwen3_vl_moe", "llava")


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_handed_over_as_a_file_has_them(name: str, tmp_path: Path) -> None:
    vlm = tiny_vlm(name)
    vlm.core.save_pretrained(tmp_path)
    equal(dict(weights_as_saved(vlm)), load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("targets", ["language", "both"])
def test_adapters_are_added_to_what_is_handed_over(targets: str, tmp_path: Path) -> None:
    """As in the model that they are merged into; the policy's own weights stay as they are."""
    vlm = add_lora(load_vlm("tiny", dtype="float32"), rank=4, alpha=16, targets=targets)
    with torch.no_grad():
        for name, weight in vlm.model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    before = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
    handed = dict(weights_as_saved(vlm))
    assert all(torch.equal(weight, before[name]) for name, weight in vlm.model.state_dict().items())
    merged(VLM(copy.deepcopy(vlm.model), vlm.processor, "tiny")).save_pretrained(tmp_path)
    equal(handed, load_file(tmp_path / "model.safetensors"), atol=1e-6)


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=atol, rtol=0.0)


class Packed(nn.Module):
    """A head as vLLM's CPU build has it: it computes with a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(3, 2))
        self.quant_method = SimpleNamespace(process_weights_after_loading=self.pack, apply=self.compute)
        self.pack(self)

    def pack(self, module: nn.Module) -> None:
        self.cpu_linear = self.weight.detach().clone()

    def compute(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x @ self.cpu_linear.T


def test_a_stale_head_is_found_and_renewed() -> None:
    model: Any = nn.ModuleDict({"lm_head": Packed(), "norm": nn.LayerNorm(2)})
    assert renew_heads(model) == []
    with torch.no_grad():
        model["lm_head"].weight[2, 1] += 1e-3
    assert renew_heads(model) == ["lm_head"]
    assert torch.equal(model["lm_head"].cpu_linear, model["lm_head"].weight)
    assert renew_heads(model) == []


def test_what_cannot_be_served_is_refused_in_one_line(phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load_vlm("tiny", dtype="float32")
    with pytest.raises(MedR1Error, match=r"^rollout.engine = vllm-colocate needs vLLM in this environment"):
        ColocatedVLLM(vlm, **ENGINE)
    config = load_config(overrides={"data.path": str(phantoms)})
    with pytest.raises(MedR1Error, match=r"^rollout.engine = vllm-colocate needs vLLM"):  # medr1 engines check tiny
        check_engine("tiny", config, url=None, run=None, limit=1, max_new_tokens=4)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    said = r"vLLM does not serve tiny here \(no such kernel\); where .* another rollout.vllm_memory than 0.3, else"
    with pytest.raises(MedR1Error, match=said), ColocatedVLLM(vlm, **ENGINE)._in_one_line():
        raise RuntimeError("no such kernel\nin this build")
    with pytest.raises(MedR1Error, match="vllm_tensor_parallel = 2 does not divide the 1 processes of this run; start"):
        ColocatedVLLM(vlm, **ENGINE, tensor_parallel=2)
    vlm.core.is_loaded_in_4bit = True
    with pytest.raises(MedR1Error, match=r"those of tiny are in 4 bits; set rollout.engine to local, or to vllm with"):
        ColocatedVLLM(vlm, **ENGINE)
    with pytest.raises(MedR1Error, match="vllm_tensor_parallel: processes that share an engine ask it together"):
        load_config(overrides={"rollout.vllm_tensor_parallel": 2, "draws.redraws": 1})
