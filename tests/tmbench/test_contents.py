"""Nothing that was measured of other contents stands for what is asked now, whatever its name: every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tmbench.models import loading
from tmbench.results.rows import AgreeRow, LossRow, ProbeRow, RulerRow, TtftRow
from tmbench.results.tables import read_all

TINY = Path(loading.__file__).parent / "tiny"
RULER = ("ruler", "--model", "ckpt", "--method", "dense", "--length", "1K", "--device", "cpu", "--offline")
AGREE = ("agree", "--model", "ckpt", "--method", "streaming", "--n-local", "16", "--length", "256", "--new-tokens", "4",
         "--samples", "1", "--device", "cpu")  # fmt: skip
PROBE = ("probe", "--model", "ckpt", "--length", "700", "--samples", "1", "--device", "cpu", "--n-local", "64",
         "--last-n", "16")  # fmt: skip
LOSS = ("probe", "--loss", "--model", "ckpt", "--length", "700", "--samples", "1", "--device", "cpu", "--method", "dense")
TTFT = ("ttft", "--model", "ckpt", "--method", "dense", "--length", "256", "--repeats", "1", "--device", "cpu")
SWEEP = ("sweep", "--model", "ckpt", "--starting-layer", "4", "--n-local", "64", "--last-n", "0", "--last-n", "32", "--task",
         "vt", "--length", "768", "--samples", "1", "--repeats", "1", "--device", "cpu", "--offline")  # fmt: skip


@pytest.fixture
def ckpt(tmp_path, tmbench):
    """The embedded model's files as the checkpoint folder ``ckpt``, where the program runs."""
    shutil.copytree(TINY, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def spoil(folder: Path) -> None:
    """Noise on every weight: such a model answers nothing."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noisy = {name: one + 0.2 * torch.randn(one.shape, generator=generator).to(one.dtype) for name, one in tensors.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})


def nothing_measured(err: str) -> bool:
    return "nothing was measured: " in err


@pytest.mark.slow
def test_answers_of_other_weights_are_not_taken(tmbench, ckpt):
    vt = (*RULER, "--task", "vt", "--json")
    scores = []
    for samples in ("2", "2", "spoilt", "2", "4"):
        if samples == "spoilt":
            spoil(ckpt)
            continue
        code, out, err = tmbench(*vt, "--samples", samples)
        assert code == 0, err
        row = json.loads(out)[0]
        scores.append((row["samples"], row["score"], nothing_measured(err)))
    assert scores == [(2, 100.0, False), (2, 100.0, True), (2, 0.0, False), (4, 0.0, False)]
    files = {row.predictions for row in read_all(Path("results"), RulerRow)}
    assert len(files) == 2
    _, out, _ = tmbench("report")
    titles = [line for line in out.splitlines() if line.startswith("#### RULER at 1K: ckpt (files ")]
    assert len(set(titles)) == 2, "never in one table"
    shutil.rmtree(ckpt)
    shutil.copytree(TINY, ckpt)
    code, out, err = tmbench(*vt, "--samples", "2")
    assert (json.loads(out)[0]["score"], nothing_measured(err)) == (100.0, True), "the same files are the same model"


@pytest.mark.slow
@pytest.mark.parametrize(("command", "kind"), [(TTFT, TtftRow), (AGREE, AgreeRow), (PROBE, ProbeRow), (LOSS, LossRow)])
def test_each_command_measures_other_weights_anew_and_says_when_it_measured_nothing(tmbench, ckpt, command, kind):
    said, hashes = [], []
    for change in (None, None, spoil, None):
        if change is not None:
            change(ckpt)
        code, out, err = tmbench(*command, "--json")
        assert code == 0, err
        said.append(nothing_measured(err))
        hashes.append(json.loads(out)[0]["model_hash"])
    assert said == [False, True, False, True]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
    assert {row.model_hash for row in read_all(Path("results"), kind)} == set(hashes)
    assert tmbench(*command)[2].count("--overwrite measures again") == 1
    assert not nothing_measured(tmbench(*command, "--overwrite")[2])


@pytest.mark.slow
def test_a_sweep_measures_other_weights_anew(tmbench, ckpt):
    said = []
    for change in (None, None, spoil):
        if change is not None:
            change(ckpt)
        code, _, err = tmbench(*SWEEP)
        assert code == 0, err
        said.append(nothing_measured(err))
    assert said == [False, True, False]
    assert len(read_all(Path("results"), TtftRow)) == len(read_all(Path("results"), RulerRow)) == 2 * 3


@pytest.mark.slow
def test_a_probe_of_other_weights_proposes_no_layers(tmbench, ckpt):
    assert tmbench(*PROBE)[0] == 0
    tri_mix = (*TTFT[:3], "--method", "tri_mix", *TTFT[5:])
    path = next(Path("results").glob("*/probe/dense.csv"))
    for layers in ("auto", str(path)):
        assert tmbench(*tri_mix, "--layers", layers)[0] == 0
    spoil(ckpt)
    for layers, words in (("auto", "--layers auto finds"), (str(path), "probe/dense.csv holds")):
        code, _, err = tmbench(*tri_mix, "--layers", layers)
        assert code == 2
        assert f"{words} no probe of the files that ckpt has now" in " ".join(err.split())
        assert "run tmbench probe --model ckpt first" in " ".join(err.split())
    assert tmbench(*PROBE)[0] == 0
    assert tmbench(*tri_mix, "--layers", "auto")[0] == 0


def squad(answer: str, first: int = 0) -> dict[str, object]:
    """SQuAD's layout: one paragraph and question to an article."""
    articles = []
    for number in range(60):
        text = f"The colour of house {number} is {answer if number >= first else 'grey'} {number}."
        question = {"question": f"Which colour has house {number}?", "answers": [{"text": text.split()[-2]}]}
        articles.append({"title": str(number), "paragraphs": [{"context": text, "qas": [question]}]})
    return {"data": articles}


def answers_kept() -> list[list[str]]:
    """The references of every kept prediction, file by file."""
    paths = sorted(Path("results").glob("*/ruler/predictions/*/*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return [[json.loads(line)["outputs"][0] for line in path.read_text().splitlines()] for path in paths]


@pytest.mark.slow
def test_answers_to_replaced_questions_are_not_taken(tmbench, ckpt):
    Path("data").mkdir()
    asked = (*RULER, "--task", "qa_1", "--data-dir", "data", "--json")
    Path("data/squad.json").write_text(json.dumps(squad("red")))
    assert tmbench(*asked, "--samples", "2")[0] == 0
    Path("data/squad.json").write_text(json.dumps(squad("blue")))
    code, out, err = tmbench(*asked, "--samples", "3")
    assert code == 0, err
    assert answers_kept() == [["red"] * 2, ["blue"] * 3], "a score is never over two kinds of samples"
    for path in Path("results").glob("*/ruler/predictions/*/*.jsonl"):
        assert all(len(json.loads(line)["prompt_hash"]) == 12 for line in path.read_text().splitlines())
    _, out, _ = tmbench("report")
    assert sum(line.startswith("#### RULER at 1K: ckpt") for line in out.splitlines()) == 2
    assert "older data 1" in out


@pytest.mark.slow
def test_answers_to_edited_data_are_not_taken(tmbench, ckpt):
    """An edit of any sample counts, not of the first alone."""
    common = ("--task", "vt", "--length", "1K", "--offline")
    assert tmbench("ruler-data", "--output", "data", "--samples", "3", *common)[0] == 0
    asked = ("ruler", "--model", "ckpt", "--method", "dense", "--task", "vt", "--length", "1K", "--device", "cpu", "--data",
             "data", "--samples", "3", "--json")  # fmt: skip
    assert json.loads(tmbench(*asked)[1])[0]["score"] == 100.0
    path = Path("data/1024/data/vt/validation.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], json.dumps(json.loads(lines[2]) | {"outputs": ["NEVER"]})]) + "\n")
    code, out, err = tmbench(*asked)
    assert (code, json.loads(out)[0]["score"], nothing_measured(err)) == (0, 66.67, False)
    code, out, err = tmbench(*asked)
    assert (json.loads(out)[0]["score"], nothing_measured(err)) == (66.67, True)


@pytest.mark.slow
def test_budgets_of_an_edited_file_are_others(tmbench, ckpt):
    budgets = ("--patterns", "budgets.json", "--json")
    minference = (*TTFT[:3], "--method", "minference", *TTFT[5:], *budgets)
    hashes = []
    for columns in (30, 60):
        layers = [{str(head): ["vertical_and_slash", columns, 100, 1.0] for head in range(4)} for _ in range(8)]
        Path("budgets.json").write_text(json.dumps(layers))
        code, out, err = tmbench(*minference)
        assert (code, nothing_measured(err)) == (0, False), err
        hashes.append(json.loads(out)[0]["parameters"])
    assert len(set(hashes)) == 2
    assert all(text.startswith("patterns=budgets:") for text in hashes)
    assert len(read_all(Path("results"), TtftRow)) == 2


@pytest.mark.slow
def test_other_files_beside_the_weights_count_too(tmbench, ckpt):
    for name, fields in (("generation_config.json", {"temperature": 0.5}), ("tokenizer_config.json", {"extra": 1})):
        assert not nothing_measured(tmbench(*TTFT)[2])
        (ckpt / "README.md").write_text(name)
        assert nothing_measured(tmbench(*TTFT)[2])
        path = ckpt / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert not nothing_measured(tmbench(*TTFT)[2])
    assert len(read_all(Path("results"), TtftRow)) == 3
