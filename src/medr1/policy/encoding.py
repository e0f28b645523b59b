"""Prompts and their images as tensors, and what a vision tower makes of them.

Shapes: B prompts, P prompt tokens, A rotary axes (3 with M-RoPE, else 1).
"""

import copy
import hashlib
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from jinja2.exceptions import TemplateError
from PIL.Image import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from medr1.errors import MedR1Error
from medr1.policy.vlm import VLM, vision_tower

TOKEN_KINDS = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")
"""What a processor says of each token, by the names that models take it by."""
SET_MARKS = ("num_query_tokens", "task_prompts_without_inputs")
"""What only processors have that set image marks themselves: BLIP's and Florence's."""
OPENED = re.compile(r"<think>\s*$")
"""How a prompt ends whose template has begun the reply's reasoning itself."""


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
    shapes: list[dict[str, tuple[int, ...]]]
    """Of each prompt: the shapes of its own part of each image tensor, and of `kinds`; what is beyond is padding."""
    image_counts: list[int]
    """Images of each prompt, in order."""
    image_keys: list[int]
    """Prompts of one key ask about the same images."""
    kinds: dict[str, Tensor] = field(default_factory=dict)
    """Of each token (B, P, …), by the names of TOKEN_KINDS: which are an image's, or which images it may see."""
    reply_kind: int = 0
    """The kind of a reply's tokens."""
    opened: list[str] = field(default_factory=list)
    """Of each prompt: the beginning of the reply that its template has written itself ("<think>\\n"), or ""."""
    features: Any = None
    """Output of a frozen vision tower for these images (see `with_vision_features`), else None."""
    feature_rows: list[int] = field(default_factory=list)
    """Of each prompt: how many entries of `features` are its own."""

    def __len__(self) -> int:
        return len(self.image_counts)

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids of each prompt, those of its images included."""
        return [ids[real].tolist() for ids, real in zip(self.input_ids_BP, self.attention_mask_BP.bool(), strict=True)]

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
            kinds={name: tensor.to(device) for name, tensor in self.kinds.items()},
        )

    def select(self, indices: Sequence[int], *, trim: bool = True) -> Self:
        """These prompts in this order; `trim`: without padding that none of them needs."""
        chosen = torch.tensor(list(indices), device=self.input_ids_BP.device)
        mask = self.attention_mask_BP[chosen]
        start = mask.shape[1] - int(mask.sum(1).max()) if trim else 0
        own = [self.shapes[index] for index in indices]
        return replace(
            self,
            input_ids_BP=self.input_ids_BP[chosen, start:],
            attention_mask_BP=mask[:, start:],
            position_ids_ABP=self.position_ids_ABP[:, chosen, start:],
            vision={
                name: _cut(tensor[rows], 1, [shapes[name] for shapes in own if name in shapes])
                for name, tensor in self.vision.items()
                if (rows := _rows([shapes.get(name, (0,))[0] for shapes in self.shapes], indices))
            },
            shapes=own,
            image_counts=[self.image_counts[index] for index in indices],
            image_keys=[self.image_keys[index] for index in indices],
            kinds={
                name: _cut(kind[chosen, start:], 2, [shapes[name] for shapes in own if name in shapes])
                for name, kind in self.kinds.items()
            },
            opened=[self.opened[index] for index in indices],
            features=_select_features(self.features, _rows(self.feature_rows, indices)),
            feature_rows=[self.feature_rows[index] for index in indices] if self.feature_rows else [],
        )

    def kinds_before(self, num_tokens: int) -> dict[str, Tensor]:
        """`kinds` of the prompts and of `num_tokens` tokens of a reply after each."""
        return {name: _with_reply(kind, num_tokens, self.reply_kind) for name, kind in self.kinds.items()}

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
            kinds={name: kind[:, :end] for name, kind in whole.kinds.items()},
        )
        ends = replace(
            self,
            input_ids_BP=self.input_ids_BP[:, start:].masked_fill(is_image[:, start:], 0),  # padding here
            attention_mask_BP=after[:, start:].to(self.attention_mask_BP.dtype),
            position_ids_ABP=self.position_ids_ABP[..., start:],
            vision={},
            kinds={},
            features=None,
        )
        return beginnings, ends, owners

    def model_inputs(self) -> dict[str, Any]:
        """The image part of a model call: ready features where a frozen tower made them, else pixels."""
        if self.features is not None:
            return {"mm_encoder_outputs": {"image": copy.copy(self.features)}}
        return dict(self.vision)


def _rows(counts: Sequence[int], indices: Sequence[int]) -> list[int]:
    """Places of these prompts' entries, where prompt b has counts[b] of them, in order."""
    first = [sum(counts[:index]) for index in range(len(counts) + 1)]
    return [row for index in indices for row in range(first[index], first[index + 1])] if counts else []


def _cut(tensor: Tensor, first: int, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Without padding that none of these shapes needs, in the dimensions from `first` on."""
    for dim in range(first, tensor.ndim if shapes else 0):
        tensor = tensor.narrow(dim, 0, max(shape[dim] for shape in shapes))
    return tensor


def _with_reply(kind: Tensor, num_tokens: int, reply_kind: int) -> Tensor:
    if kind.ndim > 2:  # which images a token sees: a reply's sees what the prompt's last does, as in `generate`
        return torch.cat([kind, kind[:, -1:].expand(-1, num_tokens, *kind.shape[2:])], dim=1)
    return nn.functional.pad(kind, (0, num_tokens), value=reply_kind)


def _single_images(vision: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Image by image, where a grid tells how many patches each has (Qwen-VL, GLM-V)."""
    grid = vision["image_grid_thw"]
    patches = torch.split(vision["pixel_values"], grid.prod(-1).tolist())
    return [{"pixel_values": own, "image_grid_thw": grid[index : index + 1]} for index, own in enumerate(patches)]


def _select_features(features: Any, rows: list[int]) -> Any:
    if features is None or not rows:
        return None

    def of_rows(entries: Any) -> Any:
        return entries[rows] if isinstance(entries, Tensor) else tuple(entries[row] for row in rows)

    selected = copy.copy(features)
    selected.pooler_output = of_rows(features.pooler_output)
    if getattr(features, "deepstack_features", None) is not None:  # Qwen3-VL: features for several text layers
        selected.deepstack_features = [of_rows(layer) for layer in features.deepstack_features]
    return selected


def encode_prompts(
    vlm: VLM, messages: Sequence[list[dict[str, Any]]], images: Sequence[Sequence[Image]], *, thinking: bool = True
) -> PromptBatch:
    """Chat messages and their images as one left-padded batch on the model's device.

    Args:
        messages: B conversations that end with the user's turn; each {"type": "image"} stands for one image.
        images: B lists of RGB images in the order of those marks; an empty list for a text-only prompt. Prompts
            that are given the same objects are known to share their images.
        thinking: whether the reply may begin with its reasoning; of families whose template opens it or asks.

    Raises:
        MedR1Error: a text holds a token that means an image to this model, or the model takes no such prompt.
    """
    assert len(messages) == len(images), "one list of images a conversation"
    marks = [mark for mark in vlm.tokenizer.convert_ids_to_tokens(vlm.banned_token_ids) if mark]
    texts = [part["text"] for turns in messages for turn in turns for part in turn["content"] if part["type"] == "text"]
    for text in texts:
        if mark := next((mark for mark in marks if mark in text), None):
            raise MedR1Error(f"{' '.join(text.split())[:60]} …: holds {mark}, an image to {vlm.name}; remove it")
    texts = [render_prompt(vlm, conversation, thinking=thinking) for conversation in messages]
    if hasattr(vlm.processor.image_processor, "merge_size"):
        parts = _encode_together(vlm, texts, images)
    else:  # one by one: what other processors make of several prompts does not say whose tiles are whose
        parts = [_encode(vlm, [text], [group]) for text, group in zip(texts, images, strict=True)]
    length = max(len(part["input_ids"][0]) for part in parts)

    def left_padded(name: str, value: int = 0) -> Tensor:
        like = next(part[name] for part in parts if name in part)
        # A prompt without images may have no such thing.
        tensors = [part.get(name, like.new_zeros(1, 1, *like.shape[2:])) for part in parts]
        return _joined([_padded_left(tensor, length, value) for tensor in tensors])

    input_ids = left_padded("input_ids", vlm.pad_token_id)
    mask = left_padded("attention_mask")
    kinds = {name: left_padded(name) for name in TOKEN_KINDS if any(name in part for part in parts)}
    named = {name: None for part in parts for name in part if vlm.takes(name) and name not in _OF_TOKENS}
    vision = {name: _joined([part[name] for part in parts if name in part]) for name in named}
    batch = PromptBatch(
        input_ids_BP=input_ids,
        attention_mask_BP=mask,
        position_ids_ABP=_positions(vlm, input_ids, mask, kinds.get("mm_token_type_ids"), vision),
        vision=vision,
        shapes=[{name: tuple(tensor.shape) for name, tensor in part.items()} for part in parts],
        image_counts=[len(group) for group in images],
        image_keys=_same_objects(images),
        kinds={name: kind for name, kind in kinds.items() if vlm.takes(name)},
        reply_kind=int(vlm.prompt_sees_itself),
        opened=[found[0] if (found := OPENED.search(text)) else "" for text in texts],
    )
    return batch.to(vlm.device)


_OF_TOKENS = ("input_ids", "attention_mask", "labels", *TOKEN_KINDS)


def render_prompt(vlm: VLM, conversation: list[dict[str, Any]], *, thinking: bool = True) -> str:
    """The conversation in the family's own chat format, up to where the reply begins.

    A template without a system role gets it at the head of the user's turn. Where a template opens the reasoning and
    it is not wanted, it is closed at once, as `enable_thinking = False` does where a template knows it. A processor
    without a template gets the image marks, but where it sets them itself, and the texts, one after the other.
    """
    template = getattr(vlm.processor, "chat_template", None)
    if template is None:
        sets_marks = any(hasattr(vlm.processor, name) for name in SET_MARKS)
        mark = "" if sets_marks else getattr(vlm.processor, "image_token", "")
        parts = [part for turn in conversation for part in turn["content"]]
        return "".join(str(mark) if part["type"] == "image" else part["text"] for part in parts)
    settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    if "enable_thinking" in str(template):
        settings["enable_thinking"] = thinking
    try:
        text = vlm.processor.apply_chat_template(conversation, **settings)
    except TemplateError as error:
        if conversation[0]["role"] != "system":
            raise MedR1Error(f"{vlm.name}: its chat template takes no such conversation ({error})") from error
        system, user, *rest = conversation
        line_break = {"type": "text", "text": "\n\n"}
        folded = {**user, "content": [*system["content"], line_break, *user["content"]]}
        return render_prompt(vlm, [folded, *rest], thinking=thinking)
    return text if thinking else OPENED.sub("<think>\n\n</think>\n\n", text)


def _encode_together(vlm: VLM, texts: list[str], images: Sequence[Sequence[Image]]) -> list[dict[str, Tensor]]:
    """As `_encode` of each prompt, where a grid tells how many patches an image has (Qwen-VL, GLM-V)."""
    whole = _encode(vlm, texts, images, padding=True, padding_side="left")
    each = iter(_single_images(whole) if "image_grid_thw" in whole else ())
    parts = []
    for row, (mask, group) in enumerate(zip(whole["attention_mask"], images, strict=True)):
        start = len(mask) - int(mask.sum())
        names = [name for name in ("input_ids", "attention_mask", *TOKEN_KINDS) if name in whole]
        part = {name: whole[name][row : row + 1, start:] for name in names}
        own = [next(each) for _ in group]
        parts.append(part | {name: torch.cat([one[name] for one in own]) for name in (own[0] if own else ())})
    return parts


def _encode(vlm: VLM, texts: list[str], images: Sequence[Sequence[Image]], **settings: Any) -> dict[str, Tensor]:
    """What the processor makes of prompts: tensors of their tokens (B, P, …), and of their images."""
    settings["return_tensors"] = "pt"
    bos = vlm.tokenizer.bos_token
    if bos and texts[0].startswith(bos):  # the template has written it
        settings["add_special_tokens"] = False
    try:
        shown = [list(group) for group in images] if any(images) else None
        encoded = vlm.processor(text=texts, images=shown, **settings)
    except ValueError as error:
        raise MedR1Error(f"{vlm.name}: its processor takes no such prompt ({str(error).splitlines()[0]})") from error
    return {name: tensor for name, tensor in encoded.items() if isinstance(tensor, Tensor)}


def _padded_left(tensor: Tensor, length: int, value: int) -> Tensor:
    """(1, P, …) to (1, length, …)."""
    return nn.functional.pad(tensor, [*[0, 0] * (tensor.ndim - 2), length - tensor.shape[1], 0], value=value)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other along the first dimension, each filled up with zeros to the largest of all others."""
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]

    def filled(tensor: Tensor) -> Tensor:
        missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
        return nn.functional.pad(tensor, [side for size in reversed(missing) for side in (0, size)])

    return torch.cat([filled(tensor) for tensor in tensors])


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
    trained = any(parameter.requires_grad for module in vision_tower(vlm) for parameter in module.parameters())
    if trained or not prompts.vision or vlm.not_shared or not vlm.takes("mm_encoder_outputs"):
        return prompts
    with torch.no_grad():
        each = [_features(vlm, prompts.select([index]).vision, cache) for index in range(len(prompts))]
    tokens = [output.pooler_output for output in each if output is not None]
    features = copy.copy(next(output for output in each if output is not None))
    features.pooler_output = _after_another(tokens)
    if getattr(features, "deepstack_features", None) is not None:
        layers = zip(*(output.deepstack_features for output in each if output is not None), strict=True)
        features.deepstack_features = [_after_another(layer) for layer in layers]
    rows = [0 if output is None else len(output.pooler_output) for output in each]
    return replace(prompts, features=features, feature_rows=rows)


def _features(vlm: VLM, vision: dict[str, Tensor], cache: "FeatureCache | None") -> Any:
    """A tower's output for the images of one prompt; None without any."""
    if not vision:
        return None
    if cache is None or "image_grid_thw" not in vision:
        return vlm.core.get_image_features(**vision, return_dict=True)
    tokens, *deeper = zip(*(cache(vlm, image) for image in _single_images(vision)), strict=True)
    features: Any = BaseModelOutputWithPooling(pooler_output=tokens)  # type: ignore[arg-type]
    features.deepstack_features = deeper or None
    return features


def _after_another(parts: Sequence[Any]) -> Any:
    """Tensors along their first dimension; lists or tuples of tensors as one tuple."""
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else tuple(one for part in parts for one in part)


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
    channels = torch.arange(3, device=pixels.device)[:, None, None]
    if "spatial_shapes" not in prompt.vision and "pixel_attention_mask" in prompt.vision:
        grids, cell_of = _tile_cells(vlm, prompt)
        return ImageCells(grids, cell_of.to(pixels.device)[None, :, None], channels)
    # Gemma 3, PaliGemma: each image whole, as a square, in as many tokens a side.
    [images] = prompt.image_counts
    tokens = int((prompt.input_ids_BP == vlm.core.config.image_token_id).sum()) // images
    side, is_cut = math.isqrt(tokens), getattr(vlm.processor.image_processor, "do_center_crop", False)
    if set(prompt.vision) == {"pixel_values"} and len(pixels) == images and side**2 == tokens and not is_cut:
        first = torch.arange(images, device=pixels.device)[:, None, None, None] * tokens
        cells = _stretched(torch.arange(tokens).view(side, side), pixels.shape[-1]).to(pixels.device)
        return ImageCells([(side, side)] * images, first + cells, channels)
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
