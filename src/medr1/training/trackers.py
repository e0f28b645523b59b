"""Experiment trackers: transformers' own integrations send the numbers, this sends completions with their images.

    medr1 train --set 'log.trackers=["tensorboard", "wandb"]' …

Where a tracker keeps its runs, and whether it talks to a server, is set in its own environment variables
(TENSORBOARD_LOGGING_DIR, WANDB_MODE=offline, MLFLOW_TRACKING_URI, TRACKIO_DIR …).
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from medr1.data.images import load_image
from medr1.data.kept import code
from medr1.data.records import Record
from medr1.errors import MedR1Error

Row = dict[str, Any]

NAMES = ("tensorboard", "wandb", "mlflow", "trackio")
"""Trackers, and the packages of the same names that they need."""
THUMBNAIL = 224
"""Longest side of an image that is sent, in pixels."""
MAX_PROMPTS = 4
"""Prompts of a step whose completions are sent."""
COLUMNS = ("id", "question", "answer", "reply", "outcome", "letter", "reward", "advantage")


def check_trackers(names: Sequence[str]) -> None:
    """See that each tracker can be used, before anything is trained.

    Raises:
        MedR1Error: an unknown name, a package that is not installed, or W&B without a login.
    """
    for name in names:
        if name not in NAMES:
            raise MedR1Error(f"log.trackers: {name} is not known; choose {', '.join(NAMES)}")
        if importlib.util.find_spec(name) is None:
            raise MedR1Error(f"log.trackers: {name} is not installed; pip install {name}, or leave it out")
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.api.api_key:
            raise MedR1Error("log.trackers: wandb has no login; run `wandb login`, or set WANDB_MODE=offline")


class SendCompletions(TrainerCallback):
    """After step 1 and every `every` steps, the completions of the first prompts with their images.

    Args:
        records: those that are trained on.
        as_asked: a record as it was asked in a step.
        completions: gives the rows of the newest step, as in completions.jsonl.
        integrations: the trainer's callbacks, transformers' integrations among them.
    """

    def __init__(
        self,
        every: int,
        records: Sequence[Record],
        as_asked: Callable[[Record, int], Record],
        completions: Callable[[], list[Row]],
        integrations: Sequence[TrainerCallback],
    ) -> None:
        self.every, self.as_asked, self.completions, self.integrations = every, as_asked, completions, integrations
        self.records = records
        codes = np.fromiter((code(record.id) for record in records), np.uint64, len(records))
        self.places = codes.argsort()
        self.codes = codes[self.places]

    def _record(self, name: str) -> Record:
        return self.records[self.places[self.codes.searchsorted(np.uint64(code(name)))]]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if not state.is_world_process_zero or (step > 1 and step % self.every):
            return
        rows = self.completions()
        shown = list(dict.fromkeys(row["id"] for row in rows))[:MAX_PROMPTS]
        asked = {row["id"]: self.as_asked(self._record(row["id"]), row["step"]) for row in rows if row["id"] in shown}
        images = {name: picture for name in shown if (picture := thumbnail(asked[name])) is not None}
        table = [{"question": self._record(row["id"]).question, **row} for row in rows if row["id"] in shown]
        table = [{column: row[column] for column in COLUMNS} for row in table]
        for integration in self.integrations:
            if send := SEND.get(type(integration)):
                send(integration, step, table, images)


def thumbnail(record: Record) -> Image.Image | None:
    """A record's images side by side, small; None without any."""
    images = [load_image(path) for path in record.images]
    for image in images:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    if not images:
        return None
    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet


def _tensorboard(integration: Any, step: int, table: list[Row], images: dict[str, Image.Image]) -> None:
    writer = integration.tb_writer
    for number, (name, picture) in enumerate(images.items()):
        writer.add_image(f"completions/{number}", np.asarray(picture), step, dataformats="HWC")
        rows = [row for row in table if row["id"] == name]
        writer.add_text(f"completions/{number}", _as_text(rows), step)


def _as_text(rows: list[Row]) -> str:
    """A prompt's completions; what a model wrote is indented, which TensorBoard shows as it is."""
    text = [f"{rows[0]['id']}, right answer {rows[0]['answer']}", _indented(rows[0]["question"])]
    for row in rows:
        reward = "no reward" if row["reward"] is None else f"reward {row['reward']:g}"
        text += [f"{reward}, advantage {row['advantage']:g}", _indented(row["reply"])]
    return "\n\n".join(text)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _wandb(integration: Any, step: int, table: list[Row], images: dict[str, Image.Image]) -> None:
    import wandb

    pictures = {name: wandb.Image(picture) for name, picture in images.items()}
    data = [[pictures.get(row["id"]), *row.values()] for row in table]
    wandb.log({"completions": wandb.Table(columns=["image", *COLUMNS], data=data), "train/global_step": step})


def _mlflow(integration: Any, step: int, table: list[Row], images: dict[str, Image.Image]) -> None:
    import mlflow

    for number, picture in enumerate(images.values()):
        mlflow.log_image(picture, artifact_file=f"completions/step-{step}-{number}.png")
    mlflow.log_dict({"completions": table}, f"completions/step-{step}.json")


def _trackio(integration: Any, step: int, table: list[Row], images: dict[str, Image.Image]) -> None:
    import trackio

    pictures = {name: trackio.Image(picture) for name, picture in images.items()}
    data = [[pictures.get(row["id"]), *row.values()] for row in table]
    trackio.log({"completions": trackio.Table(columns=["image", *COLUMNS], data=data), "train/global_step": step})


SEND: dict[type, Callable[[Any, int, list[Row], dict[str, Image.Image]], None]] = {
    TensorBoardCallback: _tensorboard,
    WandbCallback: _wandb,
    MLflowCallback: _mlflow,
    TrackioCallback: _trackio,
}
"""An integration to the function that sends a table, and images by record id, to where it sends its numbers."""
