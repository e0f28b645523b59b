"""What tests/test_colocate.py has done in the environment of vLLM: one engine, and a policy that changes under it.

python tests/colocate_worker.py DATA OUT.json
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medr1.config import load_config
from medr1.data.images import load_image
from medr1.data.parts import load_parts
from medr1.data.prompts import build_messages
from medr1.data.records import Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation import engines
from medr1.policy.adapters import add_lora
from medr1.policy.encoding import encode_prompts
from medr1.policy.pixels import limit_pixels
from medr1.policy.rollouts_colocate import ColocatedVLLM
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM, load_vlm

SAMPLING: dict[str, Any] = {"num_completions": 4, "max_new_tokens": 24, "temperature": 0.7, "seed": 3}


def killing_reward(reply: str, record: Record, mode: str) -> float:
    """Ends the process in step 4 at once, the first time; no weights lie anywhere but in checkpoints."""
    out = Path(os.environ["MEDR1_TEST_RUN"])
    weights = {path.parent.name for path in out.rglob("*.safetensors")}
    assert weights <= {"checkpoint-2", "checkpoint-4", "checkpoint-6"}, weights
    steps = len(read_jsonl(out / "completions.jsonl")) // 16 if (out / "completions.jsonl").exists() else 0
    if steps == 3 and not (out / "killed").exists():
        (out / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return len(reply) % 7 / 7


def disturb(model: nn.Module, size: float = 0.02) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * size)


def compare(vlm: VLM, engine: ColocatedVLLM, records: list[Record]) -> dict[str, Any]:
    """The largest |log-prob of the engine - of the policy| of a sampled token, whether one is banned, and replies."""
    images = [[load_image(path) for path in record.images] for record in records]
    prompts = encode_prompts(vlm, [build_messages(record, "think") for record in records], images)
    rollout = engine.sample(records, prompts, **SAMPLING)
    ids, mask = rollout.completion_ids_NT, rollout.mask_NT
    with torch.no_grad():
        logp, _ = completion_logprobs(vlm, prompts, ids, mask, temperature=SAMPLING["temperature"])
    return {
        "off": float((logp - rollout.logp_NT)[mask].abs().max()),
        "banned": bool(torch.isin(ids[mask], torch.tensor(vlm.banned_token_ids)).any()),
        "replies": rollout.texts,
    }


def refusal(vlm: VLM, engine: ColocatedVLLM, record: Record) -> str:
    try:
        compare(vlm, engine, [record])
    except MedR1Error as error:
        return str(error)
    return ""


def main(data: str, out: str) -> None:
    _, records = load_parts(load_config(overrides={"data.path": data}).data)
    records = records[:3]
    torch.manual_seed(0)
    vlm = load_vlm("tiny", dtype="float32")
    head = (
        vlm.core.lm_head.weight
    )  # the embeddings too; vision tokens as likely as those that replies begin and end with
    with torch.no_grad():
        usual = vlm.tokenizer.convert_tokens_to_ids(["<think>", "<|im_end|>"])
        head[vlm.banned_token_ids] = head[usual].mean(0) * 2
    engine = ColocatedVLLM(vlm, mode="think", dtype="float32", memory=0.3)
    state, threads = torch.get_rng_state(), torch.set_num_threads
    told: dict[str, Any] = {"first": compare(vlm, engine, records)}
    told["untouched"] = [torch.equal(state, torch.get_rng_state()), torch.set_num_threads is threads]
    told["again"] = compare(vlm, engine, records)
    how: dict[str, Any] = {"mode": "think", "max_new_tokens": 12}
    told["check"] = engines.compare(vlm, records, lambda *asked: engine.greedy(*asked, 12), **how)
    told["stale"], told["pushed"] = [], []
    for step in range(2):
        disturb(vlm.model)
        told["stale"].append(compare(vlm, engine, records))
        engine.push(step)
        told["pushed"].append(compare(vlm, engine, records))
    engine.vlm = vlm = add_lora(vlm, rank=4, alpha=16, targets="both")
    disturb(vlm.model, 0.1)
    before = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
    told["stale"].append(compare(vlm, engine, records))
    engine.push(2)
    told["pushed"].append(compare(vlm, engine, records))
    told["kept"] = all(torch.equal(weight, before[name]) for name, weight in vlm.model.state_dict().items())
    told["long"] = refusal(vlm, engine, records[0].model_copy(update={"question": "Which of these is it? " * 900}))
    limit_pixels(vlm.processor, vlm.name, min_pixels=168 * 168, max_pixels=168 * 168)  # the engine has the old limits
    told["other"] = refusal(vlm, engine, records[1])
    engine.close()
    Path(out).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
