"""How large an image may be: in training, evaluation, `ask`, a server's prompts and what a run leaves behind."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_training import LETTERS, make_trainer, recipe
from tiny_vlms import conversation, picture, tiny_smolvlm, tiny_vlm

from medr1.ask.ask import load_respondent
from medr1.config import load_config
from medr1.data.phantoms import write_phantoms
from medr1.errors import MedR1Error
from medr1.policy.encoding import encode_prompts
from medr1.policy.pixels import PUBLISHED, as_scaled, limit_as_published, limit_pixels
from medr1.policy.vlm import VLM, load_vlm
from medr1.training.plan import count, described
from medr1.training.plan import image_tokens as planned


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_images=24, seed=1)


def save(vlm: VLM, folder: Path) -> Path:
    vlm.core.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


def image_tokens(vlm: VLM, image: Image.Image) -> int:
    prompts = encode_prompts(vlm, [conversation("What?", 1)], [[image]])
    return int((prompts.input_ids_BP == vlm.core.config.image_token_id).sum())


@pytest.fixture
def published(shared: Path, tmp_path: Path) -> Path:
    """A tiny model's folder with the processor file that Qwen2-VL-2B has on the hub: up to 12,845,056 pixels."""
    folder = save(tiny_vlm("qwen2_vl"), tmp_path / "published")
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"] = json.loads((shared / "data" / "qwen2vl_files" / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("width", "height"), [(2000, 1500), (3000, 2000), (633, 634), (5000, 40)])
def test_a_hub_model_gets_at_most_the_published_pixels(published: Path, width: int, height: int) -> None:
    """2000 x 1500 made 3,834 tokens and 3000 x 2000 made 7,597, where the recipe's 401,408 pixels are 512."""
    assert image_tokens(load_vlm(str(published)), Image.new("RGB", (width, height))) <= PUBLISHED // 28**2


def test_a_copied_model_keeps_the_limit_that_it_was_saved_with(tmp_path: Path) -> None:
    """It was shown at most 401,408 pixels where no recipe lay beside it."""
    vlm = tiny_vlm("qwen2_vl")
    limit_pixels(vlm.processor, "trained", max_pixels=1_003_520)
    folder = save(vlm, tmp_path / "copied")
    assert load_vlm(str(folder)).processor.image_processor.size["longest_edge"] == 1_003_520
    assert described(str(folder))[1]["max_pixels"] == 1_003_520


def test_limits_that_are_asked_for_hold(published: Path) -> None:
    image = Image.new("RGB", (2000, 1500))
    assert image_tokens(load_vlm(str(published), max_pixels=28**2 * 1000), image) in range(900, 1001)
    assert image_tokens(load_vlm(str(published), max_pixels=28**2), image) == 1
    small = Image.new("RGB", (56, 56))
    assert image_tokens(load_vlm(str(published)), small) == 4
    assert image_tokens(load_vlm(str(published), min_pixels=28**2 * 64), small) == 64


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "glm46v"])
def test_a_limit_is_of_an_image_however_a_processor_counts(family: str, tmp_path: Path) -> None:
    """GLM's counts an image twice, once a frame; and `plan` reads the limits of all as they act."""
    vlm = tiny_vlm(family)
    limit_pixels(vlm.processor, family, min_pixels=1600, max_pixels=6400)
    side = vlm.processor.image_processor.patch_size * vlm.processor.image_processor.merge_size
    for picture_side in (30, 60, 300):
        tokens = image_tokens(vlm, picture(1, picture_side, picture_side))
        assert 1600 <= tokens * side**2 <= 6400
        assert planned(count(str(save(vlm, tmp_path))), load_config(), picture_side) == tokens
    assert image_tokens(vlm, picture(1, 300, 300)) == (80 // side) ** 2


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_pixels": 100}, "model.max_pixels = 100: a token of .* stands for 784"),
        ({"min_pixels": 20_000, "max_pixels": 10_000}, "model.min_pixels = 20000 is above model.max_pixels = 10000"),
        ({"min_pixels": 20_000_000}, "model.min_pixels = 20000000 is above"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits: dict[str, int], said: str) -> None:
    with pytest.raises(MedR1Error, match=said):
        load_vlm("tiny", **limits)


def test_the_package_s_own_model_keeps_its_own_limit() -> None:
    assert load_vlm("tiny").processor.image_processor.size["longest_edge"] == 112 * 112


def test_tiles_within_the_limit() -> None:
    """An image is cut into as many whole tiles of 32 x 32 pixels as lie within the limit, whatever its shape."""
    for make in (lambda: tiny_vlm("idefics3"), tiny_smolvlm):
        image, widest = picture(1, 200, 90), picture(2, 300, 40)
        vlm = make()
        own = image_tokens(vlm, image)
        for tiles in (1, 2):
            limit_pixels(vlm.processor, "tiles", max_pixels=(tiles * 32) ** 2 + 5)
            # 4 tokens a tile, and for the whole image once more where it was cut
            for each in (image, widest):
                assert image_tokens(vlm, each) <= 4 * (tiles**2 + (tiles > 1))
        assert own == image_tokens(vlm, image)  # its own limit is 64 x 64
        with pytest.raises(MedR1Error, match=r"a tile of tiles is 32 x 32"):
            limit_pixels(vlm.processor, "tiles", max_pixels=1000)
        with pytest.raises(MedR1Error, match=r"leave model.min_pixels at 0"):
            limit_pixels(vlm.processor, "tiles", min_pixels=1000)
        limit_as_published(vlm.processor, "tiles", Path("nowhere"))
        assert own == image_tokens(vlm, image)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_keeps_its_limits(lora_rank: int, phantoms: Path, tmp_path: Path) -> None:
    """In what it trains on, in its checkpoints and its model, also where they are above the published ones."""
    limits = {"model.min_pixels": 28**2 * 20, "model.max_pixels": 28**2 * 700, "model.lora_rank": lora_rank}
    config = recipe(phantoms, **LETTERS, **limits, **{"optimizer.steps": 1, "log.save_every": 1})
    base = save(tiny_vlm("qwen2_vl"), tmp_path / "base")
    config = config.model_copy(update={"model": config.model.model_copy(update={"name": str(base)})})
    trainer = make_trainer(config, tmp_path / "run")
    trainer.vlm.name = str(base)
    if lora_rank:
        trainer.vlm.model.peft_config["default"].base_model_name_or_path = str(base)  # type: ignore[index, union-attr]
    trainer.run()
    _, grid = trainer.encode(trainer.step_records[:1]).vision.values()
    assert int(grid.prod()) // 4 >= 20
    large = Image.new("RGB", (3000, 2000))
    for folder in ("model", "checkpoint-1"):
        for vlm in (load_vlm(str(tmp_path / "run" / folder)), load_respondent(str(tmp_path / "run" / folder)).vlm):
            assert 600 < image_tokens(vlm, large) <= 700
            assert image_tokens(vlm, Image.new("RGB", (56, 56))) >= 20


def test_the_recipe_has_them_and_the_published_one_states_them() -> None:
    config = load_config(Path(__file__).parents[1] / "configs" / "omnimedvqa-qwen2vl-2b.toml")
    assert (config.model.min_pixels, config.model.max_pixels) == (3136, PUBLISHED)
    with pytest.raises(MedR1Error, match=r"model.max_pixels"):
        load_config(overrides={"model.max_pixels": -1})


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize(("width", "height"), [(84, 56), (300, 200), (31, 500), (112, 112)])
def test_what_a_server_is_sent_it_leaves_as_it_is(family: str, width: int, height: int) -> None:
    """An image that was scaled here gives the same pixels, also by a processor with wider limits."""
    vlm, server = tiny_vlm(family), tiny_vlm(family)
    limit_pixels(server.processor, family, max_pixels=10**7, min_pixels=1)
    image = picture(3, width, height)
    ours = vlm.processor.image_processor(images=[image], return_tensors="pt")
    theirs = server.processor.image_processor(images=[as_scaled(vlm.processor, image)], return_tensors="pt")
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_a_vllm_server_is_sent_scaled_images(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="needs the openai client: pip install 'medr1[remote]'")
    from medr1.data.images.read import load_image
    from medr1.data.parts import load_parts
    from medr1.data.prompts import build_messages
    from medr1.policy.rollouts_vllm import VLLMServer

    vlm = tiny_vlm("qwen2_vl")
    records = load_parts(recipe(phantoms).data)[0][:2]
    record = records[0].model_copy(update={"images": (tmp_path / "large.png",)})
    picture(5, 400, 300).save(tmp_path / "large.png")
    messages = [build_messages(record, "no-think")]
    prompts = encode_prompts(vlm, messages, [[load_image(tmp_path / "large.png")]])
    server = VLLMServer(vlm, "http://127.0.0.1:9/v1", tmp_path, mode="no-think", lora=False)
    sent: list[Any] = []

    class Stop(Exception):
        pass

    def create(**kwargs: Any) -> Any:
        sent.append(kwargs)
        raise Stop

    monkeypatch.setattr(server.servers[0], "prove", lambda version: None)
    monkeypatch.setattr(server.servers[0].client.chat.completions, "create", create)
    settings: dict[str, Any] = {"num_completions": 2, "max_new_tokens": 2, "temperature": 1.0, "seed": 0}
    with pytest.raises(Stop):
        server.sample([record], prompts, **settings)
    part = next(part for part in sent[0]["messages"][0]["content"] if part["type"] == "image_url")
    image = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))
    assert image.size[0] * image.size[1] <= 112 * 112
    tokens = int((prompts.input_ids_BP == vlm.core.config.image_token_id).sum())
    assert image.size[0] * image.size[1] == 28**2 * tokens
