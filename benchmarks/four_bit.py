"""Does an adapter on a base in 4 bits learn as one on the base as it is? Both, side by side, three seeds.

    python benchmarks/four_bit.py --out runs/four-bit      # writes table.md there; stopped, it goes on

The tiny model on phantoms; LoRA on language model and vision tower. NF4 keeps 2.13 of its 2.53 million weights, which
are all linear layers. On a CPU the base "as it is" computes in float32.
"""

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from medr1.config import Config, load_config
from medr1.data.parts import load_parts
from medr1.data.records import write_atomic
from medr1.evaluation.metrics import paired_change, summarise
from medr1.evaluation.run import evaluate
from medr1.policy.vlm import load_vlm
from medr1.training.run import train

BASES = ("none", "nf4")


def recipe(quantize: str, seed: int, steps: int) -> Config:
    return load_config(
        overrides={
            "model.quantize": quantize,
            "model.lora_rank": 16,
            "model.lora_targets": "both",
            "data.num_phantoms": 400,
            "rollout.mode": "no-think",
            "rollout.max_new_tokens": 24,
            "grpo.beta": 0.0,
            "optimizer.steps": steps,
            "optimizer.learning_rate": 5e-4,
            "optimizer.schedule": "constant_with_warmup",
            "optimizer.warmup_steps": 5,
            "optimizer.seed": seed,
            "log.save_every": 20,
        }
    )


def main(
    out: Annotated[Path, typer.Option()],
    steps: Annotated[int, typer.Option(min=1)] = 80,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Train with both bases and every seed, ask the same held-out questions, compare."""
    rows: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for seed in (None, *range(seeds)):
        for quantize in BASES:
            config = recipe(quantize, seed or 0, steps)
            name = "base" if seed is None else str(seed)
            model = "tiny" if seed is None else train(config, out / f"{quantize}-{seed}")["model"]
            rows[quantize, seed] = evaluate(
                load_vlm(model, **config.model.loading),
                load_parts(config.data)[1],
                mode=config.rollout.mode,
                out=out / f"{quantize}-{name}.jsonl",
                max_new_tokens=config.rollout.max_new_tokens,
            )
    table = tabulate(rows, seeds)
    write_atomic(out / "table.md", table)
    print(table)


def tabulate(rows: dict[tuple[str, int | None], list[dict[str, Any]]], seeds: int) -> str:
    lines = ["| base | " + " | ".join(["before", *(f"seed {seed}" for seed in range(seeds)), "mean"]) + " |"]
    lines.append("|---" * (seeds + 3) + "|")
    for quantize in BASES:
        told = [100 * summarise(rows[quantize, seed])["accuracy"] for seed in (None, *range(seeds))]
        cells = [f"{number:.1f}" for number in [*told, statistics.mean(told[1:])]]
        lines.append(f"| {'4 bits' if quantize == 'nf4' else 'as it is'} | {' | '.join(cells)} |")
    change = paired_change(*(over_seeds(rows, quantize, seeds) for quantize in BASES))
    low, high = (100 * limit for limit in change["ci95"])
    lines += [
        "",
        f"4 bits minus as it is, in points: {100 * change['difference']:+.1f} ({low:+.1f} to {high:+.1f};"
        f" {change['n']} held-out questions on {change['groups']} images, each averaged over {seeds} seeds)",
    ]
    return "\n".join(lines) + "\n"


def over_seeds(rows: dict[tuple[str, int | None], list[dict[str, Any]]], quantize: str, seeds: int) -> list[Any]:
    """One row a question, `correct` its mean over seeds."""
    runs = zip(*(rows[quantize, seed] for seed in range(seeds)), strict=True)
    return [{**same[0], "correct": statistics.mean(bool(row["correct"]) for row in same)} for same in runs]


if __name__ == "__main__":
    typer.run(main)
