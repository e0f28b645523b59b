"""Med-R1 against TRL's GRPOTrainer and against `generate`, in one run, alternating.

    python benchmarks/bench.py              # everything: tables, growth.svg, results.json
    python benchmarks/bench.py --quick      # the two headline settings once, under a minute
    python benchmarks/bench.py --model DIR  # one model folder: step, parts and peak memory at 16 and 48 tokens
    python benchmarks/bench.py --profile    # only: torch profiler tables of one step of ours, profile-*.txt

Each round makes one whole training step of ours and one of TRL's, through their own `train()`, on the same prompts
and from the same weights; a ratio is the median over rounds of TRL's time over ours in that round. The parts of a
step are timed inside these same steps. Peak memory is taken in a process of its own for each side. The last line of
stdout is one JSON object; what a run did not measure is null in it.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from workload import (
    MODE,
    Workload,
    from_json,
    only_ends_by_eos,
    our_trainer,
    to_json,
    trl_trainer,
    write_files,
    write_model,
    write_records,
)

from medr1.data.images import load_image
from medr1.data.prompts import build_messages
from medr1.evaluation.run import evaluate
from medr1.policy.encoding import PromptBatch
from medr1.policy.vlm import VLM, load_vlm
from medr1.study.demo import demo_config
from medr1.training import collecting, grpo
from medr1.training.run import train

HERE = Path(__file__).resolve().parent
HEADLINE = (Workload("no-think, 16 tokens", new_tokens=16), Workload("think, 48 tokens"))
OTHERS = (
    Workload("160 tokens", new_tokens=160),
    Workload("392 px", pixels=392),
    Workload("short prompt", short_prompt=True),
    Workload("beta 0", beta=0.0),
    Workload("LoRA 8", lora_rank=8),
)
GROWTH = tuple(
    Workload(f"G = {completions}, {headline.new_tokens} tokens", headline.new_tokens, completions)
    for headline in HEADLINE
    for completions in (4, 16, 32)
)
PARTS = ("rollout", "policy", "reference")
SHARED_IMAGE = (
    Workload("4 questions an image, 16 tokens", new_tokens=16, questions=4),
    Workload("4 questions an image, 48 tokens", questions=4),
)
MEMORY = (Workload("think, 48 tokens"), Workload("with gradient checkpointing", checkpointing=True))
EVALUATION_BATCH = 32
PRINTED = ("growth_4_32", "shared_image", "drafts", "evaluation", "memory")
MIB = 2**20


class Stopwatch(TrainerCallback):
    """Seconds of one `train()` call: whole, and of the parts whose functions it wraps, without nested parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.clear()
        self.began = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds["step"] = time.perf_counter() - self.began

    def wrap(self, owner: Any, function: str, part: Callable[[], str]) -> None:
        """Time calls of `owner.function` as the part that `part()` names at the call."""
        original = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            name = part()
            self.inner.append(0.0)
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - began
                self.seconds[name] += seconds - self.inner.pop()
                if self.inner:
                    self.inner[-1] += seconds

        setattr(owner, function, timed)


def scoring() -> str:
    """Log-probs with gradient are the policy's, without they are the reference's."""
    return "policy" if torch.is_grad_enabled() else "reference"


class Side:
    """One trainer and the stopwatch on it."""

    def __init__(self, name: str, workload: Workload, records: list[Any], folder: Path, vlm: VLM | None = None) -> None:
        self.watch = Stopwatch()
        self.trainer: Any
        if name == "ours":
            self.trainer = our_trainer(workload, records, folder, vlm)
            self.watch.wrap(self.trainer, "_update", lambda: "policy")
        else:
            self.trainer = trl_trainer(workload, records, folder)
            self.watch.wrap(self.trainer, "training_step", lambda: "policy")
            self.watch.wrap(self.trainer, "_prepare_inputs", lambda: "rest")
            self.watch.wrap(self.trainer, "_generate_single_turn", lambda: "rollout")
            self.watch.wrap(self.trainer, "_get_per_token_logps_and_entropies", scoring)
        self.trainer.add_callback(self.watch)

    def step(self) -> dict[str, float]:
        """Seconds of one training step by part."""
        gc.collect()
        self.trainer.train()
        return dict(self.watch.seconds)


@contextlib.contextmanager
def timed_functions(side: Side) -> Iterator[None]:
    """The two functions of our trainer's modules that are parts of their own, while `side` steps."""
    originals = collecting.sample, grpo.completion_logprobs
    side.watch.wrap(collecting, "sample", lambda: "rollout")
    side.watch.wrap(grpo, "completion_logprobs", scoring)
    try:
        yield
    finally:
        collecting.sample, grpo.completion_logprobs = originals


def compare(workload: Workload, rounds: int) -> dict[str, Any]:
    """Alternate steps of ours and TRL's: median seconds of both by part, and medians of the rounds' ratios."""
    times: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = write_files(workload, folder)
        ours, trl = Side("ours", workload, records, folder), Side("trl", workload, records, folder)
        prompts = check_same_work(ours.trainer, trl.trainer, workload)
        with timed_functions(ours):
            for number in range(rounds + 1):  # the first is a warm-up
                for side, key in ((ours, "ours"), (trl, "trl")):
                    seconds = side.step()
                    if number:
                        times[key].append(seconds)
        lengths = [
            next(log[name] for log in side.trainer.state.log_history if name in log)
            for side, name in ((ours, "completion_tokens"), (trl, "completions/mean_length"))
        ]
        assert lengths == [workload.new_tokens] * 2, f"both sample the same number of tokens: {lengths}"
    names = ("step", *(part for part in PARTS if part in times["trl"][0]))
    return {
        "name": workload.name,
        "prompt_tokens": prompts,
        "rounds": rounds,
        **{key: {part: statistics.median(t[part] for t in times[key]) for part in names} for key in times},
        "ratio": {
            part: statistics.median(t[part] / o[part] for o, t in zip(times["ours"], times["trl"], strict=True))
            for part in names
        },
        "step_ratios": [t["step"] / o["step"] for o, t in zip(times["ours"], times["trl"], strict=True)],
    }


def check_same_work(ours: Any, trl: Any, workload: Workload) -> int:
    """Both see the same prompt tokens and the same number of weights; the padded prompt length."""
    batch = ours.encode(ours.train_dataset)
    rows = {row["index"]: row for row in trl.train_dataset}
    for index, keep in enumerate(batch.attention_mask_BP.bool()):
        prompt = rows[index]["prompt"]
        text = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": rows[index]["image"]},
                    {"type": "text", "text": prompt[0]["content"]},
                ],
            }
        ]
        theirs = trl._tokenize_prompts([text])[0][0]
        assert batch.input_ids_BP[index][keep].tolist() == list(theirs), "both are asked the same"
    counts = [
        sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        for trainer in (ours, trl)
    ]
    assert counts[0] == counts[1], f"both train the same weights: {counts}"
    assert trl.generation_config.suppress_tokens == ours.vlm.banned_token_ids
    assert set(ours.vlm.stop_token_ids) <= set(ours.vlm.banned_token_ids), "no completion ends early"
    return batch.input_ids_BP.shape[1]


def peak_memory(side: str, workload: Workload) -> dict[str, float]:
    """Peak resident memory in MiB of two training steps, in a process of its own, above what it held before.

    What it held before is Python, libraries, policy and reference. The two AdamW moments are the model's own too and
    are subtracted; gradients and all else that a step allocates is counted.
    """
    command = [sys.executable, __file__, "--memory-of", side, to_json(workload)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(output.strip().splitlines()[-1])


def measure_memory(side: str, workload: Workload) -> dict[str, float]:
    """The measurement inside that process (Linux: the kernel's own high-water mark, reset before the steps)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = Side(side, workload, write_files(workload, folder), folder)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        held = status("VmRSS")
        one.step()
        one.step()
        peak = status("VmHWM")
        trained = sum(p.numel() * p.element_size() for p in one.trainer.model.parameters() if p.requires_grad)
    return {"peak": peak / MIB, "above": (peak - held - 2 * trained) / MIB}


def status(field: str) -> int:
    """A field of this process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def compare_evaluation(
    rounds: int, num_records: int, new_tokens: int, *, questions: int, small: bool = False
) -> dict[str, Any]:
    """Our evaluation of a set of records against `generate` a sample at a time; the answers must be the same."""
    ratios, seconds = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", pixels=224, small=small)
        records = write_records(folder / "images", count=num_records, pixels=224, questions=questions)
        vlm = only_ends_by_eos(load_vlm(str(folder / "model"), device="cpu"))
        model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(folder / "model")
        for number in range(rounds + 1):
            began = time.perf_counter()
            rows = evaluate(
                vlm,
                records,
                mode=MODE,
                out=folder / f"{number}.jsonl",
                max_new_tokens=new_tokens,
                batch_size=EVALUATION_BATCH,
            )
            between = time.perf_counter()
            replies = [generate_one(model, processor, record, vlm.banned_token_ids, new_tokens) for record in records]
            ended = time.perf_counter()
            assert [row["reply"] for row in rows] == replies, "evaluation and generate answer the same"
            if number:
                ratios.append((ended - between) / (between - began))
                seconds.append((between - began, ended - between))
    return {
        "records": num_records,
        "questions_an_image": questions,
        "new_tokens": new_tokens,
        "ours": statistics.median(o for o, _ in seconds),
        "generate": statistics.median(g for _, g in seconds),
        "ratio": statistics.median(ratios),
    }


def compare_sharing(workload: Workload, rounds: int) -> dict[str, Any]:
    """Our step with questions about one image that share its tokens, and with each prompt read by itself, in turn."""
    share = PromptBatch.split_after_images
    seconds: dict[str, list[float]] = {"apart": [], "shared": []}
    with tempfile.TemporaryDirectory() as name:
        records = write_files(workload, Path(name))
        sides = {
            way: Side("ours", workload, records, Path(name) / way, load_vlm(str(Path(name) / "model"), device="cpu"))
            for way in seconds
        }
        for number in range(rounds + 1):
            for way, side in sides.items():
                PromptBatch.split_after_images = share if way == "shared" else lambda *_: None  # type: ignore
                try:
                    step = side.step()["step"]
                finally:
                    PromptBatch.split_after_images = share  # type: ignore
                if number:
                    seconds[way].append(step)
    ratios = [apart / shared for apart, shared in zip(seconds["apart"], seconds["shared"], strict=True)]
    medians = {way: statistics.median(steps) for way, steps in seconds.items()}
    return {"name": workload.name, **medians, "ratio": statistics.median(ratios), "ratios": ratios}


def compare_drafts(steps: int = 0) -> dict[str, Any]:
    """The demo's training, each of its rollouts also decoded token by token: the same weights, prompts and draws.

    Args:
        steps: 0 for all of the recipe's.
    """
    config = demo_config(seed=0)
    if steps:
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"steps": steps})})
    drafted, seconds, calls, turned, rows = collecting.sample, [], [], 0, 0

    def both(*args: Any, drafts: Any = None, **kwargs: Any) -> Any:
        nonlocal turned, rows
        if drafts is None:  # the dry step
            return drafted(*args, **kwargs)
        found, took = {}, {}
        ways = {"plain": None, "drafts": drafts}
        for way in sorted(ways, reverse=len(seconds) % 2 == 0):  # in turn the first
            began = time.perf_counter()
            found[way] = drafted(*args, drafts=ways[way], **kwargs)
            took[way] = time.perf_counter() - began
        seconds.append(took)
        calls.append({way: rollout.num_calls for way, rollout in found.items()})
        pairs = list(zip(found["plain"].tokens, found["drafts"].tokens, strict=True))
        turned, rows = turned + sum(plain != other for plain, other in pairs), rows + len(pairs)
        return found["drafts"]

    with tempfile.TemporaryDirectory() as name:
        collecting.sample = both
        began = time.perf_counter()
        try:
            train(config, Path(name) / "train")
        finally:
            collecting.sample = drafted
        whole = time.perf_counter() - began
    assert turned <= rows / 1_000, f"{turned} of {rows} completions are not those of plain decoding"

    def total(values: list[dict[str, float]], way: str) -> float:
        return sum(value[way] for value in values)

    def ratio(first: int, last: int) -> dict[str, float]:
        return {
            key: total(values[first - 1 : last], "plain") / max(total(values[first - 1 : last], "drafts"), 1e-9)
            for key, values in (("seconds", seconds), ("calls", calls))
        }

    return {
        "steps": len(seconds),
        "completions": rows,
        "that rounding turned": turned,
        "start": ratio(1, 10),
        "steps 20 to 60": ratio(20, 60),
        "training, seconds": {
            "plain": whole - total(seconds, "drafts"),
            "drafts": whole - total(seconds, "plain"),
        },
        "rollouts, seconds": {way: total(seconds, way) for way in ("plain", "drafts")},
    }


def generate_one(model: Any, processor: Any, record: Any, banned: list[int], new_tokens: int) -> str:
    """A peer evaluator's loop body: one sample, the model's own `generate`, greedy."""
    text = processor.apply_chat_template(build_messages(record, MODE), tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[load_image(path) for path in record.images], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, suppress_tokens=banned)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def profile(out: Path) -> None:
    """Write where one training step of ours spends its time, by operator."""
    for workload in HEADLINE:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            one = Side("ours", workload, write_files(workload, folder), folder)
            with timed_functions(one):
                one.step()
                parts = one.step()
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                    one.trainer.train()
        parts["rest"] = parts["step"] - sum(parts[part] for part in PARTS)
        head = f"One step of ours, {workload.name}, G = 8, 4 prompts, 224 px, {torch.get_num_threads()} threads.\n"
        head += "Seconds without the profiler: " + ", ".join(f"{k} {parts[k]:.3f}" for k in ("step", *PARTS, "rest"))
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45)
        path = out / f"profile-{workload.new_tokens}.txt"
        path.write_text(f"{head}\n\n{table}\n")
        print(path)


def compare_on(model: str, rounds: int, out: Path) -> dict[str, Any]:
    """Time of a step and peak memory of both sides with the weights of a model folder, 2 prompts, G = 8."""
    workloads = [Workload(f"{tokens} tokens", tokens, num_prompts=2, model=model) for tokens in (16, 48)]
    results: list[dict[str, Any]] = []
    for workload in workloads:
        results.append(compare(workload, rounds))
        print(table_row(results[-1]), flush=True)
        results[-1]["memory_mib"] = {side: peak_memory(side, workload) for side in ("ours", "trl")}
    found = {"model": model, "prompts": 2, "G": 8, "workloads": results, "versions": versions()}
    (out / "results-model.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def plot_growth(curves: dict[int, dict[int, dict[str, Any]]], out: Path) -> None:
    """Step time over G, relative to G = 4, of both sides; `curves` by new tokens and G."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "medr1"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    # Okabe-Ito colours, and markers and lines that differ without colour too.
    styles = {"ours": ("Med-R1", "#0072B2", "o"), "trl": ("TRL", "#D55E00", "s")}
    for (tokens, curve), line in zip(curves.items(), ("--", "-"), strict=True):
        sizes = sorted(curve)
        for key, (label, colour, marker) in styles.items():
            steps = [curve[size][key]["step"] / curve[4][key]["step"] for size in sizes]
            axes.plot(sizes, steps, line, color=colour, marker=marker, label=f"{label}, {tokens} new tokens")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_xlabel("G, completions a prompt")
    axes.set_ylabel("time of a training step, G = 4 is 1")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "growth.svg", metadata={"Date": None})


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "peft", "accelerate")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "cpu_threads": str(torch.get_num_threads()),
    }


def table_row(result: dict[str, Any]) -> str:
    """A row of the Markdown table: seconds of TRL / ours, and their ratio, by part."""
    cells = [result["name"], str(result["prompt_tokens"])]
    for part in ("step", *PARTS):
        if part in result["ratio"]:
            cells.append(f"{result['trl'][part]:.2f} / {result['ours'][part]:.2f} = **{result['ratio'][part]:.1f}x**")
        else:
            cells.append("-")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the headline settings, once")
    parser.add_argument("--model", help="only: this model folder in place of the random weights")
    parser.add_argument("--profile", action="store_true", help="only profiler tables of ours")
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of the headline settings (others: 3 at most, growth 2)"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder for what is written")
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "WORKLOAD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.memory_of:
        print(json.dumps(measure_memory(args.memory_of[0], from_json(args.memory_of[1]))))
        return
    if args.profile:
        profile(args.out)
        return

    print("| seconds: TRL / ours = ratio | prompt tokens | whole step | rollout | policy | reference |")
    print("|---|---|---|---|---|---|")
    few = min(3, args.rounds)
    if args.model:
        print(json.dumps(compare_on(args.model, few, args.out)))
        return
    results = []
    for workload in HEADLINE if args.quick else (*HEADLINE, *OTHERS):
        results.append(compare(workload, 1 if args.quick else args.rounds if workload in HEADLINE else few))
        print(table_row(results[-1]), flush=True)
    short, long = results[:2]
    summary: dict[str, Any] = {
        "step_ratio_16": round(short["ratio"]["step"], 2),
        "step_ratio_48": round(long["ratio"]["step"], 2),
        "policy_ratio_16": round(short["ratio"]["policy"], 2),
        "policy_ratio_48": round(long["ratio"]["policy"], 2),
        "rollout_ratio_48": round(long["ratio"]["rollout"], 2),
        "memory_ratio": None,
        "growth_4_32": None,
        "eval_ratio": None,
        "draft_rollout_ratio": None,
        "draft_rollout_ratio_start": None,
        "demo_train_seconds_ratio": None,
        "shared_image_step_ratio": None,
    }
    detail: dict[str, Any] = {"workloads": results}
    if not args.quick:
        curves = {16: {8: short}, 48: {8: long}}
        for workload in GROWTH:
            results.append(compare(workload, min(2, args.rounds)))
            print(table_row(results[-1]), flush=True)
            curves[workload.new_tokens][workload.num_completions] = results[-1]
        plot_growth(curves, args.out)
        detail["growth_4_32"] = {
            key: {tokens: curve[32][key]["step"] / curve[4][key]["step"] for tokens, curve in curves.items()}
            for key in ("ours", "trl")
        }
        summary["growth_4_32"] = round(detail["growth_4_32"]["ours"][48], 2)
        detail["shared_image"] = [compare_sharing(workload, few) for workload in SHARED_IMAGE]
        summary["shared_image_step_ratio"] = round(detail["shared_image"][0]["ratio"], 2)
        detail["drafts"] = drafts = compare_drafts()
        summary["draft_rollout_ratio"] = round(drafts["steps 20 to 60"]["seconds"], 2)
        summary["draft_rollout_ratio_start"] = round(drafts["start"]["seconds"], 2)
        training = drafts["training, seconds"]
        summary["demo_train_seconds_ratio"] = round(training["plain"] / training["drafts"], 2)
        detail["evaluation"] = [
            compare_evaluation(few, num_records=64, new_tokens=tokens, questions=questions)
            for tokens, questions in ((48, 4), (48, 1), (16, 4), (16, 1))
        ]
        summary["eval_ratio"] = round(detail["evaluation"][0]["ratio"], 2)
        detail["memory"] = {
            workload.name: {side: peak_memory(side, workload) for side in ("ours", "trl")} for workload in MEMORY
        }
        first = detail["memory"][MEMORY[0].name]
        summary["memory_ratio"] = round(first["ours"]["above"] / first["trl"]["above"], 3)
        print("\n" + json.dumps({key: detail[key] for key in PRINTED}, indent=1))
    summary |= {"peer": f"trl {importlib.metadata.version('trl')} GRPOTrainer", "versions": versions()}
    if not args.quick:
        (args.out / "results.json").write_text(json.dumps(summary | detail, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
