"""Rollouts and answers of a real vLLM server: the policy's distribution, fresh weights, a server that is killed.

The model is the tiny one after a few steps of training, with an output head of its own: vLLM's CPU build packs the head
when it starts and, where the head is tied to the embeddings, does not pack it again when weights are read anew.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import vllm_env
from fake_vllm import own_port
from transformers import TrainerCallback

from medr1.config import Config, load_config, to_toml
from medr1.data.images import load_image
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.data.prompts import build_messages
from medr1.data.records import Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.engines import compare
from medr1.evaluation.remote import evaluate_remote
from medr1.evaluation.run import evaluate
from medr1.policy import rollouts_vllm
from medr1.policy.adapters import add_lora
from medr1.policy.client import api_messages
from medr1.policy.encoding import PromptBatch, encode_prompts
from medr1.policy.pixels import limit_pixels
from medr1.policy.rollouts_vllm import VLLMServer, greedy
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM, load_vlm
from medr1.training import GRPOTrainer

SAMPLING: dict[str, Any] = {"num_completions": 8, "max_new_tokens": 24, "temperature": 0.7, "seed": 3}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_images=48, seed=1)


def recipe(phantoms: Path, **overrides: object) -> Config:
    defaults = {
        "data.path": str(phantoms),
        "data.test_fraction": 0.34,
        "rollout.num_completions": 4,
        "rollout.max_new_tokens": 40,
        "grpo.beta": 0.0,
        "grpo.rewards": {"test_training:letters_reward": 1.0},  # differs within every group
        "optimizer.steps": 3,
        "optimizer.prompts_per_step": 4,
        "optimizer.learning_rate": 3e-4,
        "log.save_every": 2,
    }
    return load_config(overrides=defaults | overrides)


@pytest.fixture(scope="module")
def trained(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny model, sampled locally; the model lies in its folder `model`."""
    vlm = load_vlm("tiny", dtype="float32")
    head, embeddings = vlm.core.lm_head, vlm.core.get_input_embeddings()
    for config in (vlm.core.config, vlm.core.config.get_text_config()):
        config.tie_word_embeddings = False
    head.weight = torch.nn.Parameter(embeddings.weight.detach().clone())
    out = tmp_path_factory.mktemp("trained")
    config = recipe(phantoms)
    GRPOTrainer(vlm, config, *load_parts(config.data), out).run()
    return out


@pytest.fixture(scope="module")
def server(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[vllm_env.Server]:
    try:
        python = vllm_env.build()
    except vllm_env.Unavailable as reason:
        pytest.skip(str(reason))
    server = vllm_env.Server(python, trained / "model", own_port(), tmp_path_factory.mktemp("vllm") / "log.txt")
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def settings(local_servers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts_vllm, "POLL", 0.2)
    torch.manual_seed(0)


@pytest.fixture
def vlm(trained: Path) -> VLM:
    return load_vlm(str(trained / "model"), dtype="float32")


@pytest.fixture
def records(phantoms: Path) -> list[Record]:
    """Questions of several lengths, one about two images."""
    first, second, *others = load_parts(recipe(phantoms).data)[0][::7][:5]
    return [first.model_copy(update={"images": second.images + first.images}), second, *others]


def encode(vlm: VLM, records: list[Record]) -> PromptBatch:
    images = [[load_image(path) for path in record.images] for record in records]
    return encode_prompts(vlm, [build_messages(record, "think") for record in records], images)


def disturb(parameters: Any, size: float = 0.02) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape) * size)


def differences(vlm: VLM, server: VLLMServer, records: list[Record]) -> torch.Tensor:
    """|log-prob of the server - of the policy| of each sampled token."""
    prompts = encode(vlm, records)
    rollout = server.sample(records, prompts, **SAMPLING)
    with torch.no_grad():
        logp, _ = completion_logprobs(
            vlm, prompts, rollout.completion_ids_NT, rollout.mask_NT, temperature=SAMPLING["temperature"]
        )
    assert not torch.isin(rollout.completion_ids_NT[rollout.mask_NT], torch.tensor(vlm.banned_token_ids)).any()
    return (logp - rollout.logp_NT)[rollout.mask_NT].abs()


def answers(rows: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    return [tuple(row[name] for name in ("id", "reply", "finish", "tokens", "correct")) for row in rows]


# The order matters from here on: the server first holds the model as it was started, then what is pushed to it.


def test_a_trained_model_is_served_as_it_is(server: vllm_env.Server, trained: Path, vlm: VLM, phantoms: Path) -> None:
    """The official client; then `medr1 eval` of the server and of the folder: the same replies, whole and cut ones."""
    _, records = load_parts(recipe(phantoms).data)
    client = openai.OpenAI(base_url=server.url, api_key="none")
    messages = api_messages(build_messages(records[0], "think"), map(load_image, records[0].images))
    reply = client.chat.completions.create(model="policy", messages=messages, temperature=0, max_tokens=64)
    for length, count in ((64, 48), (7, 8)):
        settings: dict[str, Any] = {"mode": "think", "max_new_tokens": length}
        asked = records[:count]
        ours = evaluate(vlm, asked, out=trained / f"local-{length}.jsonl", **settings)
        theirs = evaluate_remote(
            f"openai:policy@{server.url}", asked, out=trained / f"server-{length}.jsonl", **settings
        )
        assert len(asked) == count and answers(theirs) == answers(ours)
        counted = encode(vlm, asked).attention_mask_BP.sum(1).tolist()
        assert [row["prompt_tokens"] for row in theirs] == counted, "images included"
        if length == 64:
            assert reply.choices[0].message.content == ours[0]["reply"]
    assert {row["finish"] for row in ours} == {"length"}


def test_the_server_computes_what_transformers_computes(server: vllm_env.Server, vlm: VLM, phantoms: Path) -> None:
    """`medr1 engines check`, and one cause that a server of real weights tells: an older policy is not the server's."""
    asked = load_parts(recipe(phantoms).data)[0][::9][:6]
    how: dict[str, Any] = {"mode": "think", "max_new_tokens": 24}
    found = compare(vlm, asked, lambda records, _: greedy(vlm, server.url, records, **how), **how)
    assert [found[name] for name in ("prompts", "logps", "replies", "outcomes")] == [6] * 4
    assert found["max_gap"] < 1e-4 and not found["causes"]
    disturb(vlm.model.parameters())
    found = compare(vlm, asked, lambda records, _: greedy(vlm, server.url, records, **how), **how)
    assert list(found["causes"]) == ["weights"]
    for parting in found["partings"]:
        sides = parting["ours"], parting["theirs"]
        assert all(side["here"] is not None and side["there"] is not None for side in sides)


def test_what_the_server_refuses_is_one_line(server: vllm_env.Server, records: list[Record], tmp_path: Path) -> None:
    long = records[1].model_copy(update={"question": "Which of these is it? " * 300})
    with pytest.raises(MedR1Error, match=f"refuses record {long.id} .*maximum context length") as error:
        evaluate_remote(f"openai:policy@{server.url}", [long], mode="think", out=tmp_path / "x.jsonl")
    assert "\n" not in str(error.value)
    with pytest.raises(MedR1Error, match=r"no model other there .*it offers policy"):
        evaluate_remote(f"openai:other@{server.url}", [records[1]], mode="think", out=tmp_path / "y.jsonl")


def test_the_server_samples_from_the_policy_that_was_pushed(
    server: vllm_env.Server, vlm: VLM, records: list[Record], tmp_path: Path
) -> None:
    """A policy that would love to draw vision tokens, over two pushes; a stale server is far off."""
    remote = VLLMServer(vlm, server.url, tmp_path, mode="think", lora=False)
    head = vlm.core.lm_head.weight
    with torch.no_grad():  # as likely as the tokens that replies begin with and end with
        usual = vlm.tokenizer.convert_tokens_to_ids(["<think>", "<|im_end|>"])
        head[vlm.banned_token_ids] = head[usual].mean(0) * 2
    for step in range(2):
        vlm.core.save_pretrained(tmp_path)
        remote.push(step)
        assert differences(vlm, remote, records).max() < 1e-4
        disturb(vlm.model.parameters())
        assert differences(vlm, remote, records).max() > 0.1
    with pytest.raises(MedR1Error, match=r"nats a token off the policy's"):
        remote.check({server.url: 0.6})


def test_tokens_are_drawn_by_the_log_probs_that_come_with_them(
    server: vllm_env.Server, vlm: VLM, records: list[Record], tmp_path: Path
) -> None:
    """Then log-prob plus entropy is 0 on average over all tokens; any cut or other temperature makes it positive."""
    disturb(vlm.model.parameters(), 0.05)
    vlm.core.save_pretrained(tmp_path)
    remote = VLLMServer(vlm, server.url, tmp_path, mode="think", lora=False)
    remote.push(0)
    prompts = encode(vlm, records)
    sums, entropies, replies = [], [], set()
    for seed in range(6):
        rollout = remote.sample(records, prompts, **SAMPLING | {"temperature": 1.5, "seed": seed})
        ids, mask = rollout.completion_ids_NT, rollout.mask_NT
        with torch.no_grad():
            logp, entropy = completion_logprobs(vlm, prompts, ids, mask, temperature=1.5, entropy=True)
        assert entropy is not None
        sums.append((logp + entropy).sum(1))
        entropies.append(entropy[mask])
        replies |= set(rollout.texts)
    assert torch.cat(entropies).mean() > 0.5, "else there is little to see"
    assert len(replies) > 120, "of 240; were a group's draws equal, there would be 30"
    total = torch.cat(sums)
    assert abs(total.mean() / (total.std() / len(total) ** 0.5)) < 3.5


def test_raw_logprobs_are_refused(
    server: vllm_env.Server, vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --logprobs-mode, a token that only the bias makes certain has the log-prob that it has without."""
    remote = VLLMServer(vlm, server.url, tmp_path, mode="think", lora=False)
    vlm.core.save_pretrained(tmp_path)
    client = remote.servers[0].client
    create = client.chat.completions.create

    def raw(**kwargs: Any) -> Any:
        reply = create(**kwargs)
        reply.choices[0].logprobs.content[0].logprob = -9.0
        return reply

    monkeypatch.setattr(client.chat.completions, "create", raw)
    with pytest.raises(MedR1Error, match="--logprobs-mode processed_logprobs"):
        remote.push(0)


def test_an_adapter_is_pushed_alone(server: vllm_env.Server, vlm: VLM, records: list[Record], tmp_path: Path) -> None:
    """After the weights below it; the adapter before is gone, so that nobody can be answered by it."""
    base = VLLMServer(vlm, server.url, tmp_path / "base", mode="think", lora=False)
    vlm.core.save_pretrained(tmp_path / "base")
    base.push(0)
    vlm = add_lora(vlm, rank=4, alpha=16)
    remote = VLLMServer(vlm, server.url, tmp_path / "adapter", mode="think", lora=True)
    for step in range(2):
        disturb(weight for name, weight in vlm.model.named_parameters() if "lora_B" in name)
        vlm.model.save_pretrained(tmp_path / "adapter")
        remote.push(step)
        assert differences(vlm, remote, records).max() < 1e-4
    served = [model.id for model in remote.servers[0].client.models.list()]
    assert served == ["policy", remote.version]


def test_weights_that_are_not_ours_are_noticed(
    server: vllm_env.Server, vlm: VLM, records: list[Record], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server that came back with its first weights gets ours again; one that another run uses is refused."""
    remote = VLLMServer(vlm, server.url, tmp_path / "ours", mode="think", lora=False)
    other = VLLMServer(vlm, server.url, tmp_path / "other", mode="think", lora=False)
    vlm.core.save_pretrained(tmp_path / "other")
    disturb(vlm.model.parameters())
    vlm.core.save_pretrained(tmp_path / "ours")
    remote.push(0)
    other.push(0)
    remote.servers[0].post("update_weight_version", {"new_version": "default"})  # as after a restart
    assert differences(vlm, remote, records).max() < 1e-4
    assert "started anew; waiting for the server" in capfd.readouterr().err
    other.push(1)
    with pytest.raises(MedR1Error, match=f"holds the weights {other.version}, not {remote.version}; give each run"):
        differences(vlm, remote, records)


def test_prompts_that_differ_or_do_not_fit_are_refused(
    server: vllm_env.Server, vlm: VLM, records: list[Record], tmp_path: Path
) -> None:
    """Here our side takes larger images than the server's, which scales down what we send."""
    vlm.core.save_pretrained(tmp_path)
    remote = VLLMServer(vlm, server.url, tmp_path, mode="think", lora=False)
    remote.push(0)
    limit_pixels(vlm.processor, vlm.name, min_pixels=168 * 168, max_pixels=168 * 168)
    with pytest.raises(MedR1Error, match=r"reads the prompt of record phantom_\d+_\d otherwise than medr1"):
        differences(vlm, remote, records)
    long = records[1].model_copy(update={"question": "Which of these is it? " * 300})
    with pytest.raises(MedR1Error, match=f"refuses record {long.id} .*--max-model-len"):
        differences(vlm, remote, [long])
    missing = VLLMServer(vlm, server.url, tmp_path / "nowhere", mode="think", lora=False)
    with pytest.raises(MedR1Error, match=r"fails .*nowhere"):
        missing.push(0)


@pytest.mark.parametrize(
    "overrides",
    [
        {"grpo.beta": 0.1},
        {"grpo.num_iterations": 2},
        {"model.lora_rank": 4},
        {"model.lora_rank": 4, "rollout.ahead": 1},
    ],
    ids=["full", "two-updates", "lora", "lora-ahead"],
)
def test_training_with_the_server(
    overrides: dict[str, object], server: vllm_env.Server, vlm: VLM, phantoms: Path, tmp_path: Path
) -> None:
    """The policy moves, and the server with it: before each first update both agree on every token.

    One step ahead the policy that learns is apart from what sampled, and what was asked for the next step is not.
    """
    config = recipe(
        phantoms, **overrides, **{"rollout.engine": "vllm", "rollout.vllm_url": server.url, "optimizer.steps": 4}
    )
    if config.model.lora_rank:
        vlm.core.save_pretrained(tmp_path / "base")
        VLLMServer(vlm, server.url, tmp_path / "base", mode="think", lora=False).push(0)
    trainer = GRPOTrainer(vlm, config, *load_parts(config.data), tmp_path / "run")
    before = torch.cat([weight.detach().flatten() for weight in trainer.vlm.model.parameters()]).clone()
    trainer.run()
    after = torch.cat([weight.detach().flatten() for weight in trainer.vlm.model.parameters()])
    assert (after - before).abs().max() > 1e-4
    rows = [row for row in read_jsonl(tmp_path / "run" / "log.jsonl") if "rollout_difference" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    if config.rollout.ahead:
        assert [row["rollout_lag"] for row in rows] == [0, 1, 1, 1]
        assert all(row["server_difference"] < 1e-4 for row in rows[:-1])
        rows = rows[:1]
    assert all(
        row["rollout_difference"] < 1e-4 and row["rollout_kl"] < 1e-6 and not row["rollout_capped"] for row in rows
    )
    assert not (tmp_path / "run" / "vllm-weights").exists()


def test_two_processes_share_a_server(server: vllm_env.Server, trained: Path, phantoms: Path, tmp_path: Path) -> None:
    """The command line as torchrun starts it: one pushes, both ask a step ahead, each for its part of the prompts."""
    model = str(trained / "model")
    where = {"rollout.engine": "vllm", "rollout.vllm_url": server.url, "rollout.ahead": 1}
    config = recipe(phantoms, **where, **{"model.name": model})
    (tmp_path / "recipe.toml").write_text(to_toml(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "medr1"]
    paths = os.pathsep.join(str(Path(__file__).parents[1] / name) for name in ("src", "tests"))
    done = subprocess.run(
        [*launcher, "train", "--config", tmp_path / "recipe.toml", "--out", tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in read_jsonl(tmp_path / "run" / "log.jsonl") if "rollout_difference" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["rollout_difference"] < 1e-4 and all(row["server_difference"] < 1e-4 for row in rows[:2])
    steps = [row["step"] for row in read_jsonl(tmp_path / "run" / "completions.jsonl")]
    assert steps == [number for number in (1, 2, 3) for _ in range(16)]


class KillServer(TrainerCallback):
    """After step 3, between the checkpoints of steps 2 and 4."""

    def __init__(self, server: vllm_env.Server) -> None:
        self.server = server

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == 3:  # type: ignore[attr-defined]
            self.server.kill()


def test_a_killed_server_loses_nothing(
    server: vllm_env.Server,
    vlm: VLM,
    trained: Path,
    phantoms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The run ends with one line; the same command waits for the server, gives it its weights, and goes to the end."""
    config = recipe(phantoms, **{"rollout.engine": "vllm", "rollout.vllm_url": server.url, "optimizer.steps": 6})
    parts = load_parts(config.data)
    trainer = GRPOTrainer(vlm, config, *parts, tmp_path)
    trainer.add_callback(KillServer(server))
    with monkeypatch.context() as impatient:
        impatient.setattr(rollouts_vllm, "WAIT", 0.5)
        with pytest.raises(MedR1Error, match=f"{server.url}: no vLLM for 0.5 seconds .*the last checkpoint$") as error:
            trainer.run()
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err.count("waiting for the server") == 1

    server.start()
    GRPOTrainer(load_vlm(str(trained / "model"), dtype="float32"), config, *parts, tmp_path).run()
    assert capfd.readouterr().err.count("waiting for the server") == 1
    rows = [row for row in read_jsonl(tmp_path / "log.jsonl") if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["rollout_difference"] < 1e-4 for row in rows if "rollout_difference" in row)
    assert [row["step"] for row in read_jsonl(tmp_path / "completions.jsonl")] == [
        n for n in range(1, 7) for _ in range(16)
    ]


def test_without_a_server(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load_vlm(str(trained / "model"))
    monkeypatch.setattr(rollouts_vllm, "WAIT", 0.0)
    with pytest.raises(MedR1Error, match=r"http://127.0.0.1:9: is no URL that ends in /v1"):
        VLLMServer(vlm, "http://127.0.0.1:9", tmp_path, mode="think", lora=False)
    with pytest.raises(MedR1Error, match="no vLLM for 0 seconds"):
        VLLMServer(vlm, "http://127.0.0.1:9/v1", tmp_path, mode="think", lora=False).push(0)


def test_the_benchmark_of_both_engines_compares_last_rewards_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 steps; differences 0.2 and 0.1 at the end: mean 0.15, standard error 0.0707 / sqrt 2 = 0.05."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import vllm_learning

    def rows(last: float) -> list[dict[str, Any]]:
        shared = {"reward_accuracy": 0.5, "step_seconds": 1.0, "rollout_difference": 1e-5, "rollout_capped": 0.0}
        return [shared | {"reward": 0.25 if step < 10 else last} for step in range(20)]

    table = vllm_learning.tabulate({"local": [rows(0.5), rows(0.7)], "vllm": [rows(0.7), rows(0.8)]})
    assert "| vllm | 1 | 0.250 | 0.800 | 0.500 | 1.00 | 1.0e-05 | 0.0e+00 |" in table
    assert "vllm minus local, last 10 steps: +0.150 (0.050)\n" in table
    assert table.endswith("Seconds a step, vllm over local: 1.000 (0.000)\n")
