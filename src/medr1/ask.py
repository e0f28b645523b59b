"""One question about one case, answered as evaluation answers: same prompt, same decoding, same extractor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medr1.answers import extract_answer
from medr1.errors import MedR1Error
from medr1.images import load_image
from medr1.models import VLM, encode_prompts
from medr1.prompts import MODES, build_messages
from medr1.records import LETTERS, Record
from medr1.rollouts import sample


def ask(
    vlm: VLM,
    images: Sequence[Path],
    question: str,
    options: Sequence[str],
    *,
    mode: str = "think",
    max_new_tokens: int = 256,
) -> dict[str, Any]:
    """Greedy reply to a multiple-choice question.

    Returns:
        reply (raw text), outcome, letter and option (both None unless the outcome is "letter").

    Raises:
        MedR1Error: an unreadable image, fewer than two options, an empty question, an unknown mode.
    """
    if mode not in MODES:
        raise MedR1Error(f"--mode {mode}: choose {', '.join(MODES)}")
    try:
        record = Record(
            id="ask",
            images=tuple(images),
            question=question,
            options=tuple(options),
            answer=LETTERS[0],  # nobody knows it, and nothing here reads it
            modality=None,
            question_type=None,
            source="ask",
            group="ask",
        )
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise MedR1Error(
            f"the question cannot be asked: {reason}; give a question and --option twice or more"
        ) from error
    prompts = encode_prompts(vlm, [build_messages(record, mode)], [[load_image(path) for path in images]])
    reply = sample(vlm, prompts, num_completions=1, max_new_tokens=max_new_tokens, greedy=True, seed=0).texts[0]
    answer = extract_answer(reply, options)
    option = options[LETTERS.index(answer.letter)] if answer.letter else None
    return {"reply": reply, "outcome": answer.outcome, "letter": answer.letter, "option": option}
