"""Several vLLM servers that share out the prompts: who is asked what, who is lost and comes back, who is stale."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("openai", reason="needs the openai client: pip install 'medr1[remote]'")

from fake_vllm import FakeVLLM, disturbed, is_proof, starting
from tiny_vlms import tiny_vlm
from transformers import TrainerCallback

from medr1.config import Config, load_config
from medr1.data.images import load_image
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.data.prompts import build_messages
from medr1.data.records import Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.policy import rollouts_vllm
from medr1.policy.encoding import PromptBatch, encode_prompts
from medr1.policy.mismatch import Watch
from medr1.policy.rollouts import Rollout
from medr1.policy.rollouts_vllm import VLLMServer
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM
from medr1.training import GRPOTrainer
from medr1.training.folder import write_recipe

Start = Callable[[], FakeVLLM]
Reply = dict[str, Any]
SAMPLING: dict[str, Any] = {"num_completions": 2, "max_new_tokens": 6, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_images=16, seed=1)


@pytest.fixture(autouse=True)
def settings(local_servers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts_vllm, "POLL", 0.05)


@pytest.fixture
def vlm() -> VLM:
    return tiny_vlm("qwen2_vl")


@pytest.fixture
def start(vlm: VLM) -> Iterator[Start]:
    """A server that starts with other weights than the policy's."""
    with starting() as start:
        yield lambda: start(disturbed(vlm))


@pytest.fixture
def records(phantoms: Path) -> list[Record]:
    return load_parts(load_config(overrides={"data.path": str(phantoms)}).data)[0][::9][:5]


def encode(vlm: VLM, records: list[Record]) -> PromptBatch:
    images = [[load_image(path) for path in record.images] for record in records]
    return encode_prompts(vlm, [build_messages(record, "no-think") for record in records], images)


def engine(vlm: VLM, folder: Path, *servers: FakeVLLM) -> VLLMServer:
    vlm.core.save_pretrained(folder)
    return VLLMServer(vlm, [f"{server.url}/" for server in servers], folder, mode="no-think", lora=False)


def same(one: Rollout, other: Rollout) -> bool:
    return one.tokens == other.tokens and torch.allclose(one.logp_NT, other.logp_NT, atol=1e-5)


def prompts_of(*bodies: list[dict[str, Any]]) -> list[int]:
    """The seeds, which tell prompts apart."""
    return sorted(body["seed"] for part in bodies for body in part)


def test_prompts_are_shared_out_and_seeds_belong_to_them(
    vlm: VLM, start: Start, records: list[Record], tmp_path: Path
) -> None:
    one, two, alone = start(), start(), start()
    prompts = encode(vlm, records)
    both, single = engine(vlm, tmp_path, one, two), engine(vlm, tmp_path, alone)
    for step in range(2):
        both.push(step)
        single.push(step)
        rollout = both.sample(records, prompts, **SAMPLING)
        assert same(rollout, single.sample(records, prompts, **SAMPLING))
        with torch.no_grad():
            logp, _ = completion_logprobs(vlm, prompts, rollout.completion_ids_NT, rollout.mask_NT, temperature=1.0)
        assert torch.allclose(logp, rollout.logp_NT, atol=1e-5), "the servers answer by the policy's weights"
        assert rollout.samplers == [server.url for server in (one, two, one, two, one) for _ in range(2)]
        assert prompts_of(one.asked, two.asked) == prompts_of(alone.asked)
    assert (len(one.asked), len(two.asked)) == (6, 4)
    last = both.sample(records[:1], encode(vlm, records[:1]), **SAMPLING | {"part": (1, 2)})
    assert last.samplers == [two.url] * 2, "two processes with a prompt each ask one server each"


def test_a_server_that_dies_is_left_out_and_comes_back(
    vlm: VLM, start: Start, records: list[Record], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It dies at its second request: what it answered before is kept, all else is asked of the other."""
    alone, one, two = start(), start(), start()
    one.fault = lambda number: one.kill() if number == 2 else None
    prompts = encode(vlm, records)
    single, both = engine(vlm, tmp_path, alone), engine(vlm, tmp_path, one, two)
    single.push(0)
    expected = single.sample(records, prompts, **SAMPLING)
    both.push(0)
    assert same(both.sample(records, prompts, **SAMPLING), expected)
    assert prompts_of(one.answered, two.answered) == prompts_of(alone.answered)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"{one.url}: ") and said[0].endswith("; left out until it is back")
    both.push(1)
    assert same(both.sample(records, prompts, **SAMPLING), expected)
    assert not capfd.readouterr().err, "said once"
    one.start()
    one.answered.clear()
    assert set(both.sample(records, prompts, **SAMPLING).samplers) == {two.url}, "it has not the weights"
    both.push(2)
    assert capfd.readouterr().err == f"{one.url}: is back\n"
    assert same(both.sample(records, prompts, **SAMPLING), expected)
    assert len(one.answered) == 3


def test_all_lost_are_waited_for(
    vlm: VLM,
    start: Start,
    records: list[Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    one, two = start(), start()
    both, prompts = engine(vlm, tmp_path, one, two), encode(vlm, records)
    both.push(0)
    expected = both.sample(records, prompts, **SAMPLING)
    one.kill()
    two.kill()
    with monkeypatch.context() as patch:  # it is back as soon as both are seen to be lost
        patch.setattr(rollouts_vllm.time, "sleep", lambda seconds: two.start())
        assert same(both.sample(records, prompts, **SAMPLING), expected)
    said = capfd.readouterr().err
    assert said.count("waiting for the server") == 2 and said.endswith(f"{two.url}: is back\n")
    two.kill()
    monkeypatch.setattr(rollouts_vllm, "WAIT", 0.0)
    with pytest.raises(MedR1Error, match="no vLLM for 0 seconds") as error:
        both.push(1)
    assert "\n" not in str(error.value)


def changing(server: FakeVLLM, change: Callable[[Reply], object]) -> None:
    """From now on the server's replies are changed, but for those of a proof."""
    complete = server.complete

    def changed(body: dict[str, Any]) -> tuple[int, Any]:
        status, reply = complete(body)
        if status == 200 and not is_proof(body):
            change(reply)
        return status, reply

    server.complete = changed  # type: ignore[method-assign]


def cut(reply: Reply, length: int, finish: str) -> None:
    for choice in reply["choices"]:
        told = choice["logprobs"]["content"][:length]
        choice.update(token_ids=choice["token_ids"][:length], logprobs={"content": told}, finish_reason=finish)


def test_a_gateway_s_words_for_a_server_that_is_away_are_waited_out(
    vlm: VLM, start: Start, records: list[Record], tmp_path: Path
) -> None:
    """As many 429 and 502 in a row as would give up a server that says 500; and replies that somebody aborted."""
    one = start()
    alone, prompts, count = engine(vlm, tmp_path, one), encode(vlm, records), len(records)
    alone.push(0)
    expected = alone.sample(records, prompts, **SAMPLING)
    one.asked.clear()
    one.fault = lambda number: 429 if number <= count else 502 if number <= 5 * count else None
    assert same(alone.sample(records, prompts, **SAMPLING), expected)
    one.asked.clear()
    changing(one, lambda reply: cut(reply, 2, "abort") if len(one.asked) <= count else None)
    assert same(alone.sample(records, prompts, **SAMPLING), expected)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda reply: reply["choices"].pop(), "gives 1 completions of record .* than the 2 that were asked for"),
        (lambda reply: reply["choices"][1].update(index=0), "gives 2 completions of record"),
        (lambda reply: reply["choices"].clear(), "gives 0 completions of record"),
        (lambda reply: reply["choices"][0].update(logprobs=None), "its reply is none of vLLM's"),
        (lambda reply: reply["choices"][0].update(token_ids=None), "its reply is none of vLLM's"),
        (lambda reply: reply["choices"][0]["logprobs"]["content"].pop(), "its reply is none of vLLM's"),
        (lambda reply: cut(reply, 2, "length"), r"after 2 of 6 tokens \(length\); raise its --max-model-len"),
        (lambda reply: cut(reply, 0, "stop"), "after 0 of 6 tokens"),
    ],
)
def test_completions_that_are_not_whole_are_not_learned_from(
    vlm: VLM,
    start: Start,
    records: list[Record],
    tmp_path: Path,
    change: Callable[[Reply], object],
    line: str,
) -> None:
    server = start()
    alone = engine(vlm, tmp_path, server)
    alone.push(0)
    changing(server, change)
    with pytest.raises(MedR1Error, match=f"^{server.url}: .*{line}") as error:
        alone.sample(records[:1], encode(vlm, records[:1]), **SAMPLING)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("said", [{"object": "list", "data": []}, "It works!"])
def test_what_is_no_vllm_is_one_line(vlm: VLM, start: Start, tmp_path: Path, said: object) -> None:
    server = start()
    get = server.get
    server.get = lambda asked: (200, said) if asked == "/v1/models" else get(asked)  # type: ignore[method-assign]
    with pytest.raises(MedR1Error, match=f"^{server.url}: its reply is none of vLLM's .*mend the URL"):
        engine(vlm, tmp_path, server).push(0)


def test_a_password_is_neither_written_nor_said(vlm: VLM, tmp_path: Path) -> None:
    url = "http://me:secret@127.0.0.1:8000/v1"
    for use in (
        lambda: load_config(overrides={"rollout.vllm_url": url}),
        lambda: VLLMServer(vlm, url, tmp_path, mode="no-think", lora=False),
    ):
        with pytest.raises(MedR1Error, match=r"holds a password.*set OPENAI_API_KEY") as error:
            use()
        assert "secret" not in str(error.value)


def test_a_server_that_was_started_anew_is_found_before_and_after(
    vlm: VLM, start: Start, records: list[Record], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its first weights are not ours, and it would answer by them."""
    one, two = start(), start()
    both, prompts = engine(vlm, tmp_path, one, two), encode(vlm, records)
    both.push(0)
    expected = both.sample(records, prompts, **SAMPLING)
    one.kill()
    one.start()
    assert same(both.sample(records, prompts, **SAMPLING), expected)
    assert "was started anew; left out until it is back" in capfd.readouterr().err
    both.push(1)
    two.fault = lambda number: setattr(two, "version", "default")  # while it is asked
    assert same(both.sample(records, prompts, **SAMPLING), expected)
    assert f"{two.url}: it was started anew; left out" in capfd.readouterr().err


def test_a_process_that_does_not_push_finds_out_by_itself(
    vlm: VLM, start: Start, records: list[Record], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = start(), start()
    first, second, prompts = engine(vlm, tmp_path, one, two), engine(vlm, tmp_path, one, two), encode(vlm, records)
    first.push(0)
    second.push(0, load=False)
    expected = second.sample(records, prompts, **SAMPLING)
    two.kill()
    first.push(1)
    second.push(1, load=False)
    assert same(second.sample(records, prompts, **SAMPLING), expected)
    two.start()
    two.version = first.version  # as of a server that was out of reach for a while
    first.servers[1].lost = None
    second.push(2, load=False)
    one.version = second.version
    capfd.readouterr()
    assert set(second.sample(records, prompts, **SAMPLING).samplers) == {one.url}
    first.push(2)
    assert set(second.sample(records, prompts, **SAMPLING).samplers) == {one.url, two.url}
    assert f"{two.url}: is back" in capfd.readouterr().err


def test_faults_leave_out_and_refusals_end_the_run(
    vlm: VLM, start: Start, records: list[Record], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = start(), start()
    both, prompts = engine(vlm, tmp_path, one, two), encode(vlm, records)
    both.push(0)
    one.fault = lambda number: 503
    assert set(both.sample(records, prompts, **SAMPLING).samplers) == {two.url}
    assert "503" in capfd.readouterr().err
    two.fault = lambda number: 500  # a prompt that is too much for each of them
    with pytest.raises(MedR1Error, match=r"fails \(.*planted.*\); look into the server's log"):
        both.sample(records, prompts, **SAMPLING)
    one.fault = two.fault = lambda number: None
    both.push(1)
    two.fault = lambda number: 400
    with pytest.raises(MedR1Error, match=f"{two.url}: refuses record ({records[1].id}|{records[3].id}) "):  # its two
        both.sample(records, prompts, **SAMPLING)
    two.fault = lambda number: 403
    with pytest.raises(MedR1Error, match=f"{two.url}: refuses .*set OPENAI_API_KEY"):
        both.sample(records, prompts, **SAMPLING)


def test_a_server_with_older_weights_is_noticed_by_the_run_s_own_first_steps() -> None:
    """Reported of another trainer: 0.201 nats a token, where a server with the right weights gave 0.015."""
    watch, exact, resumed = Watch(), Watch(), Watch()
    for mismatch in (0.015, 0.014, 0.03, 0.016, 0.015, 0.02, 0.055):
        watch.check({"it": mismatch})
    with pytest.raises(MedR1Error, match=r"0.2 nats a token .* were 0.015 in the first steps"):
        watch.check({"it": 0.201})
    for mismatch in [1e-6] * 5 + [1e-4, 0.019]:
        exact.check({"it": mismatch})
    with pytest.raises(MedR1Error, match="older weights"):
        exact.check({"it": 0.03})
    for wrong in (0.6, float("nan")):
        with pytest.raises(MedR1Error, match="nats a token off"):
            Watch().check({"it": wrong})
    resumed.remember([0.015] * 9)
    with pytest.raises(MedR1Error, match="older weights"):
        resumed.check({"it": 0.201})


def test_a_stale_server_among_fresh_ones_is_named_from_the_first_step_on() -> None:
    watch = Watch()
    with pytest.raises(MedR1Error, match=r"^two: .* 0.2 nats a token off .* another server's are 0.015 off"):
        watch.check({"one": 0.015, "two": 0.2, "three": 0.02})
    for _ in range(5):
        watch.check({"one": 0.01, "two": 0.02})
    assert watch.usual == [0.015] * 5
    watch.check({"one": 0.05, "two": 0.01})
    with pytest.raises(MedR1Error, match=r"^one: .* were 0.015 in the first steps"):
        watch.check({"one": 0.07, "two": 0.01})
    with pytest.raises(MedR1Error, match=r"^two: .* nan"):
        Watch().check({"one": 0.01, "two": float("nan")})


def recipe(phantoms: Path, *servers: FakeVLLM, **overrides: object) -> Config:
    defaults = {
        "data.path": str(phantoms),
        "rollout.mode": "no-think",
        "rollout.num_completions": 3,
        "rollout.max_new_tokens": 5,
        "rollout.engine": "vllm",
        "rollout.vllm_url": ",".join(server.url for server in servers),
        "grpo.beta": 0.0,
        "grpo.rewards": {"test_training:letters_reward": 1.0},  # differs within every group
        "optimizer.steps": 5,
        "optimizer.prompts_per_step": 4,
        "optimizer.learning_rate": 3e-3,
        "log.save_every": 5,
    }
    return load_config(overrides=defaults | overrides)


def run(config: Config, out: Path, *callbacks: TrainerCallback, extend: bool = False) -> list[dict[str, Any]]:
    write_recipe(config, out, extend=extend)
    trainer = GRPOTrainer(tiny_vlm("qwen2_vl"), config, *load_parts(config.data), out)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.run()
    return read_jsonl(out / "completions.jsonl")


class KillAndStart(TrainerCallback):
    """Kill in the midst of step 2, start again after step 3."""

    def __init__(self, server: FakeVLLM) -> None:
        self.server = server

    def on_step_end(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        if state.global_step == 1:
            first = len(self.server.asked) + 1
            self.server.fault = lambda number: self.server.kill() if number > first else None
        if state.global_step == 3:
            self.server.fault = lambda number: None
            self.server.start()


def test_a_run_with_a_server_killed_and_restarted_is_the_run_without(
    start: Start, phantoms: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Completion by completion, since these servers answer a prompt alike whatever is beside it."""
    alone, one, two = start(), start(), start()
    expected = run(recipe(phantoms, alone), tmp_path / "alone")
    assert run(recipe(phantoms, one, two), tmp_path / "both", KillAndStart(one)) == expected
    assert prompts_of(one.answered, two.answered) == prompts_of(alone.answered)
    assert len(one.answered) < len(two.answered) and len(one.answered) >= 2 + 2 + 2
    said = [line for line in capfd.readouterr().err.splitlines() if one.url in line]
    assert len(said) == 2 and said[0].endswith("left out until it is back") and said[1].endswith("is back")
    log = [row for row in read_jsonl(tmp_path / "both" / "log.jsonl") if "rollout_difference" in row]
    assert one.dtypes == {torch.float32}
    assert len(log) == 5 and all(row["rollout_difference"] < 1e-5 for row in log)


def test_a_run_with_a_server_that_reads_no_weights_ends(start: Start, phantoms: Path, tmp_path: Path) -> None:
    one, two = start(), start()
    two.reads_weights = False
    with pytest.raises(MedR1Error, match=f"^{two.url}: its log-probs are"):
        run(recipe(phantoms, one, two), tmp_path)


def test_weights_are_written_in_what_the_policy_computes_in(start: Start, phantoms: Path, tmp_path: Path) -> None:
    """bfloat16 is half of float32; servers may be elsewhere when the run is gone on with."""
    one, two = start(), start()
    size = {"model.dtype": "bfloat16", "optimizer.steps": 2, "log.save_every": 2}
    run(recipe(phantoms, one, **size), tmp_path)
    assert one.dtypes == {torch.bfloat16}
    log = [row["rollout_difference"] for row in read_jsonl(tmp_path / "log.jsonl") if "rollout_difference" in row]
    assert len(log) == 2 and all(1e-5 < difference < 0.1 for difference in log)
    run(recipe(phantoms, two, **size | {"optimizer.steps": 4}), tmp_path, extend=True)
    assert two.version.endswith("-3")


def test_sending_from_gpu_to_gpu_needs_vllm_here(start: Start, phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(MedR1Error, match=r"rollout.vllm_transfer = nccl needs .*files$") as error:
        run(recipe(phantoms, start(), **{"rollout.vllm_transfer": "nccl"}), tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "vllm-weights").exists()
