"""Our wording, files of its layout, and the published wording read from trees that these tests lay out in other words."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ruler_tasks import WordingError, examples, load_wording

PORT = {
    "niah_utils.py": '''
from __future__ import annotations
import this_module_does_not_exist
TEMPLATE = """Some odd {type_needle_v} are below.\\n{context}\\nWhat are all the odd {type_needle_v} for {query} here?"""
''',
    "prepare_niah.py": """
import nltk_that_is_missing
NEEDLE = "One odd {type_needle_v} for {key} is: {value}."
words = sorted(x for x in never_defined)
def generate(template, n, q, v, query, type_needle_v):
    NEEDLE = "One odd {type_needle_v} for {key} is: {value}."
    if q * v == 1:
        template = template.replace("Some", "A")
        template = template.replace("are all", "is")
        template = template.replace("are", "is")
        type_needle_v = type_needle_v[:-1]
    return {
        "gen_prefix": (
            f"The odd {type_needle_v[:-1]} for {query} is"
            if q * v == 1
            else f"The odd {type_needle_v} for {query} are"
        ),
    }
def get_haystack(kind):
    if kind == "essay":
        haystack = load(kind).split(" ")
    elif kind == "repeat":
        haystack = "Snow is white. Coal is black."
    elif kind == "needle":
        haystack = NEEDLE
    return haystack
""",
    "vt_utils.py": '''
CONFIG = {
    "tokens_to_generate": 30,
    "variable_tracking": {
        "template": """Follow.\\n\\n{context}\\nWhich hold {query}?""",
        "answer_prefix": """ Answer: {num_v} hold {query}: """,
    },
}
TEMPLATE = CONFIG["variable_tracking"]["template"] + CONFIG["variable_tracking"]["answer_prefix"]
''',
    "cwe_utils.py": '''
CONFIG = {"tokens_to_generate": 120, "template": """Count.\\n{context}\\nWhich ten?""", "answer_prefix": """ The ten:"""}
''',
    "fwe_utils.py": '''
CONFIG = {"tokens_to_generate": 50, "template": """Decode. {context}\\nWhich three?""", "answer_prefix": """ Three:"""}
''',
    "qa_utils.py": '''
CONFIG = {"tokens_to_generate": 32, "template": """Read.\\n\\n{context}\\n\\nQ: {query}""", "answer_prefix": """A:"""}
DOCUMENT_PROMPT = "Text {i}:\\n{document}"
''',
}
CHECKOUT = {
    "constants.py": '''
TASKS = {
    "niah": {"tokens_to_generate": 128,
        "template": "Some odd {type_needle_v} are below.\\n{context}\\n"
            "What are all the odd {type_needle_v} for {query} here?",
        "answer_prefix": """ The odd {type_needle_v} for {query} are"""},
    "variable_tracking": {"template": """Follow.\\n\\n{context}\\nWhich hold {query}?""",
        "answer_prefix": """ Answer: {num_v} hold {query}: """},
    "common_words_extraction": {"template": """Count.\\n{context}\\nWhich ten?""", "answer_prefix": """ The ten:"""},
    "freq_words_extraction": {"template": """Decode. {context}\\nWhich three?""", "answer_prefix": """ Three:"""},
    "qa": {"template": """Read.\\n\\n{context}\\n\\nQ: {query}""", "answer_prefix": """ A:"""},
}
''',
    "niah.py": '''
import missing_module
args = parser.parse_args()
needle = "One odd {type_needle_v} for {key} is: {value}."
if args.type_haystack == "essay":
    haystack = read(args).split(" ")
elif args.type_haystack == "noise":
    haystack = "Snow is white. Coal is black."
elif args.type_haystack == "needle":
    haystack = needle
def generate(template):
    template = args.template
    template = template.replace("Some", "A")
    template = template.replace("are all", "is")
    template = template.replace("are", "is")
    return template
''',
    "qa.py": 'DOCUMENT_PROMPT = "Text {i}:\\n{document}"\n',
}  # fmt: skip


def lay_out(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def port(tmp_path: Path) -> Path:
    lay_out(tmp_path / "port/lm_eval/tasks/ruler", PORT)
    (tmp_path / "port/lm_eval/__init__.py").write_text("raise RuntimeError('this package must not be imported')\n")
    return tmp_path / "port"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    lay_out(tmp_path / "RULER/scripts/data/synthetic", CHECKOUT)
    return tmp_path / "RULER"


def test_shipped_wording_is_the_default_and_has_a_stable_hash() -> None:
    wording = load_wording()
    assert wording == load_wording("tmbench")
    assert wording.name == "tmbench-1"
    assert len(wording.hash) == 12
    assert load_wording(wording) is wording


def test_a_copy_under_another_name_has_the_same_hash_and_other_words_another(tmp_path: Path) -> None:
    import ruler_tasks

    text = (Path(ruler_tasks.__file__).parent / "wording.toml").read_text(encoding="utf-8")
    copy, other = tmp_path / "copy.toml", tmp_path / "other.toml"
    copy.write_text(text.replace('"tmbench-1"', '"copy"'))
    other.write_text(text.replace("The lake is calm.", "The lake is wild."))
    assert load_wording(copy).name == "copy"
    assert load_wording(str(copy)).hash == load_wording().hash != load_wording(other).hash


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "tmbench-1"', "", "has no name"),
        ("is {value}.", "is secret.", r"'niah.needle'.*lacks the field \{value\}"),
        ("{count} variables", "{number} variables", r"'vt.answer_prefix'.*unknown field \{number\}"),
        ("{count} variables", "{count:99999999999} variables", r"'vt.answer_prefix'.*formats the field \{count\}"),
        ("{count} variables", "{count!r} variables", r"'vt.answer_prefix'.*formats the field \{count\}"),
        ('name = "tmbench-1"', f"name = {'9' * 5000}", "holds a number that is too long"),
        ('name = "tmbench-1"', f"name = {'[' * 100_000}", "is nested too deeply"),
        ("Note this down:", "Note {this down:", "'niah.needle'.*braces"),
        ("[fwe]", "[few]", "lacks the text 'fwe.template'"),
        ('noise = "', 'noise = 3 # "', "lacks the text 'noise'"),
        ("[vt]", "[vt", "not valid TOML"),
        ('words = "word"', 'word = "word"', "'niah.types.words'"),
    ],
)
def test_a_broken_file_is_refused_in_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    import ruler_tasks

    text = (Path(ruler_tasks.__file__).parent / "wording.toml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "w.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(WordingError, match=message):
        load_wording(tmp_path / "w.toml")


def test_missing_and_foreign_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WordingError, match="cannot be read"):
        load_wording(tmp_path / "none.toml")
    for place in ("", "reference:"):
        with pytest.raises(WordingError, match="cannot be read: File name too long"):
            load_wording(place + "x" * 300)
    with pytest.raises(WordingError, match="neither a RULER checkout nor an lm-eval"):
        load_wording(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WordingError, match="not UTF-8"):
        load_wording(tmp_path / "binary")


@pytest.mark.parametrize("place", ["port", "checkout"])
def test_published_wording_is_read_without_importing_it(place: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(place)
    wording = load_wording(f"reference:{folder}")
    assert wording == load_wording(folder)
    assert wording.noise == "Snow is white. Coal is black."
    assert wording.needle.format(type="number", key="k", value="7") == "One odd numbers for k is: 7."
    fields = {"type": "number", "context": "TEXT", "query": "k"}
    assert wording.niah_one.render(**fields) == (
        "A odd number is below.\nTEXT\nWhat is the odd number for k here?",
        " The odd number for k is",
    )
    assert wording.niah_many.render(**fields) == (
        "Some odd numbers are below.\nTEXT\nWhat are all the odd numbers for k here?",
        " The odd numbers for k are",
    )
    assert wording.vt.render(context="TEXT", query="12345", count=5) == (
        "Follow.\n\nTEXT\nWhich hold 12345?",
        " Answer: 5 hold 12345: ",
    )
    assert wording.cwe.render(context="TEXT") == ("Count.\nTEXT\nWhich ten?", " The ten:")
    assert wording.fwe.render(context="TEXT") == ("Decode. TEXT\nWhich three?", " Three:")
    assert wording.qa.render(context="TEXT", query="why?") == ("Read.\n\nTEXT\n\nQ: why?", " A:")
    assert wording.document.format(i=3, document="d") == "Text 3:\nd"


def test_both_published_places_agree(port: Path, checkout: Path) -> None:
    assert load_wording(port).hash == load_wording(checkout).hash


def test_an_installed_port_is_found_and_not_imported(port: Path) -> None:
    code = (
        "import sys; from ruler_tasks import load_wording; w = load_wording('reference');"
        "print(w.name, w.noise); assert 'lm_eval' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(port), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference-lm-eval-")
    assert "Snow is white." in done.stdout


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("constants.py", '"qa":', '"quiz":', "no template and answer prefix for 'qa'"),
        ("constants.py", "TASKS =", "TASKS = (", "not Python"),
        ("niah.py", "needle =", "pin =", "assigns no literal to 'needle'"),
        ("niah.py", "template.replace", "text.replace", "singular"),
    ],
)
def test_an_unknown_layout_is_refused(checkout: Path, file: str, old: str, new: str, message: str) -> None:
    path = checkout / "scripts/data/synthetic" / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(WordingError, match=message):
        load_wording(checkout)


def test_prompts_are_made_of_the_wording(checkout: Path, plain_tokenizer: Any, sources: Any) -> None:
    wording = load_wording(checkout)
    options = {"tokenizer": plain_tokenizer, "sources": sources, "wording": wording}
    one = next(examples("niah_multikey_2", 2048, [0], **options))
    assert one.input.startswith("A odd number is below.\nOne odd numbers for ")
    assert one.answer_prefix.startswith(" The odd number for ")
    many = next(examples("niah_multiquery", 2048, [0], **options))
    assert many.input.startswith("Some odd numbers are below.\n")
    assert many.input.count("One odd numbers for ") == 4


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_installed_lm_eval_can_be_read() -> None:
    wording = load_wording("reference")
    assert wording.name.startswith("reference-lm-eval-")
    assert "{type}" in wording.niah_one.template
    assert wording.qa.answer_prefix.startswith(" ")
    assert "lm_eval" not in sys.modules


@pytest.mark.parametrize(
    ("files", "source", "by_line"),
    [
        (PORT, "vt_utils.py", False),
        (CHECKOUT, "variable_tracking.py", True),
        (CHECKOUT, "variable_tracking.py", False),
    ],
)
def test_how_lines_of_variable_tracking_are_joined_is_read(
    tmp_path: Path, files: dict[str, str], source: str, by_line: bool
) -> None:
    plain = load_wording(lay_out(tmp_path / "plain", files))
    assert plain.vt_by_line, "nothing is said of it"
    joined = f"""
def generate(sentences, other):
    both = " ".join(other) + "\\n".join(other)
    return {'"' + chr(92) + 'n"' if by_line else '" "'}.join(sentences)
"""
    wording = load_wording(lay_out(tmp_path / "joined", files | {source: files.get(source, "") + joined}))
    assert wording.vt_by_line is by_line
    assert wording.hash == plain.hash, "what is drawn by tmbench's own rules does not depend on it"
