"""Kept cells of a study as a folder of `benchmarks/looking.py`: plain GRPO, looking, and a reader of their reasoning.

    python results/looking_study.py configs/study-small-whole.toml DATA results/small-whole runs/looking-study
    python benchmarks/looking.py --data DATA --model runs/small/model --parts MRI --parts Ultrasound --parts OCT \
      --seeds 2 --steps 50 --out runs/looking-study --json
    python results/looking_real.py runs/looking-study results/looking-real

The benchmark then finds every run done. Asked are the study's questions of the modality that a model was trained on.
"""

import json
import sys
from pathlib import Path

from medr1.data.records import write_atomic, write_jsonl
from medr1.evaluation.controls import ALONE, as_shown
from medr1.evaluation.looking import kept_reasoning
from medr1.evaluation.run import evaluate
from medr1.policy.vlm import load_vlm
from medr1.study.keep import kept_cell, kept_file, whole_rows
from medr1.study.run import load_study, make_plan

PARTS = ("MRI", "Ultrasound", "OCT")
ARMS = {"accuracy": "grpo", "looking": "looking"}
SEEDS = (0, 1)


def main() -> None:
    keep, out = Path(sys.argv[3]), Path(sys.argv[4])
    plan = make_plan(load_study(Path(sys.argv[1]), sys.argv[2]))
    recipe, seed = plan.study.recipe, plan.study.recipe.data.split_seed
    settings = {"data": recipe.data.path, "model": recipe.model.name, "steps": recipe.optimizer.steps}
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "settings.json", json.dumps(settings))
    reader = load_vlm(recipe.model.name, **recipe.model.loading)
    asked = {cell.name: dict(plan.asked(cell)) for cell in plan.cells}
    for part in PARTS:
        runs = {"base-0": "base-think"} | {
            f"{arm}-{run}": f"modality-{part.lower()}-{method}-think-seed{run}"
            for arm, method in ARMS.items()
            for run in SEEDS
        }
        for name, cell in runs.items():
            folder, kept = out / part / name, kept_cell(kept_file(keep, cell))
            if kept is None or (folder / "done").exists():
                print(f"{cell}: {'not kept' if kept is None else 'done'}", file=sys.stderr)
                continue
            rows = {}
            for way in ("image", "shuffled"):
                shown = as_shown(asked[cell][way], way, seed, plan.donors)
                every = whole_rows(kept["evaluations"][way], shown, folder)
                rows[way] = [row for row in every if row["modality"] == part]
                write_jsonl(folder / f"{way}.jsonl", rows[way])
            evaluate(
                reader,
                [record for record in plan.test if record.modality == part],
                out=folder / "reader.jsonl",
                condition=ALONE,
                reasoning={row["id"]: kept_reasoning(row["reply"]) for row in rows["image"]},
                mode="think",
                max_new_tokens=plan.study.max_new_tokens["think"],
                batch_size=plan.study.batch_size,
                seed=seed,
            )
            (folder / "done").touch()


if __name__ == "__main__":
    main()
