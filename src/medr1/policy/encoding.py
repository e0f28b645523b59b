"""Prompts and their images as tensors, and what a vision tower makes of them.

Shapes: B prompts, P prompt tokens, A rotary axes (3 with M-RoPE, else 1).
"""

import copy
import hashlib
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from PIL.Image import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from medr1.errors import MedR1Error
from medr1.policy.vlm import VLM, vision_tower


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts with their images, each image once however many completions follow."""

    input_ids_BP: Tensor
    attention_mask_BP: Tensor
    """1 at real tokens, 0 at padding."""
    position_ids_ABP: Tensor
    """Rotary positions, 0 at padding."""
    vision: dict[str, Tensor]
    """The processor's image tensors (pixel_values, image_grid_thw, …); empty for text-only prompts."""
    image_counts: list[int]
    """Images of each prompt, in order."""
    image_keys: list[int]
    """Prompts of one key ask about the same images."""
    features: Any = None
    """Output of a frozen vision tower for these images (see `with_vision_features`), else None."""

    def __len__(self) -> int:
        return len(self.image_counts)

    @property
    def next_position_B(self) -> Tensor:
        """Rotary position of the first completion token: one past the largest of the prompt, padding left out."""
        padding = self.attention_mask_BP == 0
        return self.position_ids_ABP.masked_fill(padding, -1).amax(dim=(0, 2)) + 1

    def to(self, device: torch.device | str) -> Self:
        """The same prompts on another device."""
        return replace(
            self,
            input_ids_BP=self.input_ids_BP.to(device),
            attention_mask_BP=self.attention_mask_BP.to(device),
            position_ids_ABP=self.position_ids_ABP.to(device),
            vision={name: tensor.to(device) for name, tensor in self.vision.items()},
        )

    def select(self, indices: Sequence[int], *, trim: bool = True) -> Self:
        """These prompts in this order; `trim`: without padding that none of them needs."""
        chosen = torch.tensor(list(indices), device=self.input_ids_BP.device)
        mask = self.attention_mask_BP[chosen]
        start = mask.shape[1] - int(mask.sum(1).max()) if trim else 0
        first = [sum(self.image_counts[:index]) for index in range(len(self) + 1)]
        images = [image for index in indices for image in range(first[index], first[index + 1])]
        # Idefics3 and SmolVLM: a row is a prompt, all tiles of its images and then empty ones. Else it is an image.
        rows = list(indices) if images and "pixel_attention_mask" in self.vision else images
        return replace(
            self,
            input_ids_BP=self.input_ids_BP[chosen, start:],
            attention_mask_BP=mask[:, start:],
            position_ids_ABP=self.position_ids_ABP[:, chosen, start:],
            vision=_select_images(self.vision, rows),
            image_counts=[self.image_counts[index] for index in indices],
            image_keys=[self.image_keys[index] for index in indices],
            features=_select_features(self.features, rows),
        )

    def split_after_images(self, config: Any) -> tuple[Self, Self, list[int]] | None:
        """Beginnings up to the last image token, one for each set of images; ends of all prompts; whose each end is.

        None where no two prompts ask about the same images, or the text before these differs.
        """
        keys = list(dict.fromkeys(self.image_keys))
        if len(keys) == len(self) or not all(self.image_counts):
            return None
        first = [self.image_keys.index(key) for key in keys]
        owners = [keys.index(key) for key in self.image_keys]
        columns = torch.arange(self.input_ids_BP.shape[1], device=self.input_ids_BP.device)
        is_image = self.input_ids_BP == config.image_token_id
        cut_B = (is_image * (columns + 1)).amax(1)
        real = self.attention_mask_BP.bool()
        before, after = real & (columns < cut_B[:, None]), real & (columns >= cut_B[:, None])
        texts = [ids[keep].tolist() for ids, keep in zip(self.input_ids_BP, before, strict=True)]
        if any(text != texts[first[owner]] for text, owner in zip(texts, owners, strict=True)):
            return None
        whole, end, start = self.select(first, trim=False), int(cut_B.max()), int(cut_B.min())
        beginnings = replace(
            whole,
            input_ids_BP=whole.input_ids_BP[:, :end],
            attention_mask_BP=before[first, :end].to(self.attention_mask_BP.dtype),
            position_ids_ABP=whole.position_ids_ABP[..., :end],
        )
        ends = replace(
            self,
            input_ids_BP=self.input_ids_BP[:, start:].masked_fill(is_image[:, start:], 0),  # padding here
            attention_mask_BP=after[:, start:].to(self.attention_mask_BP.dtype),
            position_ids_ABP=self.position_ids_ABP[..., start:],
            vision={},
            features=None,
        )
        return beginnings, ends, owners

    def model_inputs(self) -> dict[str, Any]:
        """The image part of a model call: ready features where a frozen tower made them, else pixels."""
        if self.features is not None:
            return {"mm_encoder_outputs": {"image": copy.copy(self.features)}}
        return dict(self.vision)


def _select_images(vision: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    if not rows:
        return {}
    if "image_grid_thw" not in vision:
        return {name: tensor[rows] for name, tensor in vision.items()}
    grid = vision["image_grid_thw"]
    patches = torch.split(vision["pixel_values"], grid.prod(-1).tolist())
    return {
        **{name: tensor[rows] for name, tensor in vision.items() if name != "pixel_values"},
        "pixel_values": torch.cat([patches[row] for row in rows]),
    }


def _select_features(features: Any, rows: list[int]) -> Any:
    if features is None or not rows:
        return None
    selected = copy.copy(features)
    selected.pooler_output = tuple(features.pooler_output[row] for row in rows)
    if getattr(features, "deepstack_features", None) is not None:  # Qwen3-VL: features for several text layers
        selected.deepstack_features = [tuple(layer[row] for row in rows) for layer in features.deepstack_features]
    return selected


def encode_prompts(
    vlm: VLM, messages: Sequence[list[dict[str, Any]]], images: Sequence[Sequence[Image]]
) -> PromptBatch:
    """Chat messages and their images as one left-padded batch on the model's device.

    Args:
        messages: B conversations that end with the user's turn; each {"type": "image"} stands for one image.
        images: B lists of RGB images in the order of those marks; an empty list for a text-only prompt. Prompts
            that are given the same objects are known to share their images.

    Raises:
        MedR1Error: a text holds a token that means an image to this model.
    """
    assert len(messages) == len(images), "one list of images a conversation"
    marks = vlm.tokenizer.convert_ids_to_tokens(vlm.banned_token_ids)
    texts = [part["text"] for turns in messages for turn in turns for part in turn["content"] if part["type"] == "text"]
    for text in texts:
        if mark := next((mark for mark in marks if mark in text), None):
            raise MedR1Error(f"{' '.join(text.split())[:60]} …: holds {mark}, an image to {vlm.name}; remove it")
    texts = [
        vlm.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        for conversation in messages
    ]
    groups = [list(group) for group in images] if any(images) else None
    inputs = vlm.processor(text=texts, images=groups, padding=True, padding_side="left", return_tensors="pt")
    input_ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    token_types = inputs.pop("mm_token_type_ids", None)
    vision = dict(inputs)
    batch = PromptBatch(
        input_ids_BP=input_ids,
        attention_mask_BP=mask,
        position_ids_ABP=_positions(vlm, input_ids, mask, token_types, vision),
        vision=vision,
        image_counts=[len(group) for group in images],
        image_keys=_same_objects(images),
    )
    return batch.to(vlm.device)


def num_positions(vlm: VLM) -> int | None:
    """Tokens, of prompt and reply together, that the model was made for; None where its configuration does not say."""
    return getattr(vlm.core.config.get_text_config(), "max_position_embeddings", None)


def check_lengths(vlm: VLM, prompts: PromptBatch, names: Sequence[str], max_new_tokens: int) -> None:
    """That each prompt, image tokens included, and a reply to it fit into the model's positions.

    Raises:
        MedR1Error: one does not, by its name.
    """
    most = num_positions(vlm)
    if most is None:
        return
    for name, num_tokens in zip(names, prompts.attention_mask_BP.sum(1).tolist(), strict=True):
        if num_tokens + max_new_tokens > most:
            raise MedR1Error(_too_long(vlm, name, num_tokens, prompts.vision != {}, max_new_tokens))


def text_too_long(vlm: VLM, text: str, name: str, max_new_tokens: int) -> str | None:
    """What `check_lengths` would say of a prompt's text alone; None where the text fits. Quick: no image is read."""
    most = num_positions(vlm)
    if most is None or len(text.encode(errors="replace")) + max_new_tokens <= most:  # no token is less than a byte
        return None
    num_tokens = len(vlm.tokenizer(text, add_special_tokens=False)["input_ids"])
    return _too_long(vlm, name, num_tokens, False, max_new_tokens) if num_tokens + max_new_tokens > most else None


def _too_long(vlm: VLM, name: str, num_tokens: int, with_images: bool, max_new_tokens: int) -> str:
    said = f"{num_tokens:,} tokens{', images included,' if with_images else ''} and a reply of {max_new_tokens:,}"
    remedy = f"shorten it{', or its images,' if with_images else ''} or leave it out"
    return f"{name}: {said} do not fit into the {num_positions(vlm):,} positions of {vlm.name}; {remedy}"


def _same_objects(images: Sequence[Sequence[Image]]) -> list[int]:
    """For each list the place of the first one that holds the same objects."""
    places: dict[tuple[int, ...], int] = {}
    return [places.setdefault(tuple(map(id, group)), place) for place, group in enumerate(images)]


def _positions(
    vlm: VLM, input_ids: Tensor, mask: Tensor, token_types: Tensor | None, vision: dict[str, Tensor]
) -> Tensor:
    body = vlm.core.base_model
    if hasattr(body, "get_rope_index"):  # M-RoPE: time, height and width
        types = torch.zeros_like(input_ids) if token_types is None else token_types
        grid = vision.get("image_grid_thw")
        return body.get_rope_index(input_ids, types, image_grid_thw=grid, attention_mask=mask)[0]
    return ((mask.cumsum(-1) - 1) * mask)[None]


def with_vision_features(vlm: VLM, prompts: PromptBatch, cache: "FeatureCache | None" = None) -> PromptBatch:
    """The prompts with their images already encoded, if the vision tower is frozen; otherwise as they are.

    Sampling, policy pass and reference pass then run the tower once instead of three times; with a cache, once a run.
    """
    tower = vision_tower(vlm)
    trained = any(parameter.requires_grad for module in tower for parameter in module.parameters())
    if not tower or trained or not prompts.vision:
        return prompts
    with torch.no_grad():
        if cache is None or "image_grid_thw" not in prompts.vision:
            return replace(prompts, features=vlm.core.get_image_features(**prompts.vision, return_dict=True))
        images = [cache(vlm, _select_images(prompts.vision, [image])) for image in range(sum(prompts.image_counts))]
    tokens, *deeper = zip(*images, strict=True)
    features: Any = BaseModelOutputWithPooling(pooler_output=tokens)  # type: ignore[arg-type]
    features.deepstack_features = deeper or None
    return replace(prompts, features=features)


@dataclass(frozen=True)
class ImageCells:
    """Where in `pixel_values` each image token looks: a grid of cells an image, one cell a token."""

    grids: list[tuple[int, int]]
    """Rows and columns of each image."""
    cell_of: Tensor
    """Cell of each pixel value, numbered row by row and on from image to image; int64, broadcasts over the pixels."""
    channel_of: Tensor
    """Colour channel of each pixel value: 0 red, 1 green, 2 blue; int64, broadcasts over the pixels."""


def image_cells(vlm: VLM, prompt: PromptBatch) -> ImageCells:
    """The grids of the images of a single prompt.

    Raises:
        MedR1Error: this family lays its pixels out in a way that is unknown here.
    """
    assert len(prompt) == 1 and prompt.vision, "one prompt with images"
    pixels = prompt.vision["pixel_values"]
    if "image_grid_thw" in prompt.vision:
        # Qwen's processors put the merge x merge patches of a token side by side, tokens row by row, a patch a line
        # of values, its channels one after the other.
        merge = vlm.core.config.vision_config.spatial_merge_size
        num_patches, num_values = pixels.shape
        return ImageCells(
            grids=[(height // merge, width // merge) for _, height, width in prompt.vision["image_grid_thw"].tolist()],
            cell_of=torch.arange(num_patches, device=pixels.device)[:, None] // merge**2,
            channel_of=torch.arange(num_values, device=pixels.device) // (num_values // 3),
        )
    if "pixel_attention_mask" in prompt.vision:
        grids, cell_of = _tile_cells(vlm, prompt)
        channels = torch.arange(3, device=pixels.device)[:, None, None]
        return ImageCells(grids, cell_of.to(pixels.device)[None, :, None], channels)
    raise MedR1Error(f"{vlm.name}: which pixels an image token stands for is not known to medr1; use a Qwen-VL model")


def _tile_cells(vlm: VLM, prompt: PromptBatch) -> tuple[list[tuple[int, int]], Tensor]:
    """Grids of images that Idefics3 or SmolVLM cut into tiles, and the cell of each pixel (tiles, side, side).

    The whole image follows its tiles as one more, and shows each of their cells again, smaller.
    """
    side = prompt.vision["pixel_values"].shape[-1]
    tokens = math.isqrt(vlm.processor.image_seq_len)  # of a tile's side
    start, grids, parts = 0, [], []
    for before in vlm.tokenizer.decode(prompt.input_ids_BP[0]).split("<global-img>")[:-1]:
        tiles = [(int(row), int(column)) for row, column in re.findall(r"<row_(\d+)_col_(\d+)>", before)]
        num_rows, num_columns = max(tiles, default=(1, 1))
        rows, columns = num_rows * tokens, num_columns * tokens
        whole = torch.arange(rows * columns).view(rows, columns) + start
        for row, column in tiles:
            tile = whole[(row - 1) * tokens : row * tokens, (column - 1) * tokens : column * tokens]
            parts.append(_stretched(tile, side))
        parts.append(_stretched(whole, side))
        grids.append((rows, columns))
        start += rows * columns
    return grids, torch.stack(parts)


def _stretched(cells: Tensor, side: int) -> Tensor:
    """Cells (rows, columns) over a square of pixels (side, side)."""
    rows, columns = (torch.arange(side) * count // side for count in cells.shape)
    return cells[rows][:, columns]


class FeatureCache:
    """A frozen tower's output for each image, in main memory from one epoch to the next; the newest `max_bytes` stay.

    An image is known by its pixels as the processor gives them, and is encoded by itself, so that a run which was
    resumed with an empty cache computes the same. Idefics3, whose images come as tiles, is not cached.
    """

    def __init__(self, max_bytes: int = 4 * 2**30) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._kept: OrderedDict[bytes, list[Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, vlm: VLM, vision: dict[str, Tensor]) -> list[Tensor]:
        """Features of one image on the model's device: its tokens, then those for deeper text layers (Qwen3-VL)."""
        key = hashlib.sha256()
        for name, tensor in sorted(vision.items()):
            key.update(f"{name} {tuple(tensor.shape)}".encode())
            key.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        if kept := self._kept.get(key.digest()):
            self._kept.move_to_end(key.digest())
            return [part.to(vlm.device) for part in kept]
        output = vlm.core.get_image_features(**vision, return_dict=True)
        deeper = getattr(output, "deepstack_features", None) or []
        parts = [output.pooler_output[0], *(layer[0] for layer in deeper)]
        self._kept[key.digest()] = [part.cpu() for part in parts]
        self.num_bytes += sum(part.nbytes for part in parts)
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= sum(part.nbytes for part in self._kept.popitem(last=False)[1])
        return parts
