"""Where long texts and questions come from: local files, public data sets, or generated stand-ins.

RULER takes essays by Paul Graham, SQuAD v2 (Rajpurkar et al. 2018) and HotpotQA (Yang et al. 2018); each is looked for
in that order of places, and what was used is part of every sample.
"""

from __future__ import annotations

import logging
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from ruler_tasks.errors import SourceError
from ruler_tasks.files import parse_json, read_text, texts_hash
from ruler_tasks.questions import Question, QuestionSet
from ruler_tasks.tokens import TokenCounter

log = logging.getLogger(__name__)

MOST_MEBIBYTES = 1024
"""Twenty times the largest of the published files."""
GENERATED_PROSE = "generated prose"
GENERATED_DOCUMENTS = "generated documents"

_SENTENCE_END = re.compile(r"[.!?][\"')\]\u2019\u201d]*$")
_SENTENCE_START = re.compile(r"[\"'(\[\u2018\u201c]*[A-Z0-9]")
_ABBREVIATIONS = frozenset(
    ("Mr.", "Mrs.", "Ms.", "Dr.", "Prof.", "St.", "Jr.", "Sr.", "vs.", "etc.", "e.g.", "i.e.", "cf.", "U.S.", "No.")
)
_INITIAL = re.compile(r"^[A-Z]\.$")


@dataclass(frozen=True, eq=False)
class Essays:
    """A long text as words, with its sentences known. Beyond its end it starts again.

    Sentences are told apart by punctuation and capitals, with the common abbreviations excepted; RULER has NLTK do it,
    which downloads a model.
    """

    text_words: Sequence[str]
    source: str
    margins: tuple[bool, bool] = (False, False)
    """Whether white space stands before the text, and after it."""

    @cached_property
    def content_hash(self) -> str:
        """What texts are told apart by, wherever they come from."""
        return texts_hash(self.text_words)

    @cached_property
    def ends(self) -> list[int]:
        """For each sentence the number of words up to its end."""
        return sentence_ends(self.text_words)

    def sentences_in(self, words: int) -> int:
        """How many sentences the first `words` words hold, a last one that is cut off included."""
        rounds, rest = divmod(words, len(self.text_words))
        whole = bisect_right(self.ends, rest)
        cut = rest > (self.ends[whole - 1] if whole else 0)
        return rounds * len(self.ends) + whole + cut

    def start_of(self, sentence: int) -> int:
        """The number of words in front of a sentence, counted from 0."""
        rounds, rest = divmod(sentence, len(self.ends))
        return rounds * len(self.text_words) + (self.ends[rest - 1] if rest else 0)

    def text(self, start: int, end: int) -> str:
        """The words from `start` up to `end`, with single spaces."""
        size = len(self.text_words)
        parts = []
        while start < end:
            rounds, first = divmod(start, size)
            last = min(end - rounds * size, size)
            parts.append(" ".join(self.text_words[first:last]))
            start += last - first
        return " ".join(parts)

    def cumulative_tokens(self, tokens: TokenCounter, at_least: int) -> list[int]:
        """What the words up to each take, for as many words as take `at_least` tokens."""
        total: list[int] = tokens.memo.setdefault(self, [])
        while not total or total[-1] <= at_least:
            start, size = len(total), len(self.text_words)
            block = [self.text_words[at % size] for at in range(start, 2 * start + 1024)]
            so_far = total[-1] if total else 0
            for count in tokens.words(block):
                so_far += max(count, 1)
                total.append(so_far)
        return total


def sentence_ends(words: Sequence[str]) -> list[int]:
    """For each sentence of a text the number of words up to its end; the last one ends with the text."""
    ends = [
        at
        for at, (word, after) in enumerate(pairwise(words), 1)
        if _SENTENCE_END.search(word)
        and word not in _ABBREVIATIONS
        and not _INITIAL.match(word)
        and _SENTENCE_START.match(after)
    ]
    return [*ends, len(words)]


Loaded = TypeVar("Loaded")


class Sources:
    """Essays and question sets, each loaded when first asked for.

    Attributes:
        data_dir: a folder with `PaulGrahamEssays.json`, `squad.json` (SQuAD v2 dev) or `hotpotqa.json` (dev,
            distractor setting), in their published formats; what it lacks is looked for further on. RULER's
            `english_words.json` is read from nowhere else.
        offline: do not download; what an earlier download left is still used.
        notes: one sentence for each source that is not the published one, also logged as a warning.
    """

    def __init__(self, data_dir: str | Path | None = None, offline: bool = False) -> None:
        self.data_dir = None if data_dir is None else Path(data_dir)
        self.offline = offline
        self.notes: list[str] = []
        self._loaded: dict[str, Any] = {}
        try:
            missing = self.data_dir is not None and not self.data_dir.is_dir()
        except OSError as error:
            raise SourceError(f"The data folder {self.data_dir} cannot be read: {error.strerror or error}.") from error
        if missing:
            raise SourceError(f"The data folder {self.data_dir} does not exist.")

    def essays(self) -> Essays:
        """The essays, or generated prose."""
        return self._load("essays", "PaulGrahamEssays.json", _read_essays, _hub_essays, _generated_essays)

    def squad(self) -> QuestionSet:
        """SQuAD v2, the answerable questions of its dev set, or generated questions that need one document."""
        return self._load("squad", "squad.json", _read_squad, _hub_squad, _generated_one_hop)

    def hotpotqa(self) -> QuestionSet:
        """HotpotQA, its dev set in the distractor setting, or generated questions that need two documents."""
        return self._load("hotpotqa", "hotpotqa.json", _read_hotpotqa, _hub_hotpotqa, _generated_two_hop)

    def english_words(self) -> list[str] | None:
        """The word list that RULER turns to where its first one has too few words; None where there is no such file."""
        if "english words" not in self._loaded:
            own = None if self.data_dir is None else self.data_dir / "english_words.json"
            self._loaded["english words"] = own and _from_file(own, "english words", _read_words)
        words: list[str] | None = self._loaded["english words"]
        return words

    def _load(
        self,
        kind: str,
        file: str,
        read: Callable[[Any, str], Loaded],
        download: Callable[[bool], Loaded],
        generate: Callable[[], Loaded],
    ) -> Loaded:
        if kind not in self._loaded:
            own = None if self.data_dir is None else _from_file(self.data_dir / file, kind, read)
            self._loaded[kind] = own or self._from_hub(kind, download) or generate()
        loaded: Loaded = self._loaded[kind]
        return loaded

    def _from_hub(self, kind: str, download: Callable[[bool], Loaded]) -> Loaded | None:
        loaded: Loaded | None
        loaded, problem = _hub(download, self.offline)
        if problem is not None:
            self.notes.append(f"No {kind} could be loaded ({problem}); generated text stands in.")
            log.warning("%s", self.notes[-1])
        return loaded


@cache
def default_sources() -> Sources:
    """The sources used where a caller names none; one object per process, so that they are loaded once."""
    return Sources()


def _from_file(path: Path, kind: str, read: Callable[[Any, str], Loaded]) -> Loaded | None:
    """What a file of the data folder holds; None where there is no such file."""
    try:
        content = parse_json(read_text(path, MOST_MEBIBYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SourceError(f"The file {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise SourceError(f"The file {path} is not JSON: {error}.") from error
    except RecursionError as error:
        raise SourceError(f"The file {path} is not in the published format of {kind}: it is nested too deeply.") from error
    try:
        return read(content, f"{kind} ({path.name})")
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise SourceError(f"The file {path} is not in the published format of {kind}: {error!r}.") from error


def _read_essays(content: Any, source: str) -> Essays:
    text: str = content["text"]
    words = text.split()
    if not words:
        raise ValueError("no text")
    return Essays(words, source, (text[0].isspace(), text[-1].isspace()))


def _read_words(content: Any, source: str) -> list[str]:
    words = list(content.values())
    if not words or not all(isinstance(word, str) for word in words):
        raise ValueError("no words")
    return words


def _read_squad(content: Any, source: str) -> QuestionSet:
    def rows() -> Iterator[tuple[Any, str, str, Sequence[str]]]:
        for number, article in enumerate(content["data"]):
            title = article.get("title", number)
            for paragraph in article["paragraphs"]:
                yield title, paragraph["context"], "", ()  # a paragraph without questions is a document too
                for entry in paragraph["qas"]:
                    answers = [] if entry.get("is_impossible") else [answer["text"] for answer in entry["answers"]]
                    yield title, paragraph["context"], entry["question"], answers

    return squad_set(rows(), source)


def squad_set(rows: Iterable[tuple[Any, str, str, Sequence[str]]], source: str) -> QuestionSet:
    """A question set from (article, paragraph, question, answers); what has no answers is no question.

    The documents are the different paragraphs, sorted; those of the same article are related.
    """
    table = list(rows)
    documents = sorted({paragraph for _, paragraph, _, _ in table})
    numbers = {document: number for number, document in enumerate(documents)}
    articles: dict[Any, dict[int, None]] = {}
    for article, paragraph, _, _ in table:
        articles.setdefault(article, {})[numbers[paragraph]] = None
    questions = [
        Question(query, tuple(answers), (gold := numbers[paragraph],), tuple(n for n in articles[article] if n != gold))
        for article, paragraph, query, answers in table
        if answers
    ]
    return _checked(QuestionSet(questions, documents, source))


def _read_hotpotqa(content: Any, source: str) -> QuestionSet:
    return hotpotqa_set(
        (
            (entry["question"], entry["answer"], [(title, "".join(text)) for title, text in entry["context"]],
             {title for title, _ in entry.get("supporting_facts", ())})
            for entry in content
        ),
        source,
    )  # fmt: skip


def hotpotqa_set(rows: Iterable[tuple[str, str, Sequence[tuple[str, str]], set[str]]], source: str) -> QuestionSet:
    """A question set from (question, answer, [(title, text)], titles of the supporting documents).

    The documents are the different "title, newline, text", sorted; those given with a question but not needed for it
    are related.
    """
    table = [(query, answer, [(title, f"{title}\n{text}") for title, text in given], needed)
             for query, answer, given, needed in rows]  # fmt: skip
    documents = sorted({document for _, _, given, _ in table for _, document in given})
    numbers = {document: number for number, document in enumerate(documents)}
    questions = []
    for query, answer, given, needed in table:
        gold = tuple(numbers[document] for title, document in given if title in needed or not needed)
        related = tuple(numbers[document] for _, document in given if numbers[document] not in gold)
        all_given = tuple(numbers[document] for _, document in given)
        if not gold or not answer:
            raise ValueError(f"the question {query!r} has no answer or no documents")
        questions.append(Question(query, (answer,), gold, related, all_given))
    return _checked(QuestionSet(questions, documents, source))


def _checked(questions: QuestionSet) -> QuestionSet:
    if not questions.questions:
        raise ValueError("no answerable questions")
    return questions


def _hub_essays(local_only: bool) -> Essays:
    rows = _dataset("baber/paul_graham_essays", None, "train", local_only)
    return _read_essays({"text": " ".join(row["text"] for row in rows)}, "essays (baber/paul_graham_essays)")


def _hub_squad(local_only: bool) -> QuestionSet:
    rows = _dataset("rajpurkar/squad_v2", None, "validation", local_only)
    return squad_set(
        ((row["title"], row["context"], row["question"], row["answers"]["text"]) for row in rows), "squad (squad_v2)"
    )


def _hub_hotpotqa(local_only: bool) -> QuestionSet:
    rows = _dataset("hotpotqa/hotpot_qa", "distractor", "validation", local_only)

    def given(context: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [(title, "".join(text)) for title, text in zip(context["title"], context["sentences"], strict=True)]

    return hotpotqa_set(
        ((row["question"], row["answer"], given(row["context"]), set(row["supporting_facts"]["title"])) for row in rows),
        "hotpotqa (hotpot_qa)",
    )


def _dataset(name: str, config: str | None, split: str, local_only: bool) -> Iterable[Mapping[str, Any]]:
    if local_only and not _downloaded(name):
        raise FileNotFoundError(f"{name} has not been downloaded")
    import datasets

    with _offline() if local_only else nullcontext():
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, config, split=split)
    return rows


def _downloaded(name: str) -> bool:
    """Whether an earlier download is in the library's cache; the library takes seconds to say so itself."""
    from huggingface_hub import constants

    folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    return (folder / name.replace("/", "___")).is_dir()


@contextmanager
def _offline() -> Iterator[None]:
    """Has the libraries use what is on this machine only; their own setting for that is read at import."""
    import datasets
    from huggingface_hub import constants

    saved = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = saved


@cache
def _hub(download: Callable[[bool], Any], offline: bool) -> tuple[Any, str | None]:
    """What a download gives, or why it gives nothing; tried once per process."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        offline = True
    problem = "downloads are off" if offline else _unreachable()
    try:
        return download(problem is not None), None
    except Exception as error:  # whatever a network, a cache or a changed data set can raise has one remedy
        return None, problem or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


@cache
def _unreachable() -> str | None:
    """Why the data sets' host does not answer, or None. The library itself would retry for half a minute each."""
    try:
        from huggingface_hub import constants, get_session

        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        return f"no connection, {type(error).__name__}"
    return None


def _generated_essays() -> Essays:
    from ruler_tasks.prose import prose_words

    return Essays(prose_words(), GENERATED_PROSE)


def _generated_one_hop() -> QuestionSet:
    from ruler_tasks.invented import one_hop

    return QuestionSet(*one_hop(), GENERATED_DOCUMENTS)


def _generated_two_hop() -> QuestionSet:
    from ruler_tasks.invented import two_hop

    return QuestionSet(*two_hop(), GENERATED_DOCUMENTS)
