"""Option probabilities against their slow definition: one unpadded call of the model per spelling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vlms import FAMILIES, picture, tiny_vlm

from medr1.data.answers import extract_answer
from medr1.data.prompts import build_messages
from medr1.data.records import LETTERS, Record
from medr1.errors import MedR1Error
from medr1.evaluation.confidence import AFTER_REASONING, ANSWERS, continued, option_logprobs, reasoning_of, spellings
from medr1.policy.encoding import PromptBatch, encode_prompts
from medr1.policy.vlm import VLM

IMAGES = [[picture(1)], [picture(2, 112, 84), picture(3, 56, 56)], []]
OPTIONS = [("Cyst", "Lung cyst"), ("B", "A", "2 cm"), ("Yes", "No", "yes", "Not sure")]
REASONING = ["A bright ring, so <answer>B</answer>.", None, "I see\n\nnothing"]


def make_records() -> list[Record]:
    return [
        Record(
            id=f"r{place}",
            images=tuple(f"{image}.png" for image in range(len(images))),
            question="Which finding" + " really" * place + "?",
            options=options,
            answer="A",
            modality="CT",
            question_type="Disease Diagnosis",
            source="made",
            group=f"g{place}",
        )
        for place, (images, options) in enumerate(zip(IMAGES, OPTIONS, strict=True))
    ]


@pytest.mark.parametrize(
    ("reply", "reasoning"),
    [
        ("<think> A ring. </think><answer>B</answer>", " A ring. "),
        ("A ring.</think><answer>B</answer>", "A ring."),  # a template that opens the tag itself
        ("A ring.<answer>B</answer>", "A ring."),
        ("<think>A ring.<answer>B</answer>", "A ring."),  # not its own answer
        ("<think>A ring, and", "A ring, and"),  # cut off
        ("<answer>B</answer>", ""),
        ("It is B, a ring.", ""),
    ],
)
def test_the_reasoning_of_a_reply(reply: str, reasoning: str) -> None:
    assert reasoning_of(reply) == reasoning


def encoded(vlm: VLM, records: list[Record], mode: str) -> PromptBatch:
    return encode_prompts(vlm, [build_messages(record, mode) for record in records], IMAGES[: len(records)])


def plainly(vlm: VLM, prompt: PromptBatch, options: tuple[str, ...], before: str) -> torch.Tensor:
    """The definition: the probability of each spelling from a call of its own, added up by option, normalised."""
    mass = torch.zeros(len(options), dtype=torch.float64)
    seen = set()
    for answer in AFTER_REASONING if before else ANSWERS:
        for letter, option in zip(LETTERS, options, strict=False):
            for content in (letter, f"{letter}) {option}", option):
                text = answer.format(content)
                read = extract_answer(text, options).letter
                ids = vlm.tokenizer(before + text)["input_ids"]
                if read is None or tuple(ids) in seen:
                    continue
                seen.add(tuple(ids))
                whole = torch.cat([prompt.input_ids_BP[0], torch.tensor(ids)])[None]
                kinds = {"mm_token_type_ids": (whole == vlm.core.config.image_token_id).int()} if prompt.vision else {}
                with torch.no_grad():
                    logits = vlm.model(input_ids=whole, **prompt.vision, **kinds, use_cache=False).logits[0]
                logits[:, vlm.banned_token_ids] = -torch.inf
                logp = logits[-len(ids) - 1 : -1].double().log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])
                mass[LETTERS.index(read)] += logp.sum().exp()
    return (mass / mass.sum()).log()


@pytest.mark.parametrize("mode", ["think", "no-think"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_call_for_each_spelling(family: str, mode: str) -> None:
    vlm = tiny_vlm(family, dtype=torch.float64)
    records = make_records()
    prompts = encoded(vlm, records, mode)
    reasoning = REASONING if mode == "think" else None
    found = option_logprobs(vlm, prompts, records, mode=mode, reasoning=reasoning)
    for place, (record, logp) in enumerate(zip(records, found, strict=True)):
        before = f"<think>{REASONING[place] or ''}</think>" if mode == "think" else ""
        expected = plainly(vlm, prompts.select([place]), record.options, before)
        assert logp.dtype == torch.float64
        torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
        assert expected.exp().max() < 0.999, "the comparison can fail"


def test_batch_gives_what_single_records_give() -> None:
    vlm = tiny_vlm("qwen2_vl")
    records = make_records()
    prompts = encoded(vlm, records, "think")
    together = option_logprobs(vlm, prompts, records, mode="think", reasoning=REASONING)
    for place, logp in enumerate(together):
        alone = option_logprobs(
            vlm, prompts.select([place]), [records[place]], mode="think", reasoning=[REASONING[place]]
        )
        torch.testing.assert_close(logp, alone[0], atol=1e-5, rtol=0)
        assert logp.exp().sum().item() == pytest.approx(1)


def test_reasoning_counts_and_none_of_it_is_an_empty_text() -> None:
    vlm = tiny_vlm("qwen2_vl")
    records = make_records()
    prompts = encoded(vlm, records, "think")
    with_it, without, empty, silent = (
        option_logprobs(vlm, prompts, records, mode="think", reasoning=reasoning)
        for reasoning in (REASONING, [None] * 3, [""] * 3, None)
    )
    torch.testing.assert_close(without, empty, atol=0, rtol=0)
    torch.testing.assert_close(without, silent, atol=0, rtol=0)
    assert (with_it[0] - without[0]).abs().max() > 1e-3


def test_gradient_reaches_the_pixels_and_is_the_slope() -> None:
    vlm = tiny_vlm("qwen2_vl", dtype=torch.float64)
    records = make_records()[:2]
    prompts = encoded(vlm, records, "no-think")
    pixels = prompts.vision["pixel_values"].double().requires_grad_()
    prompts.vision["pixel_values"] = pixels
    option_logprobs(vlm, prompts, records, mode="no-think")[1][0].backward()
    gradient = pixels.grad
    first = int(prompts.vision["image_grid_thw"][0].prod())
    assert gradient[:first].abs().max() == 0, "of the other record"
    assert gradient[first:].abs().max() > 1e-6
    step = 1e-3 * gradient / gradient.norm()

    def value(at: torch.Tensor) -> float:
        prompts.vision["pixel_values"] = at
        return option_logprobs(vlm, prompts, records, mode="no-think")[1][0].item()

    with torch.no_grad():
        slope = (value(pixels + step) - value(pixels - step)) / 2e-3
    assert slope == pytest.approx(gradient.norm().item(), rel=0.02)


def test_continued_prompts_are_the_longer_prompts() -> None:
    """Against the processor itself, given the text with its continuation."""
    vlm = tiny_vlm("qwen2_vl")
    prompts = encoded(vlm, make_records(), "think")
    texts = ["<think>x</think>", "", "yes"]
    longer = continued(vlm, prompts, [vlm.tokenizer(text)["input_ids"] for text in texts])
    for place, text in enumerate(texts):
        alone, before = longer.select([place]), prompts.select([place])
        assert alone.attention_mask_BP.all()
        assert vlm.tokenizer.decode(alone.input_ids_BP[0]) == vlm.tokenizer.decode(before.input_ids_BP[0]) + text
        added = alone.input_ids_BP.shape[1] - before.input_ids_BP.shape[1]
        assert alone.next_position_B == before.next_position_B + added
        assert (alone.position_ids_ABP[:, 0, : -added or None] == before.position_ids_ABP[:, 0]).all()


def test_spellings_by_hand() -> None:
    assert spellings(("Cyst", "B"), ANSWERS[:1]) == {
        "<answer>A</answer>": 0,
        "<answer>A) Cyst</answer>": 0,
        "<answer>Cyst</answer>": 0,
        "<answer>B</answer>": 1,
        "<answer>B) B</answer>": 1,
    }
    # "A" stands for the first option, whatever the second one's text is, and "B) A" names two.
    assert spellings(("Cyst", "A"), ANSWERS[:1])["<answer>A</answer>"] == 0
    shared = spellings(("Yes", "yes"), ANSWERS[:1])
    assert shared["<answer>yes</answer>"] == 0
    assert shared["<answer>B) yes</answer>"] == 1
    assert spellings(("x</answer>", "y"), ANSWERS[:1])["<answer>A</answer>"] == 0


@settings(max_examples=50)
@given(st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=26))
def test_spellings_are_read_as_their_option_and_each_option_has_some(options: list[str]) -> None:
    found = spellings(tuple(options), AFTER_REASONING)
    assert set(found.values()) == set(range(len(options)))
    for text, option in found.items():
        assert extract_answer(text, options).letter == LETTERS[option]
        assert extract_answer(f"<think>not {LETTERS[0]}</think>{text}", options).letter == LETTERS[option]
        assert not any(other != text and other.startswith(text) for other in found), "counted twice"


def test_what_cannot_be_scored_is_said() -> None:
    vlm = tiny_vlm("qwen2_vl")
    records = make_records()
    prompts = encoded(vlm, records, "no-think")
    with pytest.raises(MedR1Error, match="mode no-think has no reasoning before its answer"):
        option_logprobs(vlm, prompts, records, mode="no-think", reasoning=REASONING)
    open_question = records[0].model_copy(update={"options": ()})
    with pytest.raises(MedR1Error, match="record r0: an open question has no options"):
        option_logprobs(vlm, prompts.select([0]), [open_question], mode="no-think")


def test_tiny_prefers_what_it_writes() -> None:
    """The model in the package writes option texts after a space; its greedy answer is the most probable option."""
    from medr1.policy.rollouts import sample
    from medr1.policy.vlm import load_vlm

    vlm = load_vlm("tiny")
    records = [make_records()[0].model_copy(update={"options": ("CT", "MRI", "OCT")})]
    prompts = encode_prompts(vlm, [build_messages(records[0], "no-think")], [IMAGES[0]])
    reply = sample(vlm, prompts, num_completions=1, max_new_tokens=24, greedy=True, seed=0).texts[0]
    with torch.no_grad():
        logp = option_logprobs(vlm, prompts, records, mode="no-think")[0]
    assert LETTERS[int(logp.argmax())] == extract_answer(reply, records[0].options).letter
    assert math.exp(logp.max()) > 0.4
