"""Readers of questions: `load_records`, for every supported layout."""

from medr1.data.datasets.load import (
    is_omnimedvqa,
    load_records,
    num_refused,
    question_tables,
    require_images,
    select_records,
)
from medr1.data.datasets.rows import canonical_modality, canonical_question_type

__all__ = [
    "canonical_modality",
    "canonical_question_type",
    "is_omnimedvqa",
    "load_records",
    "num_refused",
    "question_tables",
    "require_images",
    "select_records",
]
