"""The calibration of skip-softmax on a model: what it counts, what it fits, and what is left of one that was interrupted."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from bound_specs import Bound
from plans import plan_of
from tmbench.engine.attention import applied
from tmbench.engine.density import PairCounter
from tmbench.errors import UserError
from tmbench.measure import calibrate
from tmbench.measure.calibrate import BINS, CalibrateSpec, counted, fitted, margin_of, skipped
from tmbench.measure.partial import partial_path
from tmbench.models.loading import load
from tmbench.suites.prompts import prompt_ids
from tmbench_kernels import SkipSoftmax
from tmbench_kernels.skip_softmax.calibration import Calibration


@pytest.fixture(scope="module")
def tiny():
    """The embedded model: attention of random weights has no tile to skip."""
    return load("tiny", device="cpu")


@pytest.fixture
def job(tiny, tmp_path):
    def make(**changes):
        values = {
            "output": tmp_path / "skip.json", "lengths": (500, 1000), "prompts": ("vt", "kv"), "samples": 2,
            "order": "descending",
        }  # fmt: skip
        return Bound(CalibrateSpec, tiny, **(values | changes))

    return make


def test_margins_are_counted_and_shares_found_again():
    draw = random.Random(0)
    margins = [draw.uniform(-40, 8) for _ in range(5000)] + [math.inf] * 100
    counts = counted(torch.tensor([*margins, *[-math.inf] * 50])).tolist()
    assert (len(counts), sum(counts)) == (BINS + 2, 5100)
    for least in (-31.9, -20.03, -7.5, -0.01, 0.0):
        assert skipped(counts, least) == pytest.approx(sum(one < least for one in margins) / 5100, abs=2e-3)
    for share in (0.2, 0.4, 0.7):
        margin = margin_of(counts, share)
        assert margin is not None
        assert skipped(counts, margin) == pytest.approx(share, abs=1e-9)
    assert margin_of(counts, 0.1) is None, "below the lowest margin that is counted"
    assert margin_of(counts, 0.9) is None, "above 0"


def test_a_fit_reaches_its_targets_where_the_margins_are_those_of_its_form():
    """Of margins such that a threshold of a exp(b s) over the keys skips the share s."""
    a, b = 2.0, 7.0
    counts = {
        length: counted(torch.tensor([math.log(a * math.exp(b * (n + 0.5) / 4000) / length) for n in range(4000)])).tolist()
        for length in (10**4, 10**5)
    }
    found = fitted(counts)
    assert found[:2] == pytest.approx((a, b), rel=0.05)
    for shares in found.shares.values():
        assert all(share == pytest.approx(target, abs=0.01) for target, share in shares.items())
    with pytest.raises(UserError, match="no threshold skips 20% of them: give a longer --length, or the other --order"):
        fitted({1000: counted(torch.full((100,), 2.0)).tolist()})


@pytest.mark.slow
def test_what_the_file_says_is_what_the_method_skips(job):
    work = job()
    (found,), steps = work.run_and_steps()
    assert sum(step.work for step in steps) == pytest.approx(2 * (500**2 + 1000**2))
    assert not partial_path(work.output).exists()
    calibration = Calibration.read(work.output)
    assert (calibration.a, calibration.b, calibration.order) == (found.a, found.b, "descending")
    about = json.loads(work.output.read_text())["tmbench"]
    assert (about["lengths"], about["samples"], about["model"]) == ([500, 1000], 2, "tiny")
    given = {"target": 0.3, "calibration": str(work.output), "order": "descending"}
    plan = plan_of(work.loaded.model, "skip_softmax", **given)
    assert plan.parameters["calibration"] == f"skip:{calibration.digest}"
    assert plan.parameters["threshold_scale_factor"] == calibration.factor(0.3)
    pattern = SkipSoftmax(threshold_scale_factor=calibration.factor(0.3), order="descending")
    for length in (500, 1000):
        counter = PairCounter()
        with torch.inference_mode(), applied(work.loaded.model, "dense") as session:
            # What dense attention is given, as the calibration read it.
            session.observer = lambda layer, _, q, k, scale, counter=counter: counter(layer, pattern, q, k, scale)
            for number in range(2):
                work.loaded.model(prompt_ids(work.prompts[number], length, work.loaded, 42, number))
        assert found.shares[length][0.3] == pytest.approx(counter.skipped_share, abs=0.01)


@pytest.mark.slow
def test_an_interrupted_calibration_goes_on_and_reads_nothing_twice(job, monkeypatch):
    whole = job(output=job().output.with_name("whole.json"))
    expected = whole.run()
    work, real, read = job(), calibrate.counted, []

    def stop(margins):
        read.append(margins)
        if len(read) == 3 * 8:
            raise KeyboardInterrupt
        return real(margins)

    monkeypatch.setattr(calibrate, "counted", stop)
    with pytest.raises(KeyboardInterrupt):
        work.run()
    assert not work.output.exists()
    assert partial_path(work.output).read_bytes().count(b"\n") == 1 + 2
    with pytest.raises(UserError, match="is of a calibration with another seed .7, not 42.|another seed .*--overwrite"):
        job(seed=7).run()
    read.clear()
    assert work.run() == expected
    assert len(read) == 2 * 8, "two prompts of eight layers were left"
    assert work.output.read_text() == whole.output.read_text()
    with pytest.raises(UserError, match=r"skip\.json is there already: name another file, or add --overwrite to calibrate"):
        job().check()


@pytest.mark.slow
def test_the_command_writes_what_a_method_reads(tmbench, tmp_path):
    file = str(tmp_path / "skip.json")
    asked = ("--length", "512", "--length", "1K", "--samples", "1", "--order", "descending", "--output", file)
    code, out, err = tmbench("patterns", "calibrate", *asked)
    assert code == 0, err
    assert "target 50%" in out
    method = f"skip_softmax:calibration={file},target=0.3,order=descending"
    assert method.replace("0.3", "0.5") in err.replace("\n", "")
    code, out, err = tmbench("ruler", "--length", "1K", "--samples", "1", "--task", "vt", "--method", method, "--json")
    assert code == 0, err
    (row,) = json.loads(out)
    assert f"calibration={Path(file).stem}:" in row["parameters"]
    assert 0 < row["skipped_share"] < 1


def test_what_it_cannot_be_given_is_one_sentence(tmbench, tmp_path):
    for arguments, words in (
        (("--order", "random"), "--order random is unknown: choose from ascending, descending"),
        (("--prompt", "poems"), "--prompt poems is unknown: choose from kv, random"),
    ):
        code, _, err = tmbench("patterns", "calibrate", "--output", str(tmp_path / "skip.json"), *arguments)
        assert code == 2
        assert words in err.replace("\n", " ")
