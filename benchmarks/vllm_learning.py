"""Does GRPO learn from vLLM's rollouts as it does from the local sampler's? Side by side, some seeds.

    python benchmarks/vllm_learning.py write MODEL     # the tiny model in a folder, to be served
    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --dtype float32 --logprobs-mode processed_logprobs
    python benchmarks/vllm_learning.py run MODEL --out runs/vllm-learning
    python benchmarks/vllm_learning.py run MODEL --engine ahead --beside vllm --prompts 16 --out runs/ahead
    python benchmarks/vllm_learning.py run tiny --engine vllm-colocate --out runs/colocate-learning   # beside vLLM

Writes table.md and curves.svg into the output folder; stopped, the same command goes on. What `write` writes is
the tiny model with an output head of its own: a server of vLLM's CPU build does not renew one that is tied.
"""

import statistics
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer

from medr1.config import Config, load_config
from medr1.data.parts import load_parts
from medr1.data.records import read_jsonl, write_atomic
from medr1.policy.vlm import load_vlm
from medr1.training import GRPOTrainer

ENGINES: dict[str, dict[str, Any]] = {
    "local": {"rollout.engine": "local"},
    "vllm": {"rollout.engine": "vllm"},
    "vllm-colocate": {"rollout.engine": "vllm-colocate"},
    "ahead": {"rollout.engine": "vllm", "rollout.ahead": 1},
}
COLOURS = ("#1b6ca8", "#d1495b")
WINDOW = 10
"""Steps that the first and the last reward of a run are averaged over."""

app = typer.Typer(add_completion=False)


@app.command()
def write(model: Path) -> None:
    """Write the tiny model, its head untied from its embeddings, into a folder."""
    vlm = load_vlm("tiny", dtype="float32")
    head, embeddings = vlm.core.lm_head, vlm.core.get_input_embeddings()
    for config in (vlm.core.config, vlm.core.config.get_text_config()):
        config.tie_word_embeddings = False
    head.weight = torch.nn.Parameter(embeddings.weight.detach().clone())
    vlm.core.save_pretrained(model)
    vlm.processor.save_pretrained(model)


def recipe(
    model: Path, engine: str, seed: int, steps: int, url: str, prompts: int, new_tokens: int, beta: float
) -> Config:
    return load_config(
        overrides={
            "model.name": str(model),
            "data.path": "phantoms",
            "data.num_phantoms": 400,
            "rollout.num_completions": 8,
            "rollout.max_new_tokens": new_tokens,
            **ENGINES[engine],
            "rollout.vllm_url": url,
            "grpo.beta": beta,
            "optimizer.steps": steps,
            "optimizer.prompts_per_step": prompts,
            "optimizer.learning_rate": 1e-4,
            "optimizer.schedule": "constant_with_warmup",
            "optimizer.warmup_steps": 5,
            "optimizer.seed": seed,
            "log.save_every": 20,
        }
    )


@app.command()
def run(
    model: Path,
    out: Annotated[Path, typer.Option()],
    steps: Annotated[int, typer.Option(min=2 * WINDOW)] = 60,
    seeds: Annotated[int, typer.Option(min=2)] = 6,
    url: Annotated[str, typer.Option()] = "http://127.0.0.1:8000/v1",
    engine: Annotated[str, typer.Option(help=f"one of {', '.join(ENGINES)}")] = "vllm",
    beside: Annotated[str, typer.Option(help="the engine to compare it with")] = "local",
    prompts: Annotated[int, typer.Option(help="a step")] = 8,
    new_tokens: Annotated[int, typer.Option(help="of a completion, at most")] = 48,
    beta: Annotated[float, typer.Option(help="of the KL to the reference")] = 0.0,
) -> None:
    """Train with both engines and every seed; compare."""
    logs: dict[str, list[list[dict[str, Any]]]] = {beside: [], engine: []}
    for seed in range(seeds):
        for engine in logs:
            folder = out / f"{engine}-{seed}"
            if not (folder / "model").is_dir():
                config = recipe(model, engine, seed, steps, url, prompts, new_tokens, beta)
                GRPOTrainer(load_vlm(str(model), dtype="float32"), config, *load_parts(config.data), folder).run()
            logs[engine].append([row for row in read_jsonl(folder / "log.jsonl") if "reward" in row])
    table = tabulate(logs)
    write_atomic(out / "table.md", table)
    plot(logs, out / "curves.svg")
    print(table)


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(row[name] for row in rows if name in row)


def tabulate(logs: dict[str, list[list[dict[str, Any]]]]) -> str:
    """One row a run; then what pairs of them differ by, the standard error over seeds in brackets."""
    lines = [
        f"| engine | seed | reward, first {WINDOW} steps | last {WINDOW} | accuracy, last {WINDOW} | seconds a step"
        " | mean abs. difference of log-probs | capped tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for engine, runs in logs.items():
        for seed, rows in enumerate(runs):
            first, last = rows[:WINDOW], rows[-WINDOW:]
            mismatch = f"{mean(rows, 'rollout_difference'):.1e}" if engine != "local" else "–"
            capped = f"{mean(rows, 'rollout_capped'):.1e}" if engine != "local" else "–"
            lines.append(
                f"| {engine} | {seed} | {mean(first, 'reward'):.3f} | {mean(last, 'reward'):.3f}"
                f" | {mean(last, 'reward_accuracy'):.3f} | {mean(rows, 'step_seconds'):.2f} | {mismatch} | {capped} |"
            )
    pairs = list(zip(*logs.values(), strict=True))
    gaps = [mean(other[-WINDOW:], "reward") - mean(one[-WINDOW:], "reward") for one, other in pairs]
    ratios = [mean(other, "step_seconds") / mean(one, "step_seconds") for one, other in pairs]
    beside, engine = logs
    lines += ["", f"{engine} minus {beside}, last {WINDOW} steps: {_estimate(gaps, '+.3f')}"]
    lines += ["", f"Seconds a step, {engine} over {beside}: {_estimate(ratios, '.3f')}"]
    return "\n".join(lines) + "\n"


def _estimate(values: list[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ({statistics.stdev(values) / len(values) ** 0.5:.3f})"


def plot(logs: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Reward against step: a thin line a seed, a thick one their mean."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for colour, (engine, runs) in zip(COLOURS, logs.items(), strict=True):
        curves = [[row["reward"] for row in rows] for rows in runs]
        for curve in curves:
            axes.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.25, linewidth=1)
        means = [statistics.mean(values) for values in zip(*curves, strict=True)]
        axes.plot(
            range(1, len(means) + 1),
            means,
            color=colour,
            linewidth=2,
            label=f"{engine}, mean of {len(curves)}",
        )
    axes.set(xlabel="step", ylabel="mean reward", title="GRPO on phantoms, tiny model: who samples")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    app()
