"""Losses and probes in a report: differences over the same samples with their intervals, and what a proposal loses."""

from __future__ import annotations

import hashlib
import json
import math
import statistics

import pytest

import made_rows
from old_files import write_schema_1
from report_rows import table_with, tables_of
from tmbench.errors import UserError
from tmbench.report.pictures import figures
from tmbench.report.report import build
from tmbench.report.student import mean_interval, quantile
from tmbench.report.writers import report_csv, report_json, report_markdown
from tmbench.results.rows import LossRow, ProbeRow
from tmbench.results.tables import append, csv_path, read_all

TRIANGLE = {"n_init": 8, "n_local": 64, "last_n": 16}
DENSE = {"prompt": [1.0, 1.2, 1.4], "answer": [0.1, 0.2, 0.3], "first": [0.01, 0.02, 0.03]}
SPARSE = {"prompt": [1.1, 1.5, 1.4], "answer": [0.1, 0.2, 0.3], "first": [2.01, 3.02, 4.03]}


def add_loss(root, method, losses, hashes=("a", "b", "c"), **changes):
    """A row of ``tmbench probe --loss`` with its samples beside it; returns the file of these."""
    name = f"samples/{method}-{changes.get('layers', '')}.jsonl"
    path = root / "some-gpu" / "loss" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {"prompt_tokens": 9, "answer_tokens": 2, "source": "noise", "backends": "dense:sdpa", "seconds": 1.0}
    lines = [
        plain | {f"nll_{part}": values[index] for part, values in losses.items()} | {"index": index, "prompt_hash": told}
        for index, told in enumerate(hashes)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {"length": 4096, "task": "vt", "samples": 3, "wording_hash": "f00d", "source": "noise", "sample_files": name}
    means = {f"nll_{part}": statistics.mean(values) for part, values in losses.items()}
    append(root, LossRow(**made_rows.columns(made_rows.COMMON | about | means | {"method": method} | changes)))
    return path


def add_probe(root, triangle, numbers=range(4), **changes):
    """A probe of four layers with these numbers, those in ``triangle`` proposed."""
    about = {"method": "dense", "length": 4096, "task": "vt", "samples": 2, "wording_hash": "f00d", "source": "noise"}
    for layer, middle in zip(numbers, (4e-7, 3e-7, 2e-7, 1e-7), strict=True):
        found = {"streaming_logits": 1e-6, "middle_logits": middle, "last_logits": None, "middle_probabilities": 0.5}
        told = {"proposal": "rank, accuracy budget 0.3, logits", "lost_share": 0.3, "pairs_share": 0.75}
        own = {"layer": layer, "triangle": layer in triangle}
        append(root, ProbeRow(**made_rows.columns(made_rows.COMMON | about | TRIANGLE | found | told | own | changes)))


def test_students_quantiles():
    assert [quantile(count) for count in (2, 3, 5, 11, 31)] == [12.7062, 4.3027, 2.7764, 2.2281, 2.0423]
    assert mean_interval([1.0, 3.0]) == pytest.approx((2 - 12.7062, 2 + 12.7062))


def test_losses_stand_beside_dense_with_their_intervals(tmp_path):
    add_loss(tmp_path, "dense", DENSE)
    add_loss(tmp_path, "streaming", SPARSE)
    report = build(tmp_path)
    table = {line["method"]: line for line in tables_of(report_markdown(report))[0]}
    apart = [0.1, 0.3, 0.0]
    reach = 4.3027 * statistics.stdev(apart) / math.sqrt(3)
    assert table["dense"]["prompt, against dense"] == "-"
    assert table["streaming"]["prompt"] == "1.3333"
    ends = f"{statistics.mean(apart) - reach:+.4f} to {statistics.mean(apart) + reach:+.4f}"
    assert table["streaming"]["prompt, against dense"] == f"+0.1333 ({ends})"
    assert table["streaming"]["answer, against dense"] == "+0.0000 (+0.0000 to +0.0000)"
    assert table["streaming"]["first token, against dense"].startswith("+3.0000 (")
    (section,) = report.losses
    (note,) = section.notes()
    assert note.startswith("Only 3 samples: fewer than 20 say little")
    figures = {line.split(",")[0] for line in report_csv(report).splitlines()}
    assert "loss" in figures
    rows = json.loads(report_json(report))[0]["rows"]
    assert rows[1]["nll_prompt_vs_dense"] == pytest.approx(statistics.mean(apart))
    assert rows[1]["nll_prompt_vs_dense_low"] == pytest.approx(statistics.mean(apart) - reach)


@pytest.mark.parametrize("hashes", [("a", "b", "x"), ("", "b", "c")])
def test_losses_of_other_prompts_are_not_paired(tmp_path, hashes):
    """Then the row's own difference stands, without an interval; what no hash is known of is taken for the same."""
    add_loss(tmp_path, "dense", DENSE)
    add_loss(tmp_path, "streaming", SPARSE, hashes, nll_prompt_vs_dense=0.5)
    cell = build(tmp_path).losses[0].cells[1]
    assert cell.prompt is not None
    assert (cell.prompt.mean == 0.5) == ("x" in hashes)
    assert (cell.prompt.ends is None) == ("x" in hashes)
    assert (cell.first is None) == ("x" in hashes)


@pytest.mark.parametrize("spoil", ["missing", "short", "other"])
def test_samples_that_do_not_make_a_rows_losses_make_no_interval(tmp_path, spoil):
    add_loss(tmp_path, "dense", DENSE)
    path = add_loss(tmp_path, "streaming", SPARSE, nll_prompt_vs_dense=0.1333)
    lines = path.read_text().splitlines()
    path.write_text({"missing": "", "short": "\n".join(lines[:2]) + "\n", "other": "\n".join([*lines[:2], lines[0]])}[spoil])
    (section,) = build(tmp_path).losses
    found = section.cells[1].prompt
    assert found is not None
    assert found.text == "+0.1333"
    reason = "samples are not beside the rows, or there is only one"
    assert f"No interval for all rows: {reason}." in section.notes()
    path.write_text('{"index": 0, "nll_prompt": "much"}\n')
    with pytest.raises(UserError, match="line 1 is not a sample"):
        build(tmp_path)


def test_a_probe_has_its_layers_its_proposal_and_what_that_loses(tmp_path):
    add_probe(tmp_path, {2, 3})
    add_loss(tmp_path, "dense", DENSE)
    add_loss(tmp_path, "tri_mix", SPARSE, layers="1-2", **TRIANGLE)
    (section,) = build(tmp_path).probes
    assert any("No loss was measured with the proposed layers" in note for note in section.notes())
    add_loss(tmp_path, "tri_mix", SPARSE, layers="2-", **TRIANGLE)
    add_loss(tmp_path, "tri_mix", SPARSE, layers="2-", **(TRIANGLE | {"n_local": 32}))
    report = build(tmp_path)
    (section,) = report.probes
    assert section.notes() == []
    assert section.proposed == (2, 3)
    layers = table_with(report_markdown(report), "share of the middle")
    assert [line["share of the middle"] for line in layers.values()] == ["40.0%", "30.0%", "20.0%", "10.0%"]
    assert [line["proposed"] for line in layers.values()] == ["no", "no", "yes", "yes"]
    assert (layers["0"]["middle"], layers["0"]["last"]) == ("4.00e-07", "-")
    proposal = table_with(report_markdown(report), "decided by")
    assert proposal["2-"]["middle's gradient lost"] == "30.0%"
    losses = section.tables()[2]
    assert [row[2] for row in losses.rows] == ["dense", "tri_mix (layers 2-, n_local 64)"]
    entry = next(entry for entry in json.loads(report_json(report)) if "proposed" in entry)
    assert (entry["proposed"], entry["proposal"]) == ([2, 3], "rank, accuracy budget 0.3, logits")
    lines = [line for line in report_csv(report).splitlines() if line.startswith("probe,") and ",middle_logits," in line]
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("proposed", "named", "taken"),
    [({3}, "3", "3"), ({5, 7}, "5,7", "5,7"), ({7}, "7-", "7-"), ({7}, "7-", "7"), ({1, 3, 5, 7}, "1,3,5,7", "1,3,5,7")],
)
def test_layers_of_a_hybrid_are_named_by_the_models_own_numbers(proposed, named, taken, tmp_path):
    """Behind the last one that was probed there may be others: it is then 7, and 7- where it is the last of all."""
    add_probe(tmp_path, proposed, range(1, 8, 2))
    add_loss(tmp_path, "dense", DENSE)
    add_loss(tmp_path, "tri_mix", SPARSE, layers=taken, **TRIANGLE)
    report = build(tmp_path)
    (section,) = report.probes
    assert list(table_with(report_markdown(report), "decided by")) == [named]
    assert [cell.row.parameters for cell in section.losses if cell.row.method == "tri_mix"]


def test_a_probe_by_probabilities_shows_these(tmp_path):
    add_probe(tmp_path, {3}, proposal="depth, time budget 0.5, probabilities")
    (section,) = build(tmp_path).probes
    assert section.derivative == "probabilities"
    assert {row[2] for row in section.tables()[0].rows} == {"5.00e-01"}


def test_a_picture_of_a_probe_has_the_name_that_rows_of_the_first_schema_gave_it(tmp_path):
    add_probe(tmp_path / "new", {3})
    write_schema_1(csv_path(tmp_path / "old", ProbeRow, "some-gpu", "dense"), *read_all(tmp_path / "new", ProbeRow))
    columns = ("some-gpu", "dense", "a/model", "", "checkpoint", "bfloat16", 4096, 42, None, 8, 64, 16, "", 0, "",
               *[None] * 7, "", "vt", "f00d")  # fmt: skip
    digest = hashlib.sha256(repr(columns).encode()).hexdigest()[:6]
    for root in (tmp_path / "new", tmp_path / "old"):
        assert list(figures(build(root))) == [f"probe-some-gpu-model-vt-4k-{digest}.png"]
    add_probe(tmp_path / "new", {3}, prefill="compiled")
    add_probe(tmp_path / "new", {3}, model_hash="beef")
    assert len(figures(build(tmp_path / "new"))) == 3


def test_probes_of_other_triangles_stand_apart(tmp_path):
    add_probe(tmp_path, {3})
    add_probe(tmp_path, {3}, n_local=32)
    assert [section.setting.parameters for section in build(tmp_path).probes] == [
        "n_init 8, n_local 32, last_n 16",
        "n_init 8, n_local 64, last_n 16",
    ]
