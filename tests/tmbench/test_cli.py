"""The command line as its users meet it: help and results."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import made_rows
from command_lines import FAST_TTFT, PROGRAM, SEARCH
from tmbench import cli
from tmbench.cli.screen import print_rows
from tmbench.models import presets
from tmbench.results.json_text import json_text
from tmbench.results.rows import ProbeRow, RulerRow, TtftRow
from tmbench.results.tables import read_all

COMMANDS = (
    "ttft", "ruler", "ruler-data", "suite", "lm-eval", "agree", "sweep", "probe", "patterns", "tune", "merge", "report",
    "serving", "demo", "list", "env",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("patterns", "search"), ("patterns", "show")])
def test_help_comes_at_once(command):
    start = time.perf_counter()
    done = subprocess.run([*PROGRAM, *command, "--help"], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    assert "Usage" in done.stdout
    assert seconds < 3, "heavy imports belong into the commands: alone on a core this takes half a second"


def test_help_does_not_import_torch():
    code = "import sys, tmbench.cli; sys.exit(bool({'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_panel_of_a_command_has_more_than_8_options():
    import typer

    program: Any = typer.main.get_command(cli.app)
    commands = program.commands
    assert set(commands) == set(COMMANDS)
    below = commands["patterns"].commands
    assert set(below) == {"calibrate", "search", "show"}
    every = commands | {f"patterns {name}": command for name, command in below.items()}
    shown = {name: [option for option in command.params if not option.hidden] for name, command in every.items()}
    for name, options in shown.items():
        panels = Counter(getattr(option, "rich_help_panel", None) for option in options)
        assert max(panels.values(), default=0) <= 8, name
        assert len(options) <= 36, name
    # What the help does not list is named here one by one, and works as it does where it is shown. Its text names it too.
    unlisted = {f"{name} --{o.name}" for name, command in every.items() for o in command.params if o.hidden}
    layered = ("agree", "lm-eval", "probe", "ruler", "suite", "sweep", "ttft")
    refused = {"ttft --executor"}
    assert unlisted == {
        *(f"{name} --{option}" for name in ("ruler", "suite") for option in ("weights", "dense_backend", "attn_native")),
        "lm-eval --dense_backend", "lm-eval --attn_native",
        "ruler --prompt_length", "probe --prompt_length", "ruler --patterns", "ruler --n_init", "ruler --n_local",
        *(f"{name} --starting_layer" for name in layered), *refused
    }  # fmt: skip
    elsewhere = {f"{name} --starting_layer" for name in layered} | refused
    for name, command in every.items():
        for option in command.params:
            if option.hidden and f"{name} --{option.name}" not in elsewhere:
                assert option.opts[0] in command.help, f"{name} {option.opts[0]}"
    in_ttft = {"weights", "dense_backend", "prompt_length", "patterns", "n_init", "n_local"}
    assert in_ttft <= {option.name for option in shown["ttft"]}


@pytest.mark.slow
def test_ttft_to_report(tmbench, tmp_path):
    code, out, err = tmbench(*FAST_TTFT, "--method", "dense", "--method", "tri_mix", "--n-local", "32", "--json")
    assert code == 0
    rows = json.loads(out)
    assert [(row["method"], row["length"], row["status"]) for row in rows] == [("dense", 256, "ok"), ("tri_mix", 256, "ok")]
    assert rows[1]["parameters"] == "layers=4- n_init=8 n_local=32 last_n=128"
    assert "tri_mix: no starting layer is published for tiny" in err
    assert len(read_all(Path("results"), TtftRow)) == 2
    environment = json.loads(next(Path("results").glob("*/environments/*.json")).read_text())
    assert environment["packages"]["torch"] == rows[0]["torch"]

    code, out, _ = tmbench(*FAST_TTFT, "--dry-run", "--method", "dense", "--length", "512")
    assert code == 0
    assert "measured before" in out
    assert "to measure" in out

    code, out, _ = tmbench("report", "--plots", "plots", "--output", "report.md")
    assert code == 0
    assert "tri_mix" in Path("report.md").read_text()
    assert list(Path("plots").glob("*.png"))
    for option in ("--output", "--plots"):
        code, _, err = tmbench("report", option, "/dev/null/r")
        assert code == 2
        assert f"{option}: /dev/null/r cannot be written" in err
    code, out, _ = tmbench("report", "--format", "json")
    assert code == 0
    assert json.loads(out)
    code, out, _ = tmbench("report", "--format", "csv")
    assert len(list(csv.reader(out.splitlines()))) > 2


def test_paths_are_shown_as_they_are(tmbench):
    layers = [{"0": ["vertical_and_slash", 100, 800, 1.0]}]
    Path("a[b]:x:.json").write_text(json.dumps(layers))
    code, out, err = tmbench("patterns", "show", "a[b]:x:.json", "--plot", "br[/x]/[b].png")
    assert code == 0, err
    assert "a[b]:x:.json" in out
    assert "drew br[/x]/[b].png" in err


def test_json_has_no_number_that_is_not_finite(capsys):
    more = {"method": "streaming", "length": 256, "prompt": "kv", "repeats": 1, "warmup": 1, "interleaved": "streaming"}
    print_rows([TtftRow(**(made_rows.COMMON | more), logit_error=float("nan"), coverage=0.5)])
    out, _ = capsys.readouterr()
    assert "NaN" not in out
    assert [(row["logit_error"], row["coverage"]) for row in json.loads(out)] == [(None, 0.5)]


@pytest.mark.slow
def test_compilation_is_a_choice(tmbench, monkeypatch):

    monkeypatch.setattr("tmbench.engine.compiled_layers.BACKEND", "eager")
    monkeypatch.setenv("CXX", "c++")
    for option in ("--compile", "--no-compile"):
        assert tmbench(*FAST_TTFT, "--method", "dense", option)[0] == 0
    assert [row.prefill for row in read_all(Path("results"), TtftRow)] == ["compiled", "eager"]
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    code, _, err = tmbench(*FAST_TTFT, "--compile")
    assert code == 2
    assert "--compile needs a compiler" in err


@pytest.mark.slow
def test_ruler_and_its_data(tmbench):
    common = ("--task", "niah_single_1", "--length", "1K", "--samples", "2")
    code, _, _ = tmbench("ruler-data", "--output", "data", *common, "--offline")
    assert code == 0
    lines = Path("data/1024/data/niah_single_1/validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1]

    generated = tmbench("ruler", *common, "--method", "dense", "--device", "cpu", "--save-samples", "--offline")
    prepared = tmbench("ruler", *common, "--method", "dense", "--device", "cpu", "--data", "data")
    assert generated[0] == prepared[0] == 0
    scores = {row.wording: row.score for row in read_all(Path("results"), RulerRow)}
    assert scores["tmbench-1"] == scores["prepared"]

    code, _, err = tmbench("ruler", *common, "--task", "vt", "--device", "cpu", "--data", "data", "--output-dir", "other")
    assert code == 2
    assert "--data: The data folder data holds no validation.jsonl for task vt at length 1024" in err
    assert not Path("other").exists(), "no task is measured before all can be read"


@pytest.mark.slow
def test_samples_drawn_as_the_reference_draws_them_are_rows_of_their_own(tmbench):
    common = ("--task", "vt", "--length", "1K", "--samples", "2")
    for drawing in ((), ("--samples-as", "reference")):
        assert tmbench("ruler-data", "--output", "-".join(("data", *drawing)), *common, "--offline", *drawing)[0] == 0
        code, _, err = tmbench(
            "ruler", *common, "--method", "dense", "--device", "cpu", "--save-samples", "--offline", *drawing
        )
        assert code == 0, err
    rows = {row.samples_as: row for row in read_all(Path("results"), RulerRow)}
    assert set(rows) == {"tmbench", "reference"}
    prompts = {}
    for drawn, folder in (("tmbench", "data"), ("reference", "data---samples-as-reference")):
        file = Path("results") / rows[drawn].device / "ruler" / rows[drawn].predictions
        prompts[drawn] = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
        made = [json.loads(line) for line in Path(folder, "1024/data/vt/validation.jsonl").read_text().splitlines()]
        assert prompts[drawn] == [entry["input"] + entry["answer_prefix"] for entry in made]
        assert all(900 < entry["length"] <= 1024 for entry in made)
    assert set(prompts["tmbench"]).isdisjoint(prompts["reference"])


def test_data_for_a_task_that_does_not_fit_is_not_begun(tmbench):
    code, _, err = tmbench("ruler-data", "--output", "data", "--length", "600", "--task", "vt", "--task", "cwe", "--offline")
    assert code == 2
    assert "--length 600 is too short for cwe, which needs" in err
    assert not Path("data").exists()


@pytest.mark.slow
def test_patterns_are_searched_shown_and_used(tmbench):
    code, out, err = tmbench(*SEARCH)
    assert code == 0, err
    assert len(json.loads(Path("found.json").read_text())) == 8
    assert "found.json" in out
    code, shown, err = tmbench("patterns", "show", "found.json", "--plot", "plots/found.png")
    assert code == 0
    assert shown == out
    assert [int(line.split()[0]) for line in shown.splitlines() if line.split()[:1] and line.split()[0].isdigit()] == list(
        range(8)
    )
    assert Path("plots/found.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = tmbench("patterns", "show", "found.json", "--plot", "/dev/null/found.png")
    assert code == 2
    assert "--plot: /dev/null/found.png cannot be written" in err
    assert tmbench(*FAST_TTFT, "--method", "minference", "--patterns", "found.json")[0] == 0
    code, _, err = tmbench(*SEARCH)
    assert code == 2
    assert "--output found.json is there already" in " ".join(err.split())
    Path("found.json.partial").write_text("something else\n")
    assert tmbench(*SEARCH, "--overwrite", "--remap")[0] == 0
    assert not Path("found.json.partial").exists()
    assert {head[0] for layer in json.loads(Path("found.json").read_text()) for head in layer.values()} == {
        "vertical_and_slash"
    }


def test_budgets_of_many_kinds_are_shown_as_ranges(tmbench):
    layers = [{str(h): ["vertical_and_slash", 100 + h, 800 + h * n, 0.5] for h in range(6)} for n in range(3)]
    layers[1]["2"] = ["stream_llm", 7, 9, 0.25]
    Path("many.json").write_text(json.dumps(layers))
    code, out, _ = tmbench("patterns", "show", "many.json")
    assert code == 0
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert lines["1"] == ["5", "1", "7..105", "9..805", "0.458"]
    assert lines["all"] == ["17", "1"]


@pytest.mark.slow
def test_a_preset_is_timed_with_random_weights(tmbench, monkeypatch, make_model, tmp_path):
    """A small one stands in for the presets, which no CPU should be asked to build."""
    make_model("llama").config.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "small-8m.json").write_text(json.dumps(config | {"_name_or_path": "some/llama-3.1-8b"}))
    monkeypatch.setattr(presets, "FOLDER", tmp_path / "presets")

    preset = ("--model", "small-8m", "--device", "cpu")
    code, out, err = tmbench(
        "ttft", *preset, "--weights", "random", "--length", "600", "--repeats", "1", "--method", "dense", "--json"
    )
    assert code == 0, err
    row = json.loads(out)[0]
    found = tuple(row[name] for name in ("model", "revision", "weights", "prompt", "length", "status"))
    assert found == ("small-8m", "", "random", "random", 600, "ok")
    structured = ("--weights", "structured", "--length", "600", "--repeats", "1", "--method", "minference", "--json")
    code, out, err = tmbench("ttft", *preset, *structured)
    assert code == 0, err
    assert [json.loads(out)[0][name] for name in ("weights", "prompt", "status")] == ["structured", "random", "ok"]

    for arguments, words in (
        (
            (),
            "--model small-8m is a preset, a config without weights: add --weights random or --weights structured, or give",
        ),
        (("--weights", "random", "--prompt", "kv"), "has no tokenizer, which --prompt kv needs: use --prompt random"),
    ):
        code, _, err = tmbench("ttft", *preset, *arguments)
        assert code == 2
        assert words in " ".join(err.split())
    for command in (("ruler", *preset, "--weights", "random"), ("ruler-data", "--output", "data", *preset[:2])):
        code, _, err = tmbench(*command, "--offline")
        assert code == 2
        assert "small-8m is a preset, a config without a tokenizer" in " ".join(err.split())


@pytest.mark.slow
def test_a_dense_backend_can_be_forced(tmbench):
    for forced in ((), ("--dense-backend", "sdpa")):
        assert tmbench(*FAST_TTFT, "--method", "dense", *forced)[0] == 0
    rows = read_all(Path("results"), TtftRow)
    assert [(row.parameters, row.backends) for row in rows] == [("", "dense:sdpa"), ("dense_backend=sdpa", "dense:sdpa")]
    common = ("--task", "niah_single_1", "--length", "1K", "--samples", "1", "--offline", "--device", "cpu")
    assert tmbench("ruler", *common, "--method", "dense", "--dense-backend", "sdpa")[0] == 0
    assert [row.parameters for row in read_all(Path("results"), RulerRow)] == ["dense_backend=sdpa"]


@pytest.mark.slow
def test_parameters_behind_a_methods_name_reach_the_rows(tmbench):
    texts = (
        "flexprefill:gamma=0.9,tau=0.2,min_budget=256",
        "tri_mix_xattention:threshold=0.8,first_chunk=256",
        "flashprefill",
    )
    methods = [part for text in texts for part in ("--method", text)]
    assert tmbench(*FAST_TTFT, *methods, "--n-local", "64")[0] == 0
    common = ("--task", "niah_single_1", "--length", "1K", "--samples", "1", "--offline", "--device", "cpu")
    assert tmbench("ruler", *common, "--method", texts[1], "--n-local", "64")[0] == 0
    rows = {row.method: row for row in read_all(Path("results"), TtftRow)}
    flex, flash = rows["flexprefill"], rows["flashprefill"]
    assert flex.parameters == "gamma=0.9 tau=0.2 min_budget=256"
    assert (flash.parameters, flash.backends) == ("alpha=0.1", "flash_prefill:torch-blocks")
    for mixed in (rows["tri_mix_xattention"], *read_all(Path("results"), RulerRow)):
        expected = {"stride": 16, "threshold": 0.8, "first_chunk": 256, "n_local": 64}
        assert dict(mixed.settings) == expected | {"layers": "4-", "n_init": 8, "last_n": 128}


@pytest.mark.slow
def test_agree_to_report(tmbench):
    common = ("agree", "--length", "256", "--new-tokens", "4", "--samples", "2", "--device", "cpu", "--method", "streaming")
    code, out, err = tmbench(*common, "--n-local", "16", "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [(row["method"], row["samples"], row["new_tokens"], row["status"]) for row in rows] == [
        ("dense", 2, 4, "ok"),
        ("streaming", 2, 4, "ok"),
    ]
    before = {path: path.stat().st_mtime_ns for path in Path("results").glob("*/agree/**/*.*")}
    code, out, _ = tmbench(*common, "--n-local", "16")
    assert code == 0
    assert "of 4" in out
    assert before == {path: path.stat().st_mtime_ns for path in Path("results").glob("*/agree/**/*.*")}, "measured before"
    code, out, _ = tmbench("report")
    assert code == 0
    assert "Token agreement with dense: tiny" in out


SHORT_PROBE = ("probe", "--length", "700", "--samples", "1", "--device", "cpu", "--n-local", "64", "--last-n", "16")


@pytest.mark.slow
def test_a_probe_chooses_the_layers_of_later_runs(tmbench):
    code, out, err = tmbench(*SHORT_PROBE, "--plot", "plots/probe.png", "--accuracy-budget", "0.2")
    assert code == 0, err
    assert "Triangle layers under an accuracy budget 0.2" in out
    assert "yes, for --layers auto" in out
    assert Path("plots/probe.png").read_bytes().startswith(b"\x89PNG")
    path = next(Path("results").glob("*/probe/dense.csv"))
    proposed = [row.layer for row in read_all(Path("results"), ProbeRow) if row.triangle]
    assert 0 < len(proposed) < 8

    chosen = []
    layers: Any
    for layers in ("auto", str(path), ",".join(f"{layer}-{layer}" for layer in proposed)):
        code, out, err = tmbench(*FAST_TTFT, "--method", "tri_mix", "--layers", layers, "--overwrite", "--json")
        assert code == 0, err
        said = " ".join(err.split())
        assert layers[:1].isdecimal() or "by the probe of vt at 700, rank, accuracy budget 0.2, logits" in said
        assert layers[:1].isdecimal() or "that probe is of 700 tokens, and this run of 256" in said
        row = json.loads(out)[0]
        chosen.append(row["parameters"])
    assert len(set(chosen)) == 1
    assert len({row.key for row in read_all(Path("results"), TtftRow)}) == 1

    code, out, err = tmbench(*SHORT_PROBE, "--time-budget", "0.9", "--rule", "depth", "--json")
    assert code == 0, err
    layers = [row["layer"] for row in json.loads(out) if row["triangle"]]
    assert layers == list(range(8 - len(layers), 8))
    code, out, _ = tmbench(*FAST_TTFT, "--method", "tri_mix", "--layers", "auto", "--json")
    assert f"layers={8 - len(layers)}- " in json.loads(out)[0]["parameters"]
    sweep = ("sweep", "--device", "cpu", "--offline", "--length", "1K", "--task", "vt", "--dry-run")
    code, out, err = tmbench(*sweep, "--layers", "auto", "--layers", "random:5")
    assert code == 0, err
    code, _, err = tmbench(*SHORT_PROBE, "--plot", "/dev/null/p.png")
    assert code == 2
    assert "--plot: /dev/null/p.png cannot be written" in err
    code, out, _ = tmbench("report", "--plots", "plots")
    assert list(Path("plots").glob("probe-*-tiny-vt-700-*.png"))
    assert "probe of vt at 700, depth, time budget 0.9, logits" in out


@pytest.mark.slow
def test_losses_of_methods(tmbench):
    methods = ("--method", "dense", "--method", "tri_mix", "--layers", "2,5-7", "--n-local", "64", "--last-n", "16")
    code, out, err = tmbench("probe", "--loss", *methods, "--length", "700", "--samples", "1", "--device", "cpu", "--json")
    assert code == 0, err
    dense, tri_mix = json.loads(out)
    assert tri_mix["parameters"].startswith("layers=2,5-7 ")
    assert tri_mix["nll_prompt_vs_dense"] == pytest.approx(tri_mix["nll_prompt"] - dense["nll_prompt"], abs=1e-6)
    code, out, _ = tmbench("probe", "--loss", *methods, "--length", "700", "--samples", "1", "--device", "cpu")
    assert code == 0
    assert "Negative log-likelihood, nats a token: vt at 700 tokens, 1 sample" in out


def test_help_names_presets_and_dense_backends(tmbench):
    _, out, _ = tmbench("ttft", "--help")
    text = " ".join(out.replace("│", " ").split())
    assert "llama-3.1-70b, llama-3.1-8b, llama-4-scout-layers, qwen2.5-72b, qwen2.5-7b, qwen3-30b-a3b" in text
    assert "flash-attn-4, flash-attn-3, cudnn, flash-attn-2, sdpa" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "rows", "proposed"),
    [("fsfs", [("0", "100.0%"), ("2", "0.0%")], "2-"), ("sssf", [("3", "yes")], "3-"), ("fsff", None, "2-")],
)
def test_a_probe_of_a_hybrid_names_the_models_own_layers(tmbench, copy, kinds, rows, proposed):
    """What it shows for --layers is what --layers takes; of the last layer's middle nothing is lost, and no share shown."""
    about = json.loads((copy / "config.json").read_text())
    about |= {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 4, "head_dim": 16}
    about |= {"hidden_size": 64, "intermediate_size": 96, "sliding_window": 16}
    about["layer_types"] = [{"f": "full_attention", "s": "sliding_attention"}[kind] for kind in kinds]
    del about["rope_parameters"]
    (copy / "config.json").write_text(json.dumps(about))
    limit = ("--accuracy-budget", "0") if rows else ("--time-budget", "0.5", "--rule", "depth")
    code, out, err = tmbench(*SHORT_PROBE, "--task", "vt", "--model", str(copy), "--weights", "random", *limit)
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert [line[1] for line in lines if line[:1] == ["depth"]] == [proposed]
    for layer, share in rows or ():
        (shown,) = [line for line in lines if line[:1] == [layer]]
        assert shown[4] == share


def test_json_is_the_same_on_every_terminal():
    assert json.loads(json_text({"name": "é"}).encode("ascii")) == {"name": "é"}
