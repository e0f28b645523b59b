"""Decoding of fixed shape: the tokens of plain decoding, by steps that a CUDA graph could hold."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_drafts import biased, rows
from test_families import NOT_SHARED, questions
from test_rollouts import bias
from tiny_families import BUILDERS
from tiny_vlms import FAMILIES, conversation, picture, ragged_prompts, tiny_vlm
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from medr1.config import load_config
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.policy import held, rollouts
from medr1.policy.attention import PROMPT_COLUMNS
from medr1.policy.drafts import Drafts
from medr1.policy.encoding import PromptBatch, encode_prompts
from medr1.policy.held import Step
from medr1.policy.rollouts import Rollout, sample
from medr1.policy.vlm import VLM
from medr1.training import GRPOTrainer

HELD = [*FAMILIES, *(name for name in BUILDERS if name not in ("qwen3_5", "qwen3_vl_moe", "lfm2_vl", *NOT_SHARED))]
WAITS = {"_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "masked_select", "unique_dim"}
"""What reads a number from a GPU, or copies one to it."""


class Recorded(TorchDispatchMode):
    """On a CPU what a CUDA graph does on a GPU: capturing changes nothing, and a replay does the very same operations
    over the very same memory, whatever Python has become since."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"{op} is not permitted when stream is capturing")
        for given, argument in zip(args, op._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((given, given.clone()))
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    @classmethod
    def capture(cls, step: Step) -> Step:
        with cls() as recorded:
            step()
        for tensor, before in reversed(recorded.before):
            tensor.copy_(before)
        return recorded.replay

    def replay(self) -> None:
        for op, args, kwargs, out in self.calls:
            again = op(*args, **kwargs)
            for old, new in zip(
                *(each if isinstance(each, (tuple, list)) else [each] for each in (out, again)), strict=True
            ):
                if isinstance(old, Tensor):
                    old.copy_(new)


@contextmanager
def holding(capture: Callable[[Step], Step] = Recorded.capture, span: int = 5) -> Iterator[None]:
    """Within this block steps are held on the CPU too, in short spans, by something in the place of a CUDA graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "holds", lambda vlm, max_new_tokens: vlm.not_held is None)
        patch.setattr(held, "capture", capture)
        patch.setattr(held, "SPAN", span)
        patch.setattr(held, "LOOK", 4)
        yield


def check_equal(vlm: VLM, prompts: PromptBatch, **settings: Any) -> Rollout:
    """Held and plain decoding give the same; the plain one."""
    settings = {"num_completions": 3, "max_new_tokens": 14, "seed": 5} | settings
    plain = sample(vlm, prompts, **settings)
    with holding():
        fixed = sample(vlm, prompts, **settings, drafts=Drafts())
    assert vlm.not_held is None and not fixed.guesses
    assert rows(fixed) == rows(plain)
    torch.testing.assert_close(fixed.logp_NT, plain.logp_NT, atol=1e-10, rtol=0)
    assert torch.equal(fixed.mask_NT, plain.mask_NT) and torch.equal(fixed.finished_N, plain.finished_N)
    assert fixed.texts == plain.texts
    return plain


@pytest.mark.parametrize("family", HELD)
def test_the_tokens_of_plain_decoding(family: str) -> None:
    """Ragged prompts with images in float64, sampled and greedy, to the end and with rows that stop early."""
    lengths = set()
    for stop_bias, greedy in ((0.0, False), (5.0, False), (9.0, True)):
        vlm = biased(tiny_vlm(family, dtype=torch.float64), stop_bias)
        plain = check_equal(vlm, encode_prompts(vlm, *questions(vlm)), greedy=greedy)
        lengths |= set(map(len, plain.tokens))
    assert len(lengths) > 1


def test_large_groups_shared_images_and_banned_tokens() -> None:
    """16 completions lie in two caches; two prompts ask about one image; the model would write only vision tokens."""
    vlm = tiny_vlm("qwen2_vl", dtype=torch.float64)
    image = picture(1)
    prompts = encode_prompts(vlm, [conversation(text, 1) for text in ("What?", "And where is it?")], [[image]] * 2)
    assert rollouts.read_shared(vlm, prompts)
    with bias(vlm, vlm.banned_token_ids, 50.0):
        plain = check_equal(vlm, prompts, num_completions=16, temperature=0.7)
    assert not set(vlm.banned_token_ids) & set(plain.completion_ids_NT.flatten().tolist())


def test_on_step_sees_each_token_and_may_end_the_call() -> None:
    vlm = biased(tiny_vlm("qwen2_vl"), 3.0)
    settings: dict[str, Any] = {"num_completions": 2, "max_new_tokens": 14, "seed": 1}
    told: list[list[Tensor]] = [[], []]
    sample(vlm, ragged_prompts(vlm), **settings, on_step=told[0].append)
    with holding():
        sample(vlm, ragged_prompts(vlm), **settings, on_step=told[1].append)
    assert len(told[0]) > 3
    assert all(torch.equal(plain, fixed) for plain, fixed in zip(*told, strict=True))


def test_what_cannot_be_held_is_said_once_and_decoded_plainly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A capture that fails in the middle of a completion; layers with a state; short replies; a CPU."""

    def fails(step: Step) -> Step:
        raise RuntimeError("operation not permitted\nmore")

    vlm = tiny_vlm("qwen2_vl", dtype=torch.float64)
    settings: dict[str, Any] = {"num_completions": 2, "max_new_tokens": 14, "seed": 1}
    plain = sample(vlm, ragged_prompts(vlm), **settings)
    assert not held.holds(vlm, 256)
    with holding(fails):
        fixed = sample(vlm, ragged_prompts(vlm), **settings)
        again = sample(vlm, ragged_prompts(vlm), **settings)
    assert rows(fixed) == rows(plain) == rows(again)
    assert capsys.readouterr().err.count("not held in a CUDA graph (operation not permitted); each") == 1
    state, other = tiny_vlm("qwen3_5"), tiny_vlm("qwen2_vl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(VLM, "device", torch.device("cuda", 1))
    assert not held.holds(other, 256), "a graph is of the current device"
    monkeypatch.setattr(VLM, "device", torch.device("cuda", 0))
    assert held.holds(other, 256) and not held.holds(other, 8)
    assert not held.holds(state, 256) and not held.holds(state, 256)
    assert capsys.readouterr().err.count("(layers that carry a state)") == 1


def test_nothing_is_compiled_after_the_first_two_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """GRPO with prompts of several lengths, each step of decoding in one graph without a number of its own."""
    counter, before, lengths = CompileCounter(), [], set()

    def capture(step: Step) -> Step:
        before.append(counter.frame_count)
        return torch.compile(step, backend=counter, fullgraph=True, dynamic=False)

    def decode(vlm: VLM, prompts: PromptBatch, *more: Any) -> Any:
        lengths.add(prompts.input_ids_BP.shape[1])
        return held.decode_held(vlm, prompts, *more)

    monkeypatch.setattr(rollouts, "decode_held", decode)
    settings = {
        "data.path": str(write_phantoms(tmp_path / "phantoms", num_images=12, seed=1)),
        "data.test_fraction": 0.34,
        "rollout.num_completions": 2,
        "rollout.max_new_tokens": 6,
        "optimizer.steps": 4,
        "optimizer.prompts_per_step": 2,
    }
    config = load_config(overrides=settings)
    with holding(capture, span=256):
        GRPOTrainer(tiny_vlm("qwen2_vl"), config, *load_parts(config.data), tmp_path / "run").run()
    assert len(lengths) > 2 and len({-(-length // PROMPT_COLUMNS) for length in lengths}) == 1
    assert len(before) == 4, "each step holds one"
    assert 0 < before[2] == counter.frame_count
