"""`medr1 engines check`: an engine that computes what transformers computes, and one of each cause that does not."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("openai", reason="needs the openai client: pip install 'medr1[remote]'")

from fake_vllm import FakeVLLM, disturbed, starting

from medr1.cli import main
from medr1.config import load_config
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.evaluation.engines import compare
from medr1.policy.pixels import limit_pixels
from medr1.policy.rollouts_vllm import greedy
from medr1.policy.vlm import VLM, load_vlm

HOW: dict[str, Any] = {"mode": "no-think", "max_new_tokens": 12}
Check = Callable[[VLM], dict[str, Any]]


pytestmark = pytest.mark.usefixtures("local_servers")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_images=16, seed=1)


@pytest.fixture(scope="module")
def records(phantoms: Path) -> list[Record]:
    return load_parts(load_config(overrides={"data.path": str(phantoms)}).data)[0][::7][:6]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load_vlm("tiny", dtype="float32")


@pytest.fixture
def other(vlm: VLM) -> VLM:
    """What a server has, to be changed."""
    return copy.deepcopy(vlm)


@pytest.fixture
def serve() -> Iterator[Callable[[VLM], FakeVLLM]]:
    with starting() as start:
        yield start


@pytest.fixture
def check(vlm: VLM, records: list[Record], serve: Callable[[VLM], FakeVLLM]) -> Check:
    """Our model beside a server with another one."""

    def checked(other: VLM) -> dict[str, Any]:
        url = serve(other).url
        return compare(vlm, records, lambda asked, _: greedy(vlm, url, asked, **HOW), **HOW)

    return checked


def agreeing(found: dict[str, Any]) -> list[int]:
    return [found[name] for name in ("prompts", "logps", "replies", "outcomes")]


def test_the_same_model_agrees(check: Check, other: VLM) -> None:
    found = check(other)
    assert agreeing(found) == [6] * 4 and found["n"] == found["compared"] == 6
    assert found["max_gap"] < 1e-4 and not found["causes"] and not found["partings"]


def test_other_image_sizes_are_the_processor(check: Check, other: VLM) -> None:
    limit_pixels(other.processor, "it", max_pixels=56 * 56)
    found = check(other)
    assert found["prompts"] == found["compared"] == 0 and found["gap"] is None
    assert list(found["causes"]) == ["processor"]
    assert "6 of 6 prompts differ (record " in found["causes"]["processor"]
    assert "tokens of images here, 6 there)" in found["causes"]["processor"], "4 of the image, and its two ends"


def test_another_text_is_the_template(check: Check, other: VLM) -> None:
    template = other.processor.chat_template
    other.processor.chat_template = "<|im_start|>system\nYou are helpful.<|im_end|>\n" + template
    found = check(other)
    assert list(found["causes"]) == ["template"] and found["prompts"] == 0
    assert "token 1: " in found["causes"]["template"] and "system" in found["causes"]["template"]
    limit_pixels(other.processor, "it", max_pixels=56 * 56)
    assert list(check(other)["causes"]) == ["template"], "told first; the sizes are seen when it is mended"


def test_bfloat16_is_the_dtype(check: Check, other: VLM) -> None:
    other.model.to(torch.bfloat16)
    found = check(other)
    assert list(found["causes"]) == ["dtype"] and found["prompts"] == 6
    assert 1e-3 < found["gap"] < 4 * found["rounding"]


@pytest.mark.parametrize("stale", ["head", "all"])
def test_older_weights_and_a_stale_head_are_the_weights(stale: str, check: Check, other: VLM) -> None:
    changed = disturbed(other, 0.05)
    if stale == "head":
        other.core.lm_head.weight = torch.nn.Parameter(changed.core.lm_head.weight.detach().clone())
    else:
        other = changed
    found = check(other)
    assert list(found["causes"]) == ["weights"] and found["prompts"] == 6 and found["logps"] < 6
    assert "at the first token" in found["causes"]["weights"]
    for parting in found["partings"]:
        ours, theirs = parting["ours"], parting["theirs"]
        assert ours["here"] >= theirs["here"] and theirs["there"] >= (ours["there"] or -99), "each takes its likeliest"
        assert ours["text"] != theirs["text"] and parting["position"] < 12


def test_a_server_that_ends_replies_itself_is_the_sampling(
    vlm: VLM, records: list[Record], serve: Callable[[VLM], FakeVLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, complete = serve(vlm), FakeVLLM.complete
    monkeypatch.setattr(server, "complete", lambda body: complete(server, body | {"max_tokens": 3}))
    found = compare(vlm, records, lambda asked, _: greedy(vlm, server.url, asked, **HOW), **HOW)
    assert list(found["causes"]) == ["sampling"] and agreeing(found)[:3] == [6, 6, 0]
    assert found["partings"][0]["position"] == 3 and found["partings"][0]["theirs"]["text"] is None


def test_the_command(
    vlm: VLM,
    other: VLM,
    phantoms: Path,
    serve: Callable[[VLM], FakeVLLM],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*more: str) -> tuple[int, str, str]:
        command = ["medr1", "engines", "check", "tiny", "--data", str(phantoms), "--mode", "no-think", "--n", "3"]
        monkeypatch.setattr("sys.argv", [*command, "--max-new-tokens", "12", *more])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(str(end.value.code)), said.out, said.err

    status, _, error = run()
    assert status == 1 and "give --url of a vLLM server" in error
    status, out, _ = run("--url", serve(other).url)
    assert status == 0 and "computes what transformers computes, on 3 records" in out
    assert "prompt tokens" in out and "greedy replies" in out
    stale = serve(disturbed(other, 0.05))
    status, out, error = run("--url", stale.url)
    assert status == 1 and "where replies part" in out
    assert error.splitlines()[-1].startswith("medr1: weights: log-probs are ")
    status, out, _ = run("--url", stale.url, "--json")
    assert status == 1 and json.loads(out.splitlines()[-1])["prompts"] == 3
    stale.kill()
    status, _, error = run("--url", stale.url)
    assert status == 1 and f"{stale.url}: " in error and "refused; start the server or mend the URL" in error


def test_what_is_no_vllm_is_told(
    vlm: VLM, records: list[Record], serve: Callable[[VLM], FakeVLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, choices = serve(vlm), FakeVLLM.choices

    def without_ids(body: dict[str, Any]) -> Any:
        return [({**choice, "token_ids": None}, {}) for choice, _ in choices(server, body)]

    monkeypatch.setattr(server, "choices", without_ids)
    with pytest.raises(MedR1Error, match="tells no token ids; it is no vLLM"):
        greedy(vlm, server.url, records, **HOW)
    monkeypatch.setattr("fake_vllm.certain", lambda: ({"message": {"content": "!"}, "logprobs": None}, {}))
    with pytest.raises(MedR1Error, match="its reply is none of vLLM's"):
        greedy(vlm, server.url, records, **HOW)
    with pytest.raises(MedR1Error, match="is no URL that ends in /v1"):
        greedy(vlm, "http://127.0.0.1:9", records, **HOW)
