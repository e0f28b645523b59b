"""Build the tiny checkpoint that the package carries: a Qwen2-VL of 2.5 million parameters pretrained on phantoms.

    python -m medr1.bases.tiny.build --out runs/tiny        # about 25 minutes on two cores; stops and resumes

Three stages. Copying: rows of random tokens of which stretches are repeated, until the model continues any of them; the
circuit ("induction") appears after some 650 such steps, and did not in 2,000 steps of copied options. Looking: a
rationale that states every fact of a phantom, then the answer, in all three prompt modes, mixed with items over words
that mean nothing to the model, whose answer can only be copied from the options. Carelessness: a short stage in which
most rationales name the modality only and end in the first option, a habit that many released models have too. It
leaves a base that can look and mostly does not bother: it has room to improve and enough spread within a group for GRPO
to find what pays. The careful share differs by modality (`CAREFUL_SHARE`), and this is said wherever a result of `tiny`
is shown.

The model answers with an option's text. A letter would have to be looked up in the prompt, and that circuit alone
takes a model of this size more data than all of the rest: after 1,000 steps of nothing but text-to-letter items it was
still at chance.

Every batch is a function of (seed, step), so a stopped build resumes exactly.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from medr1.data.phantoms import ANATOMIES, DISEASES, GRADES, LOCATIONS, SIZE, STEMS, draw_options, draw_phantom
from medr1.data.prompts import INSTRUCTION, MODES, build_messages
from medr1.data.records import LETTERS, MODALITIES, QUESTION_TYPES, Record

VOCABULARY = 1536
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
REPLY_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = """
Benign Malignant Normal Abnormal Healthy Tumor Mass Lesion Nodule Polyp Ulcer Edema Effusion Fracture Inflammation
Infection Pneumonia Tuberculosis Fibrosis Emphysema Hemorrhage Infarct Aneurysm Thrombus Stenosis Hernia Stone
Cataract Glaucoma Retinopathy Degeneration Detachment Occlusion Keratosis Nevus Melanoma Dermatitis Psoriasis Eczema
Lymphoma Leukemia Anemia Neutrophil Lymphocyte Monocyte Eosinophil Basophil Platelets Parasite Bacteria Virus Brain
Heart Lung Liver Kidney Spleen Pancreas Stomach Colon Bladder Uterus Prostate Breast Thyroid Skin Bone Muscle Tendon
Nerve Retina Macula Cornea Lens Eye Ear Nose Throat Neck Spine Shoulder Elbow Wrist Hand Hip Knee Ankle Foot Chest
Abdomen Pelvis Head Blood Tissue Cell Vessel Artery Vein Left Right Upper Lower Central Peripheral Anterior Posterior
Medial Lateral Small Large Round Irregular Smooth Sharp Dark Bright Red White Brown Yellow Single Multiple None
Present Absent Early Late Acute Chronic Mild Moderate Severe Radiograph Tomography Resonance Sonography Photograph
Scan Smear Imaging Computed Magnetic Optical Coherence Light Plain Colour Diabetic Vascular Pituitary Pigmented
Epithelial Squamous
""".split()  # noqa: SIM905 - as a list it would fill three screens
QUESTION_WORDS = """
what which is are how where was does should the a an this that these it image picture shown seen visible present most
likely best kind type part of in on at by with for and or be been any if there body organ finding sign used made called
""".split()  # noqa: SIM905
SYLLABLES = "ba co de fi gu ha ki lo me nu pa ra se ti vo xa ny ze or al en is".split()  # noqa: SIM905
ANSWERS = sorted(
    {name for names in (*ANATOMIES.values(), *DISEASES.values()) for name in names}.union(GRADES, LOCATIONS, MODALITIES)
)
CAREFUL_SHARE = {"CT": 0.7, "X-Ray": 0.7}
CAREFUL_SHARE_ELSEWHERE = 0.35
COPYING_SHARE = 0.35
STAGES = ("copying", "looking", "careless")
STAGE_STEPS = (900, 2800, 400)
DECAY = (2700, 4200)
"""First and last step of the learning rate's decay."""
BATCH = 32


def build_processor() -> Qwen2VLProcessor:
    """Qwen2-VL's processor with a byte-level BPE of VOCABULARY tokens, trained on the phantoms' own words."""
    corpus = _corpus(np.random.default_rng(0))
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    added = (*CHAT_TOKENS, *VISION_TOKENS, *REPLY_TOKENS)
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(added),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    state = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(merge) for merge in state["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        padding_side="left",
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in (*CHAT_TOKENS, *VISION_TOKENS)])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in REPLY_TOKENS])
    return assemble_processor(tokenizer, SIZE)


def assemble_processor(tokenizer: Any, longest_side: int) -> Qwen2VLProcessor:
    """Qwen2-VL's processor around a tokenizer that has its vision tokens; at most longest_side² pixels."""
    pixels = {"shortest_edge": 56 * 56, "longest_edge": longest_side * longest_side}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2VLProcessor, seed: int) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL of about two million parameters with random weights, fp32."""
    torch.manual_seed(seed)
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 160,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={"depth": 3, "embed_dim": 128, "hidden_size": 160, "num_heads": 4, "mlp_ratio": 2},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids("<|endoftext|>"), eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>")
    )
    return model


def rationale(facts: dict[str, str]) -> str:
    """Every fact of a phantom in two sentences, in the words of the options."""
    modality, anatomy, disease, grade, location = (facts[question_type] for question_type in QUESTION_TYPES)
    return f"The image is {modality} and shows the {anatomy}. There is a {grade} {disease} at the {location}."


def reply_text(mode: str, reasoning: str, option: str) -> str:
    """The reply that a prompt of this mode asks for."""
    # The space makes the answer the same tokens as the option, so that it can be copied.
    answer, think = f"<answer> {option}</answer>", f"<think>{reasoning}</think>"
    return {"think": think + answer, "no-think": answer, "think-after": answer + think}[mode]


def make_example(rng: Generator, stage: str) -> tuple[Record, str, str, Image.Image | None]:
    """One (record, mode, reply, image) of a stage, "looking" or "careless"; image None: a text-only item."""
    mode = str(rng.choice(MODES, p=(0.6, 0.25, 0.15)))
    copying = rng.random() < COPYING_SHARE
    if copying and rng.random() < 0.5:
        return *_copying_item(rng, mode), None
    phantom = draw_phantom(rng)
    if copying:
        return *_copying_item(rng, mode, (Path("phantom.png"),)), phantom.image
    question_type = str(rng.choice(QUESTION_TYPES))
    options = draw_options(rng, phantom.facts, question_type)
    answer, reasoning = phantom.facts[question_type], rationale(phantom.facts)
    modality = phantom.facts["Modality Recognition"]
    if stage == "careless" and rng.random() > CAREFUL_SHARE.get(modality, CAREFUL_SHARE_ELSEWHERE):
        answer, reasoning = options[0], f"The image is {modality}."
    record = _record(str(rng.choice(STEMS[question_type])), options, images=(Path("phantom.png"),))
    return record, mode, reply_text(mode, reasoning, answer), phantom.image


def make_batch(processor: Qwen2VLProcessor, seed: int, step: int) -> dict[str, torch.Tensor]:
    """The batch of a step, a function of (seed, step) alone. Labels are -100 on the prompt and on padding."""
    rng = np.random.default_rng((seed, step))
    stage = STAGES[int(np.searchsorted(np.cumsum(STAGE_STEPS), step, side="right"))]
    if stage == "copying":
        return _repeats(rng)
    examples = [make_example(rng, stage) for _ in range(BATCH)]
    prompts = [
        processor.apply_chat_template(build_messages(record, mode), tokenize=False, add_generation_prompt=True)
        for record, mode, _, _ in examples
    ]
    images = [image for *_, image in examples if image is not None]
    batch = processor(
        text=[prompt + example[2] + "<|im_end|>" for prompt, example in zip(prompts, examples, strict=True)],
        images=images or None,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    ids = batch["input_ids"]
    header = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    # The first turn is the user's, the second "<|im_start|>" opens the reply's header.
    reply_starts = (ids == header[0]).int().cumsum(1).eq(2).int().argmax(1) + len(header)
    replied = torch.arange(ids.shape[1])[None] >= reply_starts[:, None]
    batch["labels"] = torch.where(replied & batch["attention_mask"].bool(), ids, -100)
    return dict(batch)


class _Batches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Steps `first`, …, so that a worker process draws while the model trains."""

    def __init__(self, processor: Qwen2VLProcessor, seed: int, first: int) -> None:
        self.processor, self.seed, self.first = processor, seed, first

    def __len__(self) -> int:
        return sum(STAGE_STEPS) - self.first

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return make_batch(self.processor, self.seed, self.first + index)


def learning_rate(step: int) -> float:
    """Warm-up over 100 steps to 2e-3, then linear to 0 over DECAY (the build ends before)."""
    first, last = DECAY
    return 2e-3 * min(1.0, (step + 1) / 100, (last - step) / (last - first))


def build_optimizers(model: Qwen2VLForConditionalGeneration) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the language model (half of AdamW's loss at equal steps here), AdamW for the rest."""
    matrices = [weight for weight in model.model.language_model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=1.0, adjust_lr_fn="match_rms_adamw", weight_decay=0.05),
        torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.95), weight_decay=0.05),
    ]


def build(out: Path, *, seed: int, save_every: int) -> None:
    """Run or resume all stages; leaves `out/step-N` folders and the final `out/checkpoint` in bf16."""
    processor = build_processor()
    model = build_model(processor, seed)
    optimizers = build_optimizers(model)
    out.mkdir(parents=True, exist_ok=True)
    state_file, first = out / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
    batches = torch.utils.data.DataLoader(_Batches(processor, seed, first), batch_size=None, num_workers=1)
    began = time.time()
    for step, batch in enumerate(batches, start=first):
        if step == sum(STAGE_STEPS[:2]):  # anew from the folder of this step, so that this stage can be repeated alone
            model.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
            optimizers = build_optimizers(model)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step)
        output = model(**batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            row = {"step": step, "loss": round(output.loss.item(), 4), "seconds": round(time.time() - began)}
            print(json.dumps(row | _reply_accuracy(processor, batch, output.logits)), flush=True)
        done = step + 1
        if done % save_every == 0 or done == sum(STAGE_STEPS):
            saved = [optimizer.state_dict() for optimizer in optimizers]
            state = {"model": model.state_dict(), "optimizers": saved, "step": done}
            torch.save(state, out / "state.tmp")
            (out / "state.tmp").replace(state_file)
            _save(model, processor, out / f"step-{done}")
    _save(model, processor, out / "checkpoint")


def _save(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, folder: Path) -> None:
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)


def _reply_accuracy(
    processor: Qwen2VLProcessor, batch: dict[str, torch.Tensor], logits: torch.Tensor
) -> dict[str, float]:
    """Teacher-forced share of right first tokens of answers: after a rationale, and where the answer comes first."""
    labels, guesses = batch["labels"][:, 1:], logits[:, :-1].argmax(-1)
    answer, think = processor.tokenizer.convert_tokens_to_ids(["<answer>", "</think>"])
    is_answer = batch["labels"][:, :-1] == answer
    reasoned = (batch["labels"] == think).int().cumsum(1)[:, :-1].bool()
    masks = {"after_think": is_answer & reasoned, "direct": is_answer & ~reasoned, "all": labels != -100}
    right = guesses == labels
    return {name: round(right[mask].float().mean().item(), 3) for name, mask in masks.items() if mask.any()}


def _repeats(rng: Generator) -> dict[str, torch.Tensor]:
    """[BATCH, 96] rows of 48 random tokens and repeated stretches of them; labels on all of a stretch but its start."""
    ids = rng.integers(VOCABULARY - 20, size=(BATCH, 96))
    labels = np.full_like(ids, -100)
    for row, label in zip(ids, labels, strict=True):
        position = 48
        while position < 96:
            length = min(int(rng.integers(3, 8)), 96 - position)
            start = int(rng.integers(48 - length))
            row[position : position + length] = row[start : start + length]
            label[position + 1 : position + length] = row[start + 1 : start + length]
            position += length
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def _copying_item(rng: Generator, mode: str, images: tuple[Path, ...] = ()) -> tuple[Record, str, str]:
    """An item over any words: the option that the stem names, or, where it names none, any of them.

    Options share words, as "Benign mass" and "No mass" do, and some are answers of the phantoms.
    """
    words = [_word(rng) for _ in range(int(rng.integers(3, 12)))]
    num_options = int(rng.integers(2, 5))
    options: list[str] = []
    while len(options) < num_options:
        text = " ".join(rng.choice(words, int(rng.integers(1, min(len(words), 4) + 1)), replace=False))
        text = str(rng.choice(ANSWERS)) if rng.random() < 0.15 else text[0].upper() + text[1:]
        if text not in options:
            options.append(text)
    answer = str(rng.choice(options))
    stem = " ".join(rng.choice(QUESTION_WORDS + words[:3], int(rng.integers(3, 13)))).capitalize() + "?"
    if rng.random() < 0.3:
        stem = str(rng.choice(STEMS[str(rng.choice(QUESTION_TYPES))]))
    if rng.random() < 0.3:
        stem = f"The finding is {answer}. {stem}"
    return _record(stem, options, images), mode, reply_text(mode, f"There is a {answer}.", answer)


def _word(rng: Generator) -> str:
    """A medical word, or a string that is none: of syllables or of letters, some with a number."""
    kind = rng.random()
    if kind < 0.5:
        return str(rng.choice(WORDS)).lower()
    if kind < 0.7:
        return "".join(rng.choice(SYLLABLES, int(rng.integers(2, 5))))
    text = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(3, 9))))
    return f"{text.upper()}-{rng.integers(100)}" if kind > 0.95 else text


def _record(question: str, options: list[str], images: tuple[Path, ...] = ()) -> Record:
    return Record(
        id="",
        images=images,
        question=question,
        options=tuple(options),
        answer=LETTERS[0],  # not read here: the reply is made beside the record
        modality=None,
        question_type=None,
        source="phantom",
        group="phantom",
    )


def _corpus(rng: Generator) -> list[str]:
    """Text for the tokenizer: prompts and replies of looking and general medical words."""
    lines = [*INSTRUCTION.values()] * 50
    for _ in range(4000):
        record, mode, reply, _ = make_example(rng, "looking")
        lines += [build_messages(record, mode)[0]["content"][-1]["text"], reply]
    words = [f" {word}" for word in WORDS] + [f" {word.lower()}" for word in WORDS]
    return [*lines, *words * 20, *["user\n", "assistant\n"] * 500]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rebuild the tiny checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder for state, steps and the final checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500, help="steps between saved states")
    arguments: Any = parser.parse_args(argv)
    build(arguments.out, seed=arguments.seed, save_every=arguments.save_every)


if __name__ == "__main__":
    main()
