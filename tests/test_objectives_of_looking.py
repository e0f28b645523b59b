"""Objectives that keep a policy looking: what they pay for, and what they no longer pay for."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_shared_prefix import completions, gradients
from tiny_vlms import conversation, picture, plain_logprobs, tiny_vlm
from torch import Tensor

from medr1.bases.tiny.build import rationale, reply_text
from medr1.data.datasets import load_records
from medr1.data.images import load_image
from medr1.data.phantoms import write_phantoms
from medr1.data.prompts import build_messages
from medr1.data.records import Record
from medr1.evaluation.confidence import option_logprobs, reasoning_of
from medr1.policy.encoding import PromptBatch, encode_prompts
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM, load_vlm
from medr1.training import looking
from medr1.training.looking import OtherImages, choices, consistency, deciding_tokens, image_margins, needs_image
from medr1.training.objective import above_chance, perception_term


def record(name: str, answer: str, options: tuple[str, ...] = ("Cyst", "Scar"), **fields: object) -> Record:
    defaults = {
        "images": (Path(f"{name}.png"),),
        "question": "What is it?",
        "modality": "OCT",
        "question_type": "Disease Diagnosis",
        "source": "made",
        "group": name,
    }
    return Record.model_validate({**defaults, "id": name, "options": options, "answer": answer, **fields})


RECORDS = [
    record("one", "A"),
    record("two", "B"),
    record("three", "A", ("Scar.", "cyst")),
    record("far", "B", modality="MRI"),
    record("other", "A", ("Cyst", "Fluid")),
    record("stem", "B", question="Was it there before?"),
]


def test_exchanged_images_come_with_their_own_right_answer() -> None:
    others = OtherImages(RECORDS)
    right = {"one.png": "Cyst", "two.png": "Scar", "three.png": "Scar"}
    drawn: Counter[str] = Counter()
    for step in range(400):
        asked = others.exchanged(RECORDS[0], 1.0, f"0 {step}")
        assert (asked.id, asked.options, asked.group) == ("one", ("Cyst", "Scar"), "one")
        assert asked.gold == right[asked.images[0].name]
        drawn[asked.gold] += 1
    assert abs(drawn["Cyst"] - 200) < 50, "no option is right more often than another, however often it is in the data"
    assert {others.exchanged(RECORDS[2], 1.0, str(step)).gold for step in range(20)} == {"Scar.", "cyst"}, "as worded"


def test_an_image_of_another_modality_is_shown_where_the_own_has_no_other_answer() -> None:
    others = OtherImages(RECORDS)
    assert {others.exchanged(RECORDS[3], 1.0, str(step)).images[0].name for step in range(60)} == {
        "one.png", "two.png", "three.png", "far.png"
    }  # fmt: skip


def test_exchanges_are_a_share_and_the_same_whenever_drawn() -> None:
    others, again = OtherImages(RECORDS), OtherImages(RECORDS[::-1][::-1])
    drawn = [others.exchanged(RECORDS[0], 0.4, str(step)) for step in range(500)]
    assert drawn == [again.exchanged(RECORDS[0], 0.4, str(step)) for step in range(500)]
    # Of those that are exchanged half show a scar, and the others the only cyst there is, their own.
    assert 60 < sum(one != RECORDS[0] for one in drawn) < 140
    assert all(others.exchanged(RECORDS[0], 0.0, str(step)) is RECORDS[0] for step in range(50))


def test_what_has_no_other_answer_is_asked_as_it_is() -> None:
    others = OtherImages(RECORDS)
    alone = record("open", "Cyst", ())
    twice = record("twice", "A", ("Cyst", "cyst "))
    for one in (RECORDS[4], RECORDS[5], alone, twice, record("text", "A", images=())):
        assert others.exchanged(one, 1.0, "0") is one


def test_the_other_image_is_one_to_which_the_answer_is_wrong() -> None:
    others = OtherImages(RECORDS)
    assert {others.control(RECORDS[0], str(step)).images[0].name for step in range(40)} == {"two.png", "three.png"}
    assert {others.control(RECORDS[3], str(step)).images[0].name for step in range(40)} == {"one.png"}, (
        "of any modality"
    )
    # Nobody else was asked about cyst or fluid: an image of the modality whose own answer is no cyst.
    names = {others.control(RECORDS[4], str(step)).images[0].name for step in range(80)}
    assert names == {"two.png", "three.png", "stem.png"}
    # All eyes are eyes: what the modality gives away is right of each of its images.
    eyes = [record(name, "A", ("Eye", name), question_type="Anatomy Identification") for name in ("Foot", "Hand")]
    lung = record("lung", "B", ("Eye", "Lung"), question_type="Anatomy Identification", modality="CT")
    assert OtherImages([*eyes, lung]).control(eyes[0], "0").images == lung.images
    assert OtherImages(RECORDS[:1]).control(RECORDS[0], "0") is None
    assert others.control(record("text", "A", images=()), "0") is None


def test_a_question_that_its_text_answers_is_drawn_less() -> None:
    """19 of 20 right options stand first, and their text is no help: 0.25 / 0.95 and 0.25 / (0.05 / 3), nearly."""
    texts = ("Cyst", "Scar", "Fluid", "Drusen")
    turned = [texts[turn:] + texts[:turn] for turn in range(4)]
    records = [
        record(str(n), "B" if n % 20 == 0 else "A", turned[n % 4 if n % 20 else n // 20 % 4]) for n in range(2000)
    ]
    weights = needs_image(records)
    first = [weight for weight, one in zip(weights, records, strict=True) if one.answer == "A"]
    other = [weight for weight, one in zip(weights, records, strict=True) if one.answer != "A"]
    assert max(first) < 0.4 and min(other) > 3
    assert 0.2 < sum(first) / sum(weights) < 0.5, "of what is drawn the shortcut tells about as many as chance"
    balanced = [record(str(n), "ABCD"[n // 4 % 4], turned[n % 4]) for n in range(1600)]
    assert all(abs(weight - 1) < 0.25 for weight in needs_image([*balanced, record("open", "Cyst", ())]))


def test_terms_by_hand() -> None:
    own = torch.tensor([[0.5, 0.8], [0.5, 0.8]], dtype=torch.float64).log()
    other = torch.tensor([[0.25, 0.8], [1e-9, 0.8]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True], [True, False]])
    # exp(d) - d - 1: of halved odds 0.5 + 0.6931 - 1, of equal ones 0; the second row's 19.03 is cut at 2.
    term, kl = perception_term(own, other, mask, cap=2.0, denominator=2)
    assert float(term) == pytest.approx((0.19315 / 2 + 2) / 2, abs=1e-5)
    assert kl == pytest.approx(0.19315 + 19.0301, abs=1e-3)
    # Shares: 0.6 of four, 0.3 of two (below chance), one of an open question; the fourth says nothing that can be read.
    options = torch.tensor([[0.06, 0.02, 0.01, 0.01], [0.3, 0.7, 9, 9], [9, 9, 9, 9], [0.9, 0.1, 9, 9]]).double().log()
    offered = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4, [True, True, False, False]])
    term, rows = above_chance(options, offered, torch.tensor([0, 0, -1, -1]), denominator=4)
    assert (float(term), rows) == (pytest.approx(math.log(0.6 / 0.25) / 4), 1)


def driven(steps: int, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """KL of free log-probs of two tokens (N, T) = (1, 2) after some steps down a loss."""
    own, other = (torch.full((1, 2), -1.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([own, other], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(own.clamp(max=0), other.clamp(max=0) + 1e-3).backward()
        optimizer.step()
    return perception_term(own, other, torch.ones(1, 2), cap=1e9, denominator=1)[0].detach()


def test_hack_a_kl_that_grows_without_end_ends_at_the_cap() -> None:
    def perception(cap: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda own, other: -perception_term(own, other, torch.ones(1, 2), cap=cap, denominator=1)[0]

    assert driven(100, perception(1e9)) > 1e6
    assert driven(100, perception(2.0)) == driven(50, perception(2.0)) < 10

    def chance(own: Tensor, other: Tensor) -> Tensor:
        offered, sure = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0.5, 0.0]]).double()
        return above_chance(other + sure, offered, torch.tensor([0]), denominator=1)[0]

    assert driven(100, chance) == driven(50, chance) < 1


def test_hack_an_answer_that_is_no_option() -> None:
    """A policy of four options and one reply that is none, under another image: held to chance by its own probability
    an answer gives way to what cannot be read; by its share among the options it gives way to these."""

    def gained(term: Callable[[Tensor], Tensor]) -> float:
        """By what is no option against the mean option, in nats."""
        logits = torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=1.0)
        for _ in range(50):
            optimizer.zero_grad()
            logp = logits.log_softmax(0)
            often = logp.detach().exp()  # each answer that it may give, as often as it gives it
            torch.stack([often[said] * term(logp[:4].roll(-said)) for said in range(4)]).sum().backward()
            optimizer.step()
        logits = logits.detach()
        assert float(logits.softmax(0)[:4].max()) < 0.28, "either way no answer is above chance in the end"
        return float(logits[4] - logits[:4].mean()) + 0.5

    def alone(options: Tensor) -> Tensor:
        return (options[0] + math.log(4)).clamp(min=0)

    def among(options: Tensor) -> Tensor:
        offered = torch.ones(1, 4, dtype=torch.bool)
        return above_chance(options[None], offered, torch.tensor([0]), denominator=1)[0]

    assert gained(alone) > 0.3 and abs(gained(among)) < 1e-9


def test_gradients_of_both_terms_equal_the_plain_passes_in_float64() -> None:
    vlm = tiny_vlm("qwen2_vl", dtype=torch.float64)
    own, other = (
        encode_prompts(vlm, [conversation("What?", 1)] * 2, [[picture(seed + place, 56)] for place in range(2)])
        for seed in (0, 10)
    )
    ids, mask = completions(2 * 3)
    likely = torch.tensor([0, 1, -1], dtype=torch.long)

    def loss(own_NT: Tensor, other_NT: Tensor) -> Tensor:
        perception, _ = perception_term(own_NT, other_NT, mask, cap=0.01, denominator=6)
        options_NO = other_NT.sum(1).view(3, 2)  # as if each two completions were one reply's options
        above, rows = above_chance(options_NO, torch.ones(3, 2, dtype=torch.bool), likely, denominator=6)
        assert rows
        return above - 0.5 * perception

    packed = gradients(vlm, loss(*(completion_logprobs(vlm, prompts, ids, mask)[0] for prompts in (own, other))))
    plain = gradients(vlm, loss(*(plain_logprobs(vlm, prompts, ids, mask) for prompts in (own, other))))
    assert plain.norm() > 1e-3 and (packed - plain).norm() / plain.norm() < 1e-6


# -- what a reply says decides, on the tiny base --------------------------------------------------------------


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load_vlm("tiny", dtype="float32")


@pytest.mark.parametrize(
    ("reply", "decides"),
    [
        ("<think>The image is OCT. There is a Scar, no Cyst.</think><answer> Scar</answer>", "Scar"),
        ("<think>The image is OCT.</think><answer> Scar</answer>", "Scar"),
        ("<think>So it is B.</think><answer>B</answer>", "B"),
        ("<think>A Scarred lesion.</think><answer>B) Scar</answer>", "B) Scar"),
        ("<think>The image is OCT.</think><answer>Brain</answer>", ""),
    ],
)
def test_tokens_that_decide(vlm: VLM, reply: str, decides: str) -> None:
    ids = vlm.tokenizer(reply, add_special_tokens=False)["input_ids"]
    [mask] = deciding_tokens(vlm, [ids], [RECORDS[0]])
    assert vlm.tokenizer.decode([token for token, decided in zip(ids, mask, strict=True) if decided]).strip() == decides
    first = reply.find("Scar,") if "Scar," in reply else reply.rfind(decides)
    if decides:
        before = vlm.tokenizer.decode(ids[: int(mask.int().argmax())])
        assert abs(len(before) - first) <= 1, "and there it stands"


@pytest.mark.parametrize(
    ("reply", "rows"),
    [
        (
            "<think>The image is OCT. There is a Scar, no Cyst.</think><answer> Scar</answer>",
            ["<think>The image is OCT. There is a {}"],
        ),
        ("<think>It shows a scar.</think><answer> Scar</answer>", ["<think>It shows a {:lower}"]),
        ("<think>The image is OCT.</think><answer>B</answer>", ["<think>The image is OCT.</think><answer>{:letter}"]),
        ("<think>So.</think><answer>B) Scar</answer>", ["<think>So.</think><answer>{:letter}) {}"]),
        ("<think>The image is OCT.</think><answer>Brain</answer>", []),
    ],
)
def test_what_a_reply_could_have_said(vlm: VLM, reply: str, rows: list[str]) -> None:
    """Its beginning and each option as it says its own; the own one in the very tokens of the reply."""
    two, four = RECORDS[1], record("four", "B", ("Cyst", "Scar", "Fluid", "Drusen"))
    ids = vlm.tokenizer(reply, add_special_tokens=False)["input_ids"]
    said = choices(vlm, [ids, ids], [four, two])
    assert said.ids_KT.shape == said.mask_KT.shape
    assert said.chosen_N.tolist() == ([1, 1] if rows else [-1, -1])
    assert said.mask_KT.any(1).tolist() == ([True] * 6 + [False] * 2 if rows else [False] * 2)
    for row, mask, letter, option in zip(said.ids_KT, said.mask_KT, "ABCD", four.options, strict=False):
        for shown in rows:
            written = shown.replace("{:letter}", letter).replace("{:lower}", option.lower()).replace("{}", option)
            length = 1 + int(mask.nonzero()[-1])
            assert vlm.tokenizer.decode(row[:length]) == written
            if letter == "B":
                assert row[:length].tolist() == ids[:length]
                assert torch.equal(mask[:length], deciding_tokens(vlm, [ids], [four])[0][:length])


@dataclass(frozen=True)
class Lesion:
    """A question about the disease in one phantom, another phantom of its modality with another disease, and what the
    first one shows."""

    record: Record
    other: Record
    facts: dict[str, str]

    def reply(self, **lies: str) -> str:
        """An honest reasoning but for lies, and the right option."""
        return reply_text("think", rationale(self.facts | lies), self.record.gold)


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> list[Lesion]:
    """Such as the base sees well, so that their rewards show what is paid for and not what it cannot see."""
    records = load_records(write_phantoms(tmp_path_factory.mktemp("phantoms"), num_images=48, seed=4))
    others = OtherImages(records)
    found = []
    for record in records:
        if record.question_type == "Disease Diagnosis" and (other := others.control(record, "0")):
            facts = {one.question_type: one.gold for one in records if one.images == record.images}
            found.append(Lesion(record, other, {str(name): text for name, text in facts.items()}))
    return found[::4]


def under(vlm: VLM, record: Record, shown: Record, texts: Sequence[str]) -> tuple[Tensor, list[list[int]], Tensor]:
    """Log-probs of replies where an image is shown, their tokens, and mask."""
    ids = [vlm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = max(map(len, ids))
    padded = torch.tensor([[*row, *[vlm.pad_token_id] * (length - len(row))] for row in ids])
    mask = torch.arange(length) < torch.tensor([[len(row)] for row in ids])
    prompts = encode_prompts(vlm, [build_messages(record, "think")], [[load_image(shown.images[0])]])
    with torch.no_grad():
        return completion_logprobs(vlm, prompts, padded, mask)[0], ids, mask


def margins(vlm: VLM, lesion: Lesion, texts: Sequence[str], *, guard: bool = True, swap: bool = False) -> list[float]:
    """`swap`: as if the other image were the question's own."""
    own, ids, mask = under(vlm, lesion.record, lesion.record, texts)
    other, *_ = under(vlm, lesion.record, lesion.other, texts)
    records = [lesion.record] * len(texts)
    decides = deciding_tokens(vlm, ids, records) if guard else mask
    return image_margins(texts, records, *((other, own) if swap else (own, other)), decides)


def mean(rows: Sequence[Sequence[float | None]]) -> list[float]:
    return [sum(value or 0.0 for value in column) / len(column) for column in zip(*rows, strict=True)]


def wrong_disease(lesion: Lesion) -> str:
    return next(option for option in lesion.record.options if option != lesion.record.gold)


def test_hack_a_reasoning_that_describes_and_an_answer_that_does_not_follow(vlm: VLM, lesions: list[Lesion]) -> None:
    def texts(lesion: Lesion) -> list[str]:
        return [lesion.reply(), lesion.reply(**{"Disease Diagnosis": wrong_disease(lesion)})]

    honest, hacked = mean([margins(vlm, lesion, texts(lesion), guard=False) for lesion in lesions])
    assert hacked > 0.75 * honest, "the margin of the whole reply is paid for decoration"
    honest, hacked = mean([margins(vlm, lesion, texts(lesion)) for lesion in lesions])
    assert hacked < 0.5 < 0.7 < honest, "that of the tokens that decide is paid for what the answer itself sees"
    honest, hacked = mean([consistency(vlm, texts(one), [one.record] * 2, 0) for one in lesions])
    assert hacked < 0.1 < 0.7 < honest


def test_hack_a_reasoning_bent_to_the_answer(vlm: VLM, lesions: list[Lesion]) -> None:
    """Each image is shown as the other's own: what is right by the text is described and is not there."""
    [honest] = mean([margins(vlm, lesion, [lesion.reply()]) for lesion in lesions])
    [hacked] = mean([margins(vlm, lesion, [lesion.reply()], swap=True) for lesion in lesions])
    assert hacked < 0.1 < 0.7 < honest


def read_as_it_stands(vlm: VLM, texts: Sequence[str], records: Sequence[Record]) -> list[float]:
    """What `consistency` would be with the options in their own order, and nothing taken off."""
    blind = [one.model_copy(update={"images": ()}) for one in records]
    prompts = encode_prompts(vlm, [build_messages(one, "think") for one in blind], [[]] * len(blind))
    with torch.no_grad():
        read = option_logprobs(vlm, prompts, blind, mode="think", reasoning=[reasoning_of(text) for text in texts])
    return [math.exp(row["ABCD".index(one.answer)]) for row, one in zip(read, records, strict=True)]


def test_hack_an_empty_reasoning_and_one_that_goes_by_the_order(vlm: VLM, lesions: list[Lesion]) -> None:
    """The base guesses the first option after a short reasoning; so does it as a reader."""
    unguarded, guarded = [], []
    for lesion in lesions:
        first = lesion.record.model_copy(update={"answer": "A"})
        short = reply_text("think", f"The image is {lesion.record.modality}.", first.gold)
        texts = [lesion.reply(), reply_text("think", "", lesion.record.gold), short]
        records = [lesion.record, lesion.record, first]
        unguarded.append(read_as_it_stands(vlm, texts, records))
        guarded.append(consistency(vlm, texts, records, 0))
    assert min(mean(unguarded)) > 0.2, "read with the options as they stood, and nothing taken off"
    honest, empty, by_order = mean(guarded)
    assert empty == 0 and by_order < 0.2 < 0.7 < honest


def test_hack_a_letter_named_in_the_reasoning(vlm: VLM, lesions: list[Lesion], monkeypatch: pytest.MonkeyPatch) -> None:
    named = [f"<think>The answer is {it.record.answer}.</think><answer>{it.record.answer}</answer>" for it in lesions]
    pairs = [[lesion.reply(), text] for lesion, text in zip(lesions, named, strict=True)]
    read = [consistency(vlm, pair, [it.record] * 2, 0) for it, pair in zip(lesions, pairs, strict=True)]
    paid = [margins(vlm, it, pair) for it, pair in zip(lesions, pairs, strict=True)]
    for honest, hacked in (mean(read), mean(paid)):
        assert hacked < 0.3 < 0.7 < honest

    def believes_letters(
        _: VLM, prompts: PromptBatch, records: Sequence[Record], *, mode: str, reasoning: Sequence[str]
    ) -> list[Tensor]:
        shares = torch.full((len(records), 4), 0.01)
        for row, text in enumerate(reasoning):
            if told := re.search(r"answer is ([A-D])", text):
                shares[row, "ABCD".index(told[1])] = 1
        return [*(shares / shares.sum(1, keepdim=True)).log()]

    monkeypatch.setattr(looking, "option_logprobs", believes_letters)
    records = [lesion.record for lesion in lesions]
    guarded = consistency(vlm, named, records, 0)
    monkeypatch.setattr(looking, "permuted", lambda record, seed: record)
    unguarded = consistency(vlm, named, records, 0)
    assert mean([[value] for value in unguarded])[0] > 0.9, "a reader that knows the options by their letters"
    assert mean([[value] for value in guarded])[0] < 0.3


def test_hack_the_shortcut_costs_where_it_would_be_said_of_any_image(vlm: VLM, lesions: list[Lesion]) -> None:
    """The base says the first option of any image after a short reasoning, and the disease of the one that shows it."""
    costs = []
    for lesion in lesions:
        short = reply_text("think", f"The image is {lesion.record.modality}.", lesion.record.options[0])
        texts = [lesion.reply(), short]
        ids = [vlm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        said = choices(vlm, ids, [lesion.record] * 2)
        prompts = encode_prompts(vlm, [build_messages(lesion.record, "think")], [[load_image(lesion.other.images[0])]])
        with torch.no_grad():
            logp_KT, _ = completion_logprobs(vlm, prompts, said.ids_KT, said.mask_KT)
        logp_NO, offered_NO = logp_KT.sum(1).view(2, 4), said.mask_KT.any(1).view(2, 4)
        each = [above_chance(logp_NO[[n]], offered_NO[[n]], said.chosen_N[[n]], denominator=1) for n in (0, 1)]
        costs.append([float(cost) for cost, _ in each])
    honest, hacked = mean(costs)
    assert honest < 0.1 and hacked > 1
