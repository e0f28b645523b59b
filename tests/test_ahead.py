"""One step ahead: whose weights sampled what, the thread beside the training, kills, errors and what is refused."""

import copy
import statistics
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("openai", reason="needs the openai client: pip install 'medr1[remote]'")

import test_servers
from fake_vllm import FakeVLLM, disturbed, starting
from test_training import StopAfter
from tiny_vlms import tiny_vlm

from medr1.config import load_config
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.data.records import Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.policy import rollouts_vllm
from medr1.policy.mismatch import LEAST_MISMATCH, MAX_GROWTH
from medr1.policy.shared_prefix import completion_logprobs
from medr1.training import GRPOTrainer

Start = Callable[[], FakeVLLM]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_images=16, seed=1)


@pytest.fixture(autouse=True)
def settings(local_servers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts_vllm, "POLL", 0.05)


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as start:
        yield lambda: start(disturbed(tiny_vlm("qwen2_vl")))


def trainer_of(phantoms: Path, out: Path, *servers: FakeVLLM, **overrides: object) -> GRPOTrainer:
    config = test_servers.recipe(phantoms, *servers, **{"rollout.ahead": 1} | overrides)
    return GRPOTrainer(tiny_vlm("qwen2_vl"), config, *load_parts(config.data), out)


class Watched:
    """What a trainer had at each step: its weights at the beginning, and what it learned from."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer, self.learn = trainer, trainer.learn
        self.models: list[Any] = []
        self.experiences: list[Any] = []
        trainer.learn = self.record  # type: ignore[method-assign]

    def record(self, model: nn.Module, records: list[Record]) -> Tensor:
        self.models.append(copy.deepcopy(self.trainer.vlm.model).eval())
        loss = self.learn(model, records)
        self.experiences.append(self.trainer.experience)
        return loss

    def difference(self, step: int, weights: int) -> float:
        """|log-prob of the weights with so many updates - of the sampler|, the mean over a step's tokens."""
        experience = self.experiences[step]
        vlm, rollout = replace(self.trainer.vlm, model=self.models[weights]), experience.rollout
        with torch.no_grad():
            logp_NT, _ = completion_logprobs(
                vlm, experience.prompts, rollout.completion_ids_NT, rollout.mask_NT, temperature=1.0
            )
        return float((logp_NT - rollout.logp_NT)[rollout.mask_NT].abs().mean())


def test_each_step_trains_on_what_weights_one_update_older_drew(start: Start, phantoms: Path, tmp_path: Path) -> None:
    server, other = start(), start()
    trainer = trainer_of(phantoms, tmp_path / "ahead", server, other)
    watched = Watched(trainer)
    trainer.run()
    for step in range(5):
        drawn_by = max(0, step - 1)
        assert watched.difference(step, drawn_by) < 1e-5
        if step:
            assert watched.difference(step, step) > 1e-3
    rows = read_jsonl(tmp_path / "ahead" / "completions.jsonl")
    assert [row["weights_step"] for row in rows] == [step for step in (0, 0, 1, 2, 3) for _ in range(12)]
    log = [row for row in read_jsonl(tmp_path / "ahead" / "log.jsonl") if "reward" in row]
    assert [row["rollout_lag"] for row in log] == [0, 1, 1, 1, 1]
    assert all(row["server_difference"] < 1e-5 and row["wait_seconds"] >= 0 for row in log[:-1])
    assert [row["rollout_difference"] > 1e-3 for row in log] == [False, True, True, True, True]
    waiting = trainer_of(phantoms, tmp_path / "waiting", server, **{"rollout.ahead": 0})
    waiting.run()
    asked = [row["id"] for row in read_jsonl(tmp_path / "waiting" / "completions.jsonl")]
    assert asked == [row["id"] for row in rows], "the same questions in the same order"


def test_the_next_step_is_sampled_while_this_one_trains(start: Start, phantoms: Path, tmp_path: Path) -> None:
    """A server that answers the second step's prompts only once the first one's backward pass has begun."""
    server = start()
    trainer = trainer_of(phantoms, tmp_path, server, **{"optimizer.steps": 2})
    training, update = threading.Event(), trainer._update
    in_time: list[bool] = []

    def begun(model: nn.Module, experience: Any) -> Tensor:
        training.set()
        return update(model, experience)

    trainer._update = begun  # type: ignore[method-assign]

    def fault(number: int) -> None:
        in_time.append(number <= 4 or training.wait(120))

    server.fault = fault
    trainer.run()
    assert in_time == [True] * 8


def test_a_stopped_run_trains_on_what_was_sampled_for_it(start: Start, phantoms: Path, tmp_path: Path) -> None:
    """The checkpoint of step 2 holds step 3's completions, by the weights before step 2's update."""
    server, settings = start(), {"log.save_every": 2, "draws.exchanged_images": 0.5}
    trainer_of(phantoms, tmp_path / "whole", server, **settings).run()
    stopped = trainer_of(phantoms, tmp_path / "stopped", server, **settings)
    stopped.add_callback(StopAfter())
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert (tmp_path / "stopped" / "checkpoint-2" / "ahead.json").is_file()
    trainer_of(phantoms, tmp_path / "stopped", server, **settings).run()
    for name in ("completions.jsonl", "log.jsonl"):
        whole, resumed = (
            [{key: value for key, value in row.items() if "second" not in key and "runtime" not in key} for row in rows]
            for rows in (read_jsonl(tmp_path / folder / name) for folder in ("whole", "stopped"))
        )
        assert whole == resumed


def test_lag_is_no_stale_server_and_a_stale_server_is_found(start: Start, phantoms: Path, tmp_path: Path) -> None:
    """From update 6 on the policy moves by much more, and what it is apart from its sampler; that alarms nobody."""

    def run(folder: Path, server: FakeVLLM, reads_until: int) -> None:
        trainer = trainer_of(phantoms, folder, server, **{"optimizer.steps": 8})
        learn = trainer.learn

        def quick_and_stale(model: nn.Module, records: list[Record]) -> Tensor:
            server.reads_weights = trainer.state.global_step < reads_until
            for group in cast(Any, trainer.optimizer).param_groups:
                group["lr"] = 1e-6 if trainer.state.global_step < 5 else 3e-4
            return learn(model, records)

        trainer.learn = quick_and_stale  # type: ignore[method-assign]
        trainer.run()

    run(tmp_path / "fresh", start(), reads_until=8)
    apart = [row["rollout_difference"] for row in read_jsonl(tmp_path / "fresh" / "log.jsonl") if "reward" in row]
    assert min(apart[6:]) > max(LEAST_MISMATCH, MAX_GROWTH * statistics.median(apart[:5]))
    with pytest.raises(MedR1Error, match=r"nats a token off the policy.s"):
        run(tmp_path / "stale", start(), reads_until=6)
    rows = read_jsonl(tmp_path / "stale" / "completions.jsonl")
    assert rows[-1]["step"] == 7, "nothing that it drew by older weights is learned from"


def test_what_goes_wrong_beside_the_training_is_one_line(
    start: Start, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that dies while a step trains; and a reward that raises while a server does not answer."""
    server = start()
    trainer = trainer_of(phantoms, tmp_path / "dead", server)
    monkeypatch.setattr(rollouts_vllm, "WAIT", 0.0)
    server.fault = lambda number: server.kill() if number > 4 else None
    with pytest.raises(MedR1Error, match="no vLLM for 0 seconds") as error:
        trainer.run()
    assert "\n" not in str(error.value) and trainer.state.global_step == 0
    server.start()
    answer = threading.Event()
    server.fault = lambda number: 503 if number > 8 and answer.wait(120) else None
    server.asked.clear()
    trainer = trainer_of(phantoms, tmp_path / "raises", server, **{"grpo.rewards": {"test_ahead:raises_later": 1.0}})
    with pytest.raises(MedR1Error, match=r"step 2: .*on purpose"):
        trainer.run()
    waiting = [thread for thread in threading.enumerate() if "process_request" not in thread.name]
    assert all(thread.daemon for thread in waiting if thread is not threading.main_thread()), "which ends with us"
    answer.set()


CALLS: list[int] = []


def raises_later(reply: str, record: Record, mode: str) -> float:
    CALLS.append(1)
    if len(CALLS) > 12:
        raise RuntimeError("on purpose")
    return len(CALLS) % 3


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"rollout.engine": "local"}, "rollout.engine = vllm"),
        ({"draws.redraws": 1}, "draws.redraws"),
        ({"draws.curriculum": [0.5]}, "draws.curriculum"),
        ({"grpo.num_iterations": 2}, "grpo.num_iterations"),
        ({"grpo.rewards": {"image_margin": 1.0}}, "image_margin"),
        ({"rollout.ahead": 2}, "less than or equal to 1"),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(overrides: dict[str, object], line: str) -> None:
    with pytest.raises(MedR1Error, match=line) as error:
        load_config(overrides={"rollout.engine": "vllm", "rollout.ahead": 1} | overrides)
    assert "\n" not in str(error.value)
