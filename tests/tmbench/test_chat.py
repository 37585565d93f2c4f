"""Chat templates taken apart: what stands around a message, what a template is given, and where an answer would begin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ruler_tasks import Frame, read_dataset
from tmbench.errors import UserError
from tmbench.models import loading
from tmbench.results.rows import RulerRow
from tmbench.results.tables import read_all
from tmbench.suites import chat
from tmbench.suites.chat import Chat, ends_thinking, parse_kwargs, take_apart
from tmbench.suites.table import DRAWN

TURNS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
QWEN3 = TURNS + "[a]\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
DEEPSEEK = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    + TURNS
    + "[a]{% if thinking %}<think>{% else %}</think>{% endif %}"
)
PARTS = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)
LLAMA = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}<s>Today: {{ date_string }}\n"
    "{% for m in messages %}{{ m.content | trim }}{% endfor %}[a]"
)


@pytest.fixture
def with_template():
    tokenizer = loading.load_tokenizer("tiny")

    def make(template):
        tokenizer.chat_template = template
        return tokenizer

    return make


def test_a_template_is_taken_apart(with_template):
    with pytest.raises(UserError, match="--apply-chat-template: .*no chat template"):
        take_apart(with_template(None))
    tokenizer = with_template("<s>" + TURNS + "[assistant]")
    assert take_apart(tokenizer) == Chat(Frame("<s>[user] ", "[assistant]", add_special_tokens=False))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("nothing of yours", "drops the user's message"),
        (TURNS + TURNS, "repeats the user's message"),
        ("{{ messages | tojson }}", "changes the user's message"),
        ("{% for m in messages %}{{ m.content | e }}{% endfor %}", "changes the user's message"),
        ("{% for m in messages %}{{ m.content | replace('\n', ' ') }}{% endfor %}", "changes the user's message"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the user's message"),
        ("{% for m in messages %}{{ m.content[:5] }}{% endfor %}", "changes the user's message"),
        ("{{ raise_exception('a system message is needed.') }}", "cannot be rendered: a system message is needed; leave"),
        ("{% for m in messages %}", "cannot be rendered: "),
        ("{{ nobody.knows }}", "cannot be rendered: 'nobody' is undefined"),
    ],
)
def test_a_template_that_does_not_hand_the_message_on_is_refused(template, reason, with_template):
    with pytest.raises(UserError, match=f"^--apply-chat-template: the chat template {reason}") as refused:
        take_apart(with_template(template))
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_a_suite_asks_within_the_template_and_begins_the_answer_behind_it(name, with_template):
    tokenizer = with_template(QWEN3)
    asked, plain = DRAWN[name](chat_template_kwargs="{}"), DRAWN[name]()
    assert asked.chat_columns(tokenizer) == {"chat_template": True, "chat_template_kwargs": '{"enable_thinking": false}'}
    for task in asked.tasks:
        (sample,), (bare,) = (suite.samples(task, 2000, (3,), 42, tokenizer) for suite in (asked, plain))
        assert sample.prompt.startswith("[user] ")
        _, answer = sample.prompt.split("[a]\n<think>\n\n</think>\n\n")
        # What opens the answer is opened in the model's own turn.
        assert answer
        assert bare.prompt.endswith(f"\n{answer}")
        assert len(sample.ids) + sample.max_new_tokens <= 2000
        assert len(sample.ids) > 1750


def test_a_message_is_given_as_parts_where_text_does_not_come_through(with_template):
    assert take_apart(with_template("<s>" + PARTS + "[a]")).frame == Frame("<s>", "[a]", add_special_tokens=False)
    strict = PARTS.replace("{{ p.text }}", "{{ p.text }}{% else %}{{ raise_exception('parts!') }}")
    assert take_apart(with_template("<s>" + strict)).frame == Frame("<s>", "", add_special_tokens=False)


def test_a_template_that_trims_trims_the_tasks_text(with_template):
    frame = take_apart(with_template(TURNS.replace("m.content", "m.content | trim") + "[a]")).frame
    assert frame.strip
    assert frame.around(" What?\n") == "[user] What?[a]"
    kept = take_apart(with_template(TURNS + "[a]")).frame
    assert kept.around(" What?\n") == "[user]  What?\n[a]"


def test_our_prompt_is_what_transformers_makes_of_the_message(with_template):
    text = "\nA 'list' of <words>:\n 1. one 2. two \n"
    for template in (QWEN3, DEEPSEEK, LLAMA):
        tokenizer = with_template(template)
        found = take_apart(tokenizer)
        given = json.loads(found.kwargs or "{}") | {"date_string": "26 Jul 2024"}
        messages = [{"role": "user", "content": text}]
        assert found.frame.around(text) == tokenizer.apply_chat_template(messages, tokenize=False, **given)


@pytest.mark.parametrize(
    ("template", "switch", "suffix"),
    [
        (QWEN3, '{"enable_thinking": false}', "[a]\n<think>\n\n</think>\n\n"),
        (DEEPSEEK, '{"thinking": false}', "[a]</think>"),
        (
            TURNS + "{% if thinking_budget is defined and thinking_budget == 0 %}off{% endif %}",
            '{"thinking_budget": 0}',
            "off",
        ),
        (TURNS + "{% if enable_thinking | default(true) %}<think>\n{% endif %}", '{"enable_thinking": false}', ""),
    ],
)
def test_thinking_is_switched_off_where_the_template_can(template, switch, suffix, with_template):
    found = take_apart(with_template(template))
    assert (found.kwargs, found.frame.suffix) == (switch, suffix)
    assert len(found.notes) == 1
    assert f"thinking is switched off in the chat template ({switch[1:-1]})" in found.notes[0]
    same = take_apart(with_template(template), json.loads(switch))
    assert (same.frame, same.kwargs, same.notes) == (found.frame, found.kwargs, ()), "what was asked for needs no word"


def test_a_switch_that_the_template_sets_itself_is_none(with_template):
    assert take_apart(with_template("{% set thinking = true %}" + TURNS + "{{ thinking }}")).kwargs == ""


def test_what_the_user_wants_is_done_and_an_open_block_said(with_template):
    found = take_apart(with_template(DEEPSEEK), {"thinking": True})
    assert (found.kwargs, found.frame.suffix) == ('{"thinking": true}', "[a]<think>")
    assert "the prompt ends inside of an open think block ('<think>')" in found.notes[0]
    assert "open think block" in take_apart(with_template(TURNS + "<think>\n")).notes[0]
    told = take_apart(with_template("Think in <think> tags. " + TURNS + "[a]"))
    assert told.notes == (), "what stands before the message opens nothing"


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("<think>", True), ("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("</think>", False), ("", False),
        ("<think></think><think>", True), ("[THINK]", True), ("[THINK] [/THINK]", False), ("<thinking>", True),
        ("<|START_THINKING|>", True), ("<|START_THINKING|><|END_THINKING|>", False), ("<seed:think>", True),
        ("<seed:think></seed:think>", False), ("\u25c1think\u25b7", True), ("\u25c1think\u25b7\u25c1/think\u25b7", False),
        ("<thought>\n", True), ("<reasoning>", True), ("<|begin_of_thought|>", True), ("<|think_start|>", True),
        ("<|begin_of_thought|><|end_of_thought|>", False), ("<|think_start|><|think_end|>", False),
        ("<|start|>assistant<|channel|>analysis<|message|>", True), ("<|channel|>analysis<|channel|>final", False),
        ("<|channel>thought\n", True), ("<|channel>thought\n<channel|>", False), ("I think: <b> thinking </b>", False),
    ],
)  # fmt: skip
def test_the_spellings_of_think_blocks(text, inside):
    assert ends_thinking(text) is inside


def test_an_answer_without_a_channel_is_said(with_template):
    marked = "<|start|>assistant"
    template = "{% if false %}<|channel|>analysis{% endif %}" + TURNS + marked
    assert "the prompt names none" in take_apart(with_template(template)).notes[0]


def test_today_is_the_same_day_every_day(with_template, monkeypatch):
    found = take_apart(with_template(LLAMA))
    assert found.frame == Frame("<s>Today: 26 Jul 2024\n", "[a]", add_special_tokens=False, strip=True)
    assert found.kwargs == ""
    assert "today's date: 26 Jul 2024 stands for it" in found.notes[0]
    given = take_apart(with_template(LLAMA), {"date_string": "1 May 2025"})
    assert given.frame.prefix == "<s>Today: 1 May 2025\n"
    assert (given.kwargs, given.notes) == ('{"date_string": "1 May 2025"}', ())
    unheld = LLAMA.replace("'%d %b %Y'", "'%d' ~ ' %b'")
    assert "cannot be held" in take_apart(with_template(unheld)).notes[-1]
    without = "{% if tools %}{{ strftime_now('%d') }}{% endif %}" + TURNS
    assert take_apart(with_template(without)).notes == (), "a date that is not told"


def test_variables_that_would_change_nothing_are_refused(with_template):
    with pytest.raises(
        UserError, match=f"^{chat.OPTION}: the chat template does not read enable_thinkng: .*enable_thinking$"
    ):
        take_apart(with_template(QWEN3), {"enable_thinkng": False})
    with pytest.raises(UserError, match="does not read x: leave it out, or give one of these: none$"):
        take_apart(with_template(TURNS), {"x": 1})
    with pytest.raises(UserError, match="tokenize is set by tmbench itself"):
        take_apart(with_template(QWEN3), {"tokenize": True})


def test_one_of_several_templates_is_chosen_by_name(with_template):
    several = {"default": TURNS + "[d]", "rag": TURNS + "[r]"}
    assert take_apart(with_template(several)).frame.suffix == "[d]"
    found = take_apart(with_template(several), {"chat_template": "rag"})
    assert (found.frame.suffix, found.kwargs) == ("[r]", '{"chat_template": "rag"}')
    with pytest.raises(UserError, match="no default among its chat templates \\(rag, tool_use\\): name one"):
        take_apart(with_template({"rag": TURNS, "tool_use": TURNS}))
    with pytest.raises(UserError, match="there is no chat_template 'x': this model has default, rag"):
        take_apart(with_template(several), {"chat_template": "x"})
    with pytest.raises(UserError, match="there is no chat_template 'x': this model has one alone"):
        take_apart(with_template(TURNS), {"chat_template": "x"})


@pytest.mark.parametrize(
    "text", ["", "{", "no", "[]", "3", "null", '"x"', '{"a": NaN}', '{"a": 1, "a": 2}', "{'a': 1}", "[" * 100_000]
)
def test_what_is_no_json_object_is_one_sentence(text):
    with pytest.raises(UserError, match=f"^{chat.OPTION} is not a JSON object") as refused:
        parse_kwargs(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 250


def folder(name, template):
    """A folder with the embedded model and a chat template."""
    tiny = Path(loading.__file__).parent / "tiny"
    shutil.copytree(tiny, name, ignore=shutil.ignore_patterns("__pycache__", "*.py", "*.md"))
    (Path(name) / "chat_template.jinja").write_text(template)


ASK = ("ruler", "--offline", "--model", "chatty", "--method", "dense", "--length", "1K", "--task", "vt", "--samples", "1")


@pytest.mark.slow
def test_rows_with_other_variables_are_other_rows_and_other_sections(tmbench):
    folder("chatty", QWEN3)
    code, _, err = tmbench(*ASK, "--apply-chat-template", "--json")
    assert (code, "thinking is switched off in the chat template" in err) == (0, True)
    thinking = ("--chat-template-kwargs", '{"enable_thinking":true}')
    assert tmbench(*ASK, *thinking, "--save-samples")[0] == 0, "the option implies the template"
    assert tmbench(*ASK)[0] == 0
    rows = [row for row in read_all(Path("results"), RulerRow) if isinstance(row, RulerRow)]
    assert [(row.chat_template, row.chat_template_kwargs) for row in rows] == [
        (True, '{"enable_thinking": false}'),
        (True, '{"enable_thinking": true}'),
        (False, ""),
    ]
    kept = [json.loads((Path("results") / row.device / "ruler" / row.predictions).read_text()) for row in rows]
    assert "</think>" not in kept[1]["prompt"]
    _, report, _ = tmbench("report")
    for words in ('with chat template {"enable_thinking": false},', 'template {"enable_thinking": true},', "without chat"):
        assert report.count(words) == 1


@pytest.mark.slow
def test_prepared_data_of_a_template_have_one_bos(tmbench):
    folder("chatty", "{{ bos_token }}" + TURNS + "[a]")
    code, _, _ = tmbench("ruler-data", *ASK[1:4], *ASK[6:], "--output", "made", "--apply-chat-template")
    assert code == 0
    example = read_dataset("made", "vt", 1024)[0]
    assert example.prompt.startswith("<s>[user]")
    assert tmbench("ruler", *ASK[2:], "--data", "made")[0] == 0
    row = next(row for row in read_all(Path("results"), RulerRow))
    tokenizer = loading.load_tokenizer("chatty")
    text = tokenizer(example.prompt.removeprefix("<s>"), add_special_tokens=False)["input_ids"]
    assert row.prompt_tokens_mean == 1 + len(text) == example.length - 30


@pytest.mark.parametrize("command", ["ruler", "ruler-data", "sweep"])
def test_every_command_with_a_template_refuses_what_is_no_object(command, tmbench):
    more = ("--output", "made") if command == "ruler-data" else ()
    code, _, err = tmbench(command, "--offline", "--chat-template-kwargs", "[1]", *more)
    assert (code, err.count("\n")) == (2, 1)
    assert "--chat-template-kwargs is not a JSON object" in err
    assert not Path("results").exists()


def test_variables_do_not_go_with_prepared_data(tmbench):
    code, _, err = tmbench("ruler", "--data", "d", "--length", "1K", "--chat-template-kwargs", "{}")
    assert (code, "--chat-template-kwargs does not go with --data" in err) == (2, True)
