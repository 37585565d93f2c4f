"""The command beside a row measures that row: the program finds that nothing is left to measure."""

from __future__ import annotations

import shlex

import pytest

import made_rows
from command_lines import FAST_TTFT
from report_rows import COMMON, RULER, TRIANGLE, TTFT
from tmbench.report.html.commands import AGAIN, command_of
from tmbench.results.rows import AgreeRow, LossRow, ProbeRow, RulerRow, TtftRow
from tmbench.results.suite_rows import GraphWalksRow
from tmbench.results.tables import read_all

MEASURED = [
    (TtftRow, (*FAST_TTFT, "--method", "dense", "--method", "tri_mix", "--layers", "2,5-6", "--n-local", "64")),
    (TtftRow, (*FAST_TTFT, "--method", "xattention:stride=8", "--batch-size", "2", "--prompt", "random")),
    (RulerRow, ("ruler", "--length", "512", "--samples", "1", "--task", "niah_single_1", "--offline", "--device", "cpu")),
    (
        GraphWalksRow,
        (
            "suite",
            "graphwalks",
            "--length",
            "700",
            "--samples",
            "1",
            "--task",
            "parents",
            "--device",
            "cpu",
            "--method",
            "streaming",
            "--chunk",
            "256",
            "--prompt-length",
            "known",
            "--ask-later",
        ),
    ),
    (TtftRow, (*FAST_TTFT, "--method", "dense", "--ask-later", "--question-tokens", "16")),
    (
        RulerRow,
        (
            "ruler",
            "--length",
            "1K",
            "--samples",
            "1",
            "--task",
            "niah_multikey_2",
            "--questions",
            "2",
            "--device",
            "cpu",
            "--method",
            "dense",
        ),
    ),
    (TtftRow, (*FAST_TTFT, "--method", "dense", "--attn-native", "--rope-scaling", "linear:factor=2")),
    (
        AgreeRow,
        ("agree", "--length", "256", "--samples", "1", "--new-tokens", "4", "--method", "streaming", "--device", "cpu"),
    ),
    (ProbeRow, ("probe", "--length", "700", "--samples", "1", "--n-local", "64", "--time-budget", "0.9", "--device", "cpu")),
    (LossRow, ("probe", "--loss", "--length", "700", "--samples", "1", "--method", "streaming", "--device", "cpu")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "arguments"), MEASURED, ids=lambda each: getattr(each, "kind", ""))
def test_a_measured_row_is_repeated(tmbench, tmp_path, kind, arguments):
    assert tmbench(*arguments)[0] == 0
    rows = read_all(tmp_path / "results", kind)
    (tmp_path / "results").rename(tmp_path / AGAIN)
    assert rows
    for row in {row.method: row for row in rows}.values():
        threads, program, *words = shlex.split(command_of(row).text)
        assert threads == f"OMP_NUM_THREADS={row.threads}"
        assert program == "tmbench"
        words = [word.replace("METHOD", "streaming") for word in words]
        code, out, err = tmbench(*words, "--plan")
        assert code == 0, err
        assert "Nothing is to be measured" in out


WINDOWS = "dense tri_mix (n_local 512) tri_mix (n_local 64)"


def made(kind, **values):
    return kind(**made_rows.columns(COMMON | values))


@pytest.mark.parametrize(
    ("row", "words", "need"),
    [
        (made(TtftRow, **TTFT, prompt_hash="a"), "--prompt kv", None),
        (made(TtftRow, **TTFT | {"prompt": "jsonl-abc", "prompt_file": "a b.jsonl"}), "--prompt-file FILE", "a b.jsonl"),
        (made(TtftRow, **TTFT | {"prompt": "text-abc"}), "--prompt text:FILE", "hash abc"),
        (made(TtftRow, **TTFT, prefill="compiled", threads=0), "--compile", None),
        (made(TtftRow, **TTFT | TRIANGLE, method="tri_mix"), "--method dense --method tri_mix:n_init=8", "minference"),
        (
            made(TtftRow, **TTFT | TRIANGLE | {"interleaved": WINDOWS}, method="tri_mix"),
            "--method dense --method tri_mix:n_init=8", "interleaved with tri_mix (n_local 64) too",
        ),
        (
            made(TtftRow, **TTFT | {"interleaved": "dense dense (dense_backend torch)"}, dense_backend="torch"),
            "ttft --method dense --method dense:dense_backend=torch --prompt", None,
        ),
        (made(RulerRow, **RULER, task="vt"), "--wording reference", None),
        (made(RulerRow, **RULER | {"source": "essays"}, task="niah_single_2"), "--samples 100", "--data-dir"),
        (made(RulerRow, **RULER | {"wording": "prepared"}, task="vt"), "--data FOLDER", "FOLDER is"),
        (made(RulerRow, **RULER | {"wording": "mine"}, task="vt"), "--wording FILE", "wording mine"),
        (
            made(RulerRow, **RULER | {"chat_template": True, "chat_template_kwargs": '{"a": "b c"}'}, task="vt"),
            """--chat-template-kwargs '{"a": "b c"}'""", None,
        ),
        (made(TtftRow, **TTFT, context_parallel_size=4), "torchrun --nproc-per-node 4 -m tmbench ttft", None),
        (made(TtftRow, **TTFT, rope_scaling="yarn:factor=4,original=8"), "--rope-scaling yarn:factor=4,original=8", None),
        (made(TtftRow, **TTFT, remote_code=True), "--trust-remote-code", None),
        (made(TtftRow, **TTFT | {"interleaved": "dense attn_native"}), "ttft --method dense --attn-native --prompt", None),
        (made(AgreeRow, prompt="kv", samples=1, new_tokens=4, method="attn_native"), "--method dense --attn-native", None),
        (made(TtftRow, **TTFT | {"model": "a; rm -rf b"}), "--model 'a; rm -rf b'", None),
        (made(TtftRow, **TTFT, patterns="heads-1", method="minference"), "--method minference:patterns=FILE", "heads-1"),
    ],
)  # fmt: skip
def test_what_a_row_does_not_hold_is_said(row, words, need):
    command = command_of(row)
    assert words in command.text
    assert ("--seed" in command.text) == ("--data FOLDER" not in command.text), "no seed draws prepared prompts"
    needs = " ".join(command.needs)
    assert need in needs if need else "FILE" not in needs + command.text
