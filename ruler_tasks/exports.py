"""All that this package offers to others, imported eagerly: ``ruler_tasks`` has it on first use."""

from ruler_tasks.asking import further_questions, question_start
from ruler_tasks.dataset import read_dataset, write_dataset
from ruler_tasks.encoding import encode_prompt, encode_prompts
from ruler_tasks.errors import (
    DatasetError,
    RulerError,
    SeedError,
    SourceError,
    TaskLengthError,
    UnknownTaskError,
    WordingError,
)
from ruler_tasks.example import Example, Frame
from ruler_tasks.scoring import count_nulls
from ruler_tasks.sources import Sources
from ruler_tasks.tasks import TASKS, SamplesAs, Task, examples, get_task, minimum_length, score
from ruler_tasks.wording import Wording, load_wording

__all__ = [
    "TASKS",
    "DatasetError",
    "Example",
    "Frame",
    "RulerError",
    "SamplesAs",
    "SeedError",
    "SourceError",
    "Sources",
    "Task",
    "TaskLengthError",
    "UnknownTaskError",
    "Wording",
    "WordingError",
    "count_nulls",
    "encode_prompt",
    "encode_prompts",
    "examples",
    "further_questions",
    "get_task",
    "load_wording",
    "minimum_length",
    "question_start",
    "read_dataset",
    "score",
    "write_dataset",
]
