"""The recipe of a training run: defaults are the vetted setting, a TOML file says what differs.

    medr1 config                       # print every field with its meaning and default
    medr1 train --config recipe.toml --set optimizer.learning_rate=2e-6

Unknown keys are refused with the nearest known name. The resolved recipe is written beside the checkpoint.
"""

import difflib
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medr1.errors import MedR1Error

RECIPE = "recipe.toml"
"""The recipe's file in the folder of a run."""
EXPORTED = "medr1.json"
"""In an exported folder: what it was made from."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """The policy to start from."""

    name: str = Field("tiny", description="a hub name, a local folder, or 'tiny' (in the package)")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="what is computed in; auto: bfloat16 where the GPU has it, else float32 (full fine-tuning keeps"
        " float32 weights in any case)",
    )
    quantize: Literal["none", "nf4"] = Field(
        "none",
        description="nf4: keep the base's linear layers in 4 bits (bitsandbytes, double quantisation) under a LoRA"
        " adapter, where 16 bits a weight do not fit",
    )
    lora_rank: int = Field(0, ge=0, description="rank of a LoRA adapter; 0: full fine-tuning")
    lora_alpha: int = Field(32, ge=1, description="LoRA scale: the update is multiplied by alpha / rank")
    lora_targets: Literal["language", "vision", "both"] = Field(
        "language",
        description="where the adapter's layers are: the language model, the vision tower with its projector (where"
        " images are unlike those that the base has seen), or both",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile of the text layers in training; auto: on a GPU"
    )
    train_vision: bool = Field(True, description="train the vision tower too (full fine-tuning only); false: frozen")
    min_pixels: int = Field(0, ge=0, description="an image is scaled up to so many pixels; 0: the model's own limit")
    max_pixels: int = Field(
        0,
        ge=0,
        description="an image is scaled down to so many pixels; 0: the model's own limit, and for Qwen-VL's hub models"
        " the published 401408",
    )

    @property
    def loading(self) -> dict[str, Any]:
        """What `load_vlm` is told beside the name."""
        return {name: getattr(self, name) for name in ("dtype", "quantize", "min_pixels", "max_pixels")}


class DataConfig(_Section):
    """Which records, and how they are divided."""

    path: str = Field("phantoms", description="a data set's folder or table, hub:OWNER/NAME, or 'phantoms'")
    image_root: str = Field("", description="folder that image paths start from, where it is not the data's own")
    language: str = Field("en", description="keep rows in this language where rows say theirs (SLAKE); 'all': each")
    modalities: tuple[str, ...] = Field((), description="keep these modalities; empty: all")
    question_types: tuple[str, ...] = Field((), description="keep these question types; empty: all")
    sources: tuple[str, ...] = Field((), description="keep these sources; empty: all")
    skip_unreadable: bool = Field(False, description="leave out and list records whose images cannot be read")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share of records held out, by image or patient group")
    split_seed: int = Field(0, description="seed of the split")
    validation: bool = Field(
        False,
        description="hold out such a share of the training part instead, by the next split seed, and leave the held-out"
        " part alone: to choose steps, rates and objectives before anything is asked of it",
    )
    num_phantoms: int = Field(1600, ge=16, description="images to draw where path is 'phantoms' (five questions each)")


class RolloutConfig(_Section):
    """How the policy is sampled."""

    mode: Literal["think", "no-think", "think-after"] = Field(
        "think", description="rationale then letter, letter alone, or letter then rationale"
    )
    num_completions: int = Field(8, ge=1, description="G, completions a prompt; at least 2 for GRPO")
    max_new_tokens: int = Field(256, ge=1, description="a completion is cut here and counted as truncated")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; the scored policy has the same")
    drafts: bool = Field(
        True,
        description="guess tokens from what was written and decode several a call; the completions stay the same"
        " (local engine; not where a GPU holds a step of decoding in a graph)",
    )
    engine: Literal["local", "vllm", "vllm-colocate"] = Field(
        "local",
        description="who samples: this process, a vLLM server, or vllm-colocate: vLLM in this process, installed beside"
        " medr1",
    )
    vllm_url: tuple[str, ...] = Field(
        ("http://127.0.0.1:8000/v1",),
        min_length=1,
        description="that server, up to and with /v1, or several with commas between, which share out the prompts",
    )
    vllm_transfer: Literal["files", "nccl"] = Field(
        "files",
        description="how servers get weights in full fine-tuning: files in the run's folder, or nccl: from GPU to GPU"
        " by vLLM's own transfer, where vLLM is installed beside medr1 (no GPU has run it yet)",
    )
    ahead: int = Field(
        0,
        ge=0,
        le=1,
        description="1: the server samples each step while the one before trains, by weights one update older, which"
        " the ratio policy / server corrects; where sampling and training take about as long; 0: nobody samples"
        " meanwhile",
    )
    vllm_memory: float = Field(
        0.3,
        gt=0,
        le=1,
        description="share of the GPU's memory that vLLM in this process takes while it samples, its weights included;"
        " more of it answers more prompts at a time (on a CPU of the machine's memory, or VLLM_CPU_KVCACHE_SPACE GiB)",
    )
    vllm_tensor_parallel: int = Field(
        1,
        ge=1,
        description="processes that divide one vllm-colocate engine among their GPUs, for a model too large for one;"
        " at 1 each has an engine of its own",
    )

    @field_validator("vllm_url", mode="before")
    @classmethod
    def _urls(cls, said: Any) -> Any:
        return [url.strip() for url in said.split(",")] if isinstance(said, str) else said

    @field_validator("vllm_url")
    @classmethod
    def _each_once(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [url for url, count in Counter(urls).items() if count > 1]:
            raise ValueError(f"names {twice[0]} twice; name each server once")
        return urls


class GRPOConfig(_Section):
    """The objective; see objective.py for the formulas."""

    rewards: dict[str, float] = Field(
        {"accuracy": 1.0, "format": 0.2},
        description="reward -> weight; a name, or 'FILE.py:function' or 'module:function' of (reply, record, mode), or"
        " of (replies, records, mode), that gives finite numbers, or None where it does not apply",
    )
    judge: str = Field(
        "",
        description="openai:MODEL@URL of the model behind the reward 'judge', which says whether the answer to an open"
        " question means the same as the right one",
    )
    judge_agreement: float = Field(
        0.9,
        ge=0,
        le=1,
        description="least agreement of the judge with exact match on answers of the run's records; below, no training",
    )
    objective: Literal["grpo", "gspo", "cispo"] = Field(
        "grpo",
        description="what is clipped: the ratio of each token; gspo: of whole completions (with a small clip_low and"
        " clip_high, such as 0.0003); cispo: the weight of each token's gradient, so that no token loses it (with a"
        " clip_high such as 4)",
    )
    advantage_scale: Literal["group", "batch", "modality", "question_type", "none"] = Field(
        "group",
        description="divide by the standard deviation of rewards in the group, the whole step, or the step's questions"
        " of the same modality or question type (each then pulls alike), or by none (Dr. GRPO)",
    )
    aggregate: Literal["sequence", "token", "dr_grpo"] = Field(
        "sequence",
        description="average a sequence then the batch, all tokens alike, or by the constant of Dr. GRPO",
    )
    clip_low: float = Field(0.2, ge=0, description="ratio is clipped at 1 - clip_low")
    clip_high: float = Field(0.2, ge=0, description="ratio is clipped at 1 + clip_high")
    delta: float = Field(
        0.0,
        ge=0,
        description="the ratio of a completion worse than its group is clipped here too, such as at 4, against single"
        " huge steps off policy; 0: it is not",
    )
    mask_truncated: bool = Field(
        False,
        description="leave completions that were cut at max_new_tokens out of the loss; their rewards still count in"
        " their group",
    )
    entropy_bonus: float = Field(
        0.0, ge=0, description="weight of the mean entropy of tokens, which is raised, against replies that grow alike"
    )
    beta: float = Field(0.04, ge=0, description="weight of the KL to the reference; 0 loads no reference")
    reference: Literal["float32", "bfloat16", "cpu"] = Field(
        "float32",
        description="the copy that beta > 0 needs in full fine-tuning, which doubles the weights: bfloat16 halves it"
        " (its log-probs are rounded), cpu leaves it in main memory (slow); with LoRA it is the base without adapter",
    )
    kl_by_ratio: bool = Field(
        False,
        description="weight the KL of each token by its ratio, which makes its gradient that of the true KL (the"
        " default of TRL 1.16)",
    )
    kl_clamp: float = Field(
        0.0,
        ge=0,
        description="the KL's estimate is cut here for each token, such as at 10, so that one rare token cannot rule a"
        " step; 0: it is not",
    )
    num_iterations: int = Field(1, ge=1, description="updates on each batch of rollouts; 1 is on-policy")
    perception: float = Field(
        0.0,
        ge=0,
        description="weight of a term that makes replies less probable under another image (PAPO); one more prompt a"
        " question, and its completions again",
    )
    perception_cap: float = Field(2.0, gt=0, description="a token's part in that term is cut here, in nats")
    perception_entropy: float = Field(
        0.0, ge=0, description="weight of both images' entropies, made small beside that term (PAPO's double entropy)"
    )
    hold_to_chance: float = Field(
        0.0,
        ge=0,
        description="weight of a term that keeps an answer from being likelier than the other options under another"
        " image, where the reply first says it; one more prompt a question, and the options behind each beginning",
    )
    rollout_ratio_cap: float = Field(
        2.0, gt=0, description="cap of the ratio policy / server for each token; only where a server samples"
    )

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if ("judge" in self.rewards) != bool(self.judge):
            raise ValueError("the reward 'judge' and grpo.judge = openai:MODEL@URL go together; set both or neither")
        if self.delta and self.objective == "cispo":
            raise ValueError("grpo.delta clips the ratio of grpo and gspo; set it to 0 with grpo.objective = cispo")
        if self.delta and self.delta <= 1 + self.clip_high:
            raise ValueError(
                f"grpo.delta = {self.delta} is not above 1 + grpo.clip_high = {1 + self.clip_high}; set a larger one,"
                " such as 4"
            )
        return self


class DrawsConfig(_Section):
    """Which records a step gets; as it stands, each once before any comes again."""

    weights: str = Field(
        "",
        description="how often each record is drawn: 'needs_image' (more often where texts and places of options do not"
        " give the answer away), or 'FILE.py:function' or 'module:function' that gives a number of at least 0 for each"
        " of the training records; empty: all alike",
    )
    exchanged_images: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of prompts that are asked about another training image, which was asked the same with the"
        " same options, so that any of these may be right",
    )
    balance: Literal["off", "modality", "question_type", "both"] = Field(
        "off",
        description="as many prompts of each modality, question type, or pair of the two, however many records each"
        " has; where the smaller ones count as much",
    )
    redraws: int = Field(
        0,
        ge=0,
        description="how often in a step a prompt whose completions all earned the same is replaced by the next one"
        " (DAPO's dynamic sampling); after that it stays and teaches nothing; GRPO only",
    )
    curriculum: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (),
        max_length=2,
        description="pass rates near which prompts are drawn: one, or those of the run's beginning and end, such as"
        " [0.8, 0.4], from easy to hard; others are mostly left aside; empty: no prompt is; GRPO only",
    )


class OptimizerConfig(_Section):
    """Steps and sizes."""

    steps: int = Field(0, ge=0, description="optimizer steps; 0: as many as `epochs` takes")
    epochs: float = Field(1.0, gt=0, description="passes over the training part, where steps is 0")
    prompts_per_step: int = Field(
        8,
        ge=1,
        description="prompts a step (SFT: examples), divided among the processes; any number of them does the same",
    )
    prompts_per_forward: int = Field(
        0,
        ge=0,
        description="prompts a forward pass of a process, for memory; the gradient is the same; 0: all of the step's",
    )
    name: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        description="adamw_8bit: AdamW whose two moments are kept in 8 bits each (bitsandbytes), 2 bytes a trained"
        " weight in place of 8, where these do not fit",
    )
    learning_rate: float = Field(1e-6, gt=0, description="peak rate of AdamW")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field("linear", description="after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="seed of the data order, of an adapter's first weights and of every sampled token",
    )


class LogConfig(_Section):
    """What is kept and when."""

    log_every: int = Field(1, ge=1, description="steps between log lines")
    save_every: int = Field(50, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept")
    eval_every: int = Field(0, ge=0, description="steps between evaluations on held-out records; 0: none")
    eval_records: int = Field(200, ge=1, description="held-out records in such an evaluation, drawn by the split seed")
    looking_every: int = Field(
        0,
        ge=0,
        description="steps between measurements of whether the policy looks: held-out records, each asked greedily with"
        " its own image and with another one of the modality, from before the first step on; 0: none",
    )
    looking_records: int = Field(
        64, ge=1, description="held-out records in such a measurement, the same each time, drawn by the split seed"
    )
    trackers: tuple[str, ...] = Field(
        (), description="integrations of transformers: tensorboard, wandb, mlflow, trackio"
    )
    completions_every: int = Field(
        50, ge=0, description="steps between completions with images in the trackers (GRPO); 0: numbers only"
    )


class Config(_Section):
    """A whole recipe."""

    method: Literal["grpo", "sft"] = Field("grpo", description="reinforcement learning, or the supervised baseline")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GRPOConfig = GRPOConfig()
    draws: DrawsConfig = DrawsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.method == "sft" and (self.draws.redraws or self.draws.curriculum):
            raise ValueError(
                "draws.redraws and draws.curriculum go by what replies earn; leave them out of method = sft"
            )
        if self.draws.redraws and self.rollout.vllm_tensor_parallel > 1:
            raise ValueError(
                "rollout.vllm_tensor_parallel: processes that share an engine ask it together, and draws.redraws asks"
                " in some; set one of them back"
            )
        if any("@" in url for url in self.rollout.vllm_url):  # here, where what is wrong is not quoted
            raise ValueError(
                "rollout.vllm_url holds a password, which a run would write down; leave it out, and set OPENAI_API_KEY"
            )
        if self.rollout.ahead:
            self._can_be_ahead()
        return self

    def _can_be_ahead(self) -> None:
        if self.rollout.engine != "vllm":
            raise ValueError("rollout.ahead is for a sampler of its own; set rollout.engine = vllm, or leave it at 0")
        for field, is_set, why in (
            ("draws.redraws", self.draws.redraws, "take the next step's records"),
            ("draws.curriculum", self.draws.curriculum, "chooses the next step's records by this one's replies"),
            ("grpo.num_iterations", self.grpo.num_iterations > 1, "would make weights older by as many updates"),
            ("grpo.rewards: image_margin", "image_margin" in self.grpo.rewards, "compares two images by one policy"),
        ):
            if is_set:
                raise ValueError(f"{field} {why}; leave it out, or rollout.ahead at 0")


def load_config(path: Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Defaults, then the TOML file, then overrides such as {"optimizer.learning_rate": 1e-5}.

    A table of rewards, in the file or an override, is all of them; {"grpo.rewards.consistency": 1.0} is one beside the
    others.

    Raises:
        MedR1Error: no such file, not TOML, or mistakes in it: each unknown key (the nearest known one is named) and
            each value out of range, all of them in one line.
    """
    values: dict[str, Any] = {}
    where = str(path) if path else "--set"
    if path is not None:
        if not path.is_file():
            raise MedR1Error(f"{path}: no such file; `medr1 config > {path.name}` writes one with every field")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise MedR1Error(f"{path}: not TOML ({error}); see `medr1 config` for an example") from error
    for key, value in (overrides or {}).items():
        section = values
        is_reward = key.startswith("grpo.rewards.")  # whose name may have dots in it
        *parents, last = key.split(".", 2 if is_reward else -1)
        for parent in parents:
            beside = GRPOConfig().rewards if is_reward and parent == "rewards" else {}
            section = section.setdefault(parent, dict(beside))
            if not isinstance(section, dict):
                raise MedR1Error(f"{where}: {parent} is a value, not a section; see `medr1 config`")
        section[last] = value
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise MedR1Error(f"{where}: {mistakes(error, known_keys(Config))}") from error


def mistakes(error: ValidationError, known: Sequence[str]) -> str:
    """All that is wrong with a recipe, in one line: a key with the one that was meant, a value with what it may be.

    Args:
        known: the dotted keys that a recipe may have.
    """
    said = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            said += [f"unknown key {wrong}; {_meant(wrong, known)}" for wrong in _leaves(key, problem["input"])]
        elif problem["type"] == "missing":
            said.append(f"{key} is missing")
        elif not key:
            said.append(message)
        else:
            said.append(f"{key} = {problem['input']!r}: {message[:1].lower()}{message[1:]}{_near_value(problem)}")
    return said[0] if len(said) == 1 else " ".join(f"({number}) {text}" for number, text in enumerate(said, 1))


def _near_value(problem: Any) -> str:
    choices = re.findall("'([^']*)'", str(problem.get("ctx", {}).get("expected", "")))
    near = difflib.get_close_matches(str(problem["input"]), choices, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _leaves(key: str, value: Any) -> list[str]:
    """The keys within an unknown section, so that each is told; an unknown key itself."""
    if isinstance(value, dict) and value:
        return [leaf for name, inner in value.items() for leaf in _leaves(f"{key}.{name}", inner)]
    return [key]


def _meant(key: str, known: Sequence[str]) -> str:
    """The known key that an unknown one can stand for: alike in its last part, and then in its section."""
    section, _, last = key.rpartition(".")

    def likeness(name: str) -> tuple[float, float]:
        parent, _, field = name.rpartition(".")
        return difflib.SequenceMatcher(None, last, field).ratio(), difflib.SequenceMatcher(
            None, section, parent
        ).ratio()

    nearest = max(known, key=lambda name: 2 * likeness(name)[0] + likeness(name)[1])
    if likeness(nearest)[0] >= 0.6:
        return f"did you mean {nearest}?"
    inside = [name for name in known if section and name.rpartition(".")[0] == section]
    return f"known: {', '.join(inside)}" if inside else "`medr1 config` lists them"


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key to both values, of each field in which two recipes differ."""
    found = {}
    for key in known_keys(Config):
        values = []
        for config in (one, other):
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            values.append(value)
        if values[0] != values[1]:
            found[key] = (values[0], values[1])
    return found


def recipe_of(model: str) -> Config | None:
    """The recipe of the run that made a model: the model is the run's folder, or lies in it; else None.

    Raises:
        MedR1Error: the recipe is damaged.
    """
    folder = Path(model).expanduser().resolve()
    found = next((place / RECIPE for place in (folder, folder.parent) if (place / RECIPE).is_file()), None)
    return load_config(found) if model != "tiny" and found else None


def parse_override(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` of --set, the value read as TOML, or as a plain string where it is none.

    Raises:
        MedR1Error: no "=" in it.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise MedR1Error(f"--set {text}: write KEY=VALUE, for example --set optimizer.learning_rate=1e-5")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def to_toml(config: Config) -> str:
    """The recipe as TOML, each field under a comment that says what it means."""
    lines: list[str] = []
    for name, field in Config.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            lines += ["", f"[{name}]  # {(type(value).__doc__ or '').strip()}"]
            for key, part in type(value).model_fields.items():
                lines += [f"# {part.description}", f"{key} = {_toml_value(getattr(value, key))}"]
        else:
            lines += [f"# {field.description}", f"{name} = {_toml_value(value)}"]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items()) + " }"
    return repr(value)


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted keys of all fields."""
    keys = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += known_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys
