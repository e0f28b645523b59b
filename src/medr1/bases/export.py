"""A trained model as a plain Hugging Face folder, and, if asked, on the hub.

    medr1 export runs/ct --out exported --answers runs/ct/image.jsonl --push-to-hub me/ct-grpo

An adapter is merged into its base in float32 and only then rounded to the type asked for. A base that was in 4 bits is
what these 4 bits stand for, in float32, and not the base as published: the adapter was trained on the former. The
folder loads in transformers, vLLM and llama.cpp's converter without this package.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError
from tabulate import tabulate

from medr1 import NOTICE
from medr1.config import EXPORTED, RECIPE, Config, load_config, to_toml
from medr1.errors import MedR1Error
from medr1.evaluation.metrics import summarise
from medr1.evaluation.rows import read_rows, said
from medr1.evaluation.run import weights_fingerprint
from medr1.policy import four_bit
from medr1.policy.vlm import disk_errors, load_vlm, merged, refuse_not_finite
from medr1.report.pages import package_versions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(
    model: str, out: Path, *, dtype: str = "float32", answers: Sequence[Path] = (), name: str | None = None
) -> dict[str, Any]:
    """Write a model, its adapter merged, with processor, generation settings, recipe and model card.

    Args:
        model: a run's folder, or anything that `load_vlm` takes.
        out: a new folder, or one of an earlier export, which is replaced when the new one is whole.
        dtype: a key of DTYPES.
        answers: files of `medr1 eval` with this model, for the card.
        name: the model's name on its card; default is the folder's.

    Returns:
        folder, base, merged (whether there was an adapter), dequantised (whether the base was in 4 bits), dtype,
        parameters, bytes.

    Raises:
        MedR1Error: an unfinished run, an unknown type, `out` holds other files, no answers in a file, or a full disk.
    """
    if dtype not in DTYPES:
        raise MedR1Error(f"--dtype {dtype}: is not known; choose {', '.join(DTYPES)}")
    if out.exists() and not (out / EXPORTED).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise MedR1Error(f"{out}: holds files that are not of an export; name a new folder")
    run = Path(model).expanduser()
    recipe = load_config(run / RECIPE) if (run / RECIPE).is_file() else None
    is_run = recipe is not None and not (run / "config.json").is_file()  # an export holds its recipe too
    if is_run and not (run / "model").is_dir():
        raise MedR1Error(f"{run}: holds no model yet; train to the end with the command that began it")
    source = str(run / "model") if is_run else model
    vlm = load_vlm(source, dtype="float32", device="cpu")
    weights = weights_fingerprint(vlm.model) if answers else ""
    evaluations = [_evaluation(path, (model, source), weights) for path in answers]
    has_adapter, in_four_bits = vlm.core is not vlm.model, four_bit.is_four_bit(vlm.core)
    core: Any = merged(vlm)
    core = (four_bit.dequantised(core) if four_bit.is_four_bit(core) else core).to(DTYPES[dtype])
    refuse_not_finite(core, f"{model} in {dtype}")
    base = _public_name(recipe.model.name if recipe else _base(source))
    about = {
        "base_model": base,
        "merged_adapter": has_adapter,
        "dequantised": in_four_bits,
        "dtype": dtype,
        "weights_sha256": weights_fingerprint(core),
        "versions": package_versions(),
    }
    card = _card(name or out.resolve().name, about, recipe, evaluations)

    def write(folder: Path) -> None:
        core.save_pretrained(folder)
        vlm.processor.save_pretrained(folder)
        if recipe:
            (folder / RECIPE).write_text(to_toml(_without_folders(recipe)), encoding="utf-8")
        (folder / EXPORTED).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")

    _replace_folder(out.resolve(), write)
    return {
        "folder": str(out),
        "base": base,
        "merged": has_adapter,
        "dequantised": in_four_bits,
        "dtype": dtype,
        "parameters": core.num_parameters(),
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }


def push_to_hub(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload an exported folder as one commit; the repository is made where there is none, private by default.

    Returns:
        Address of the commit.

    Raises:
        MedR1Error: no `README.md` with the research notice, the hub refuses or cannot be reached, or the repository is
            public and `public` was not asked for.
    """
    card = folder / "README.md"
    if not card.is_file() or NOTICE not in card.read_text(encoding="utf-8"):
        raise MedR1Error(f"{card}: does not carry the research notice; export again")
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise MedR1Error(f"--push-to-hub {repository}: is a public repository; add --public to publish there")
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="medr1 export")
    except (HTTPError, OSError, ValueError) as error:  # no answer; no token, or a refusal; a bad name
        reason = " ".join(str(error).split())[:200]
        raise MedR1Error(
            f"--push-to-hub {repository}: {reason}; log in with `hf auth login`, check name and network,"
            f" and run the same command again"
        ) from error
    return commit.commit_url


def _replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """A folder in the place of an older one when it is whole, never a half."""
    hidden = folder.parent / f".{folder.name}.saving"
    try:
        with disk_errors(folder):
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
            write(hidden)
            shutil.rmtree(folder, ignore_errors=True)
            hidden.replace(folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _base(source: str) -> str:
    """Name of the base of an adapter's folder; a model is its own base."""
    adapter = Path(source) / "adapter_config.json"
    return json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter.is_file() else source


def _public_name(name: str) -> str:
    """A hub name as it is; of a folder only its own name, since the rest is about the machine it lies on."""
    is_folder = name and (Path(name).expanduser().exists() or name.startswith((".", "/", "~")))
    return Path(name).resolve().name if is_folder else name


def _without_folders(recipe: Config) -> Config:
    """The recipe with nothing of this machine: of folders, and of files with own functions, the names alone, and no
    addresses of servers.
    """

    def of_a_file(function: str) -> str:
        module, colon, name = function.rpartition(":")
        return f"{Path(module).name}{colon}{name}" if Path(module).suffix == ".py" or "/" in module else function

    parts = {
        "data": {"path": _public_name(recipe.data.path), "image_root": _public_name(recipe.data.image_root)},
        "model": {"name": _public_name(recipe.model.name)},
        "rollout": {"vllm_url": tuple(f"http://server-{place}" for place in range(len(recipe.rollout.vllm_url)))},
        "grpo": {
            "rewards": {of_a_file(name): weight for name, weight in recipe.grpo.rewards.items()},
            "judge": recipe.grpo.judge.partition("@http")[0],
        },
        "draws": {"weights": of_a_file(recipe.draws.weights)},
    }
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=part) for name, part in parts.items()}
    )


def _evaluation(path: Path, names: Sequence[str], weights: str) -> dict[str, Any]:
    """What the card says of one file of answers: a caption, a Markdown table and the overall result.

    Args:
        names: what the model may be called in it.
        weights: the model's `weights_fingerprint` in float32, by which it is known under any name.
    """
    rows = read_rows(path)
    first = rows[0]
    places = {Path(name).expanduser().resolve() for name in names}
    by_weights = bool(first.get("weights")) and weights.startswith(first["weights"])
    if not by_weights and Path(first["model"]).expanduser().resolve() not in places:
        raise MedR1Error(
            f"{path}: holds answers of {said(first, 'model')}, not of {names[0]}; give the answers of this one"
        )
    summary = summarise(rows)
    if summary["accuracy"] is None:
        raise MedR1Error(f"{path}: holds no answer to a multiple-choice question that was not trained on; leave it out")
    cells = [*summary["by_modality"].items(), *summary["by_question_type"].items(), ("all", summary)]
    lines = [
        [name, cell["n"], f"{100 * cell['accuracy']:.1f}", _span(cell["ci95"]), f"{100 * cell['chance']:.1f}"]
        for name, cell in cells
        if cell["accuracy"] is not None
    ]
    head = ["", "n", "accuracy, %", "95 % interval", "chance, %"]
    return {
        "caption": f"`{path.name}`: condition {first['condition']}, mode {first['mode']}.",
        "table": tabulate(lines, head, tablefmt="github", disable_numparse=True),
        "data": ", ".join(sorted({row["source"] for row in rows})),
        "condition": first["condition"],
        "accuracy": summary["accuracy"],
    }


def _span(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _card(name: str, about: dict[str, Any], recipe: Config | None, evaluations: list[dict[str, Any]]) -> str:
    measured = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type="multiple-choice",
            dataset_name=f"{evaluation['data']}, condition {evaluation['condition']}",
            metric_type="accuracy",
            metric_value=round(evaluation["accuracy"], 4),
        )
        for evaluation in evaluations
    ]
    base = about["base_model"]
    published = base.partition("@")[0]  # the hub refuses a card whose base is not the bare name of a repository
    data = ModelCardData(
        model_name=name,
        base_model=published if published.count("/") == 1 else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["medr1", "research-use-only"],
        eval_results=measured or None,
    )
    card = ModelCard.from_template(
        data,
        template_str=(files("medr1.bases") / "export-card.md.j2").read_text(encoding="utf-8"),
        name=name,
        notice=NOTICE,
        base=base,
        merged=about["merged_adapter"],
        dequantised=about["dequantised"],
        recipe=recipe and _without_folders(recipe),
        evaluations=evaluations,
        **{key: about[key] for key in ("dtype", "weights_sha256", "versions")},
    )
    return str(card)
