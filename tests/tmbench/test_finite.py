"""Logits and gradients that are no numbers: a failed row with the remedy, never a figure, wherever a model is run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import under_plan
from bound_specs import Bound
from plans import plan_of
from tmbench.engine import roofline
from tmbench.engine.attention import applied_plan
from tmbench.engine.decode import generate
from tmbench.engine.finite import check_logits
from tmbench.engine.prefill import EAGER, PLAIN
from tmbench.engine.prefill_kind import obstacle_of
from tmbench.errors import NotFiniteError, UserError
from tmbench.measure import agree, loss, probe, search, ttft
from tmbench.measure.accuracy import AccuracySpec
from tmbench.measure.sweep import SweepSpec, swept_plans
from tmbench.methods.layers import Budget
from tmbench.methods.spec import MethodSpec
from tmbench.methods.table import METHODS
from tmbench.models.loading import LoadedModel
from tmbench.results import environment
from tmbench.results.rows import AgreeRow, LossRow, ProbeRow, RulerRow, TtftRow
from tmbench.results.tables import read_all
from tmbench.suites.ruler import Ruler
from tmbench_kernels import Sections, Triangle

REMEDY = "float16: .* use --dtype bfloat16 or --dtype float32"


@pytest.fixture
def overflowing(make_model, tokenizer):
    """A model whose hidden states pass 65504 in the second layer, though each of its weights fits into float16."""

    def make(dtype=torch.float16, **changes):
        model = make_model("llama", **({"vocab_size": len(tokenizer), "max_position_embeddings": 4096} | changes))
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight *= 1e3
            model.model.layers[1].mlp.down_proj.weight *= 1e4
        assert all(weight.half().isfinite().all() for weight in model.parameters())
        return LoadedModel("small", model.to(dtype), tokenizer, "random", "")

    return make


def plans_of(loaded, *names):
    return [plan_of(loaded.model, name, n_init=2, n_local=16) for name in names]


class Jobs:
    """What each command runs, with dense and streaming attention, and the rows that came of it."""

    def __init__(self, loaded, root):
        self.loaded, self.root = loaded, root
        self.plans = plans_of(loaded, "dense", "streaming")
        self.here = environment.current(torch.device("cpu"))

    def about(self, **more):
        return {"environment": self.here, "root": self.root, "plans": self.plans, **more}

    def ttft(self, **changes):
        values = {"lengths": (96,), "prompt": "random", "repeats": 1, "warmup": 1, "prefill": PLAIN} | changes
        return Bound(ttft.TtftSpec, self.loaded, **self.about(**values)), TtftRow

    def ttft_arranged(self):
        return self.ttft(prefill=EAGER)

    def ruler(self):
        values = {"suite": Ruler(offline=True), "lengths": (1024,), "tasks": ("vt",), "samples": 2}
        return Bound(AccuracySpec, self.loaded, **self.about(**values)), RulerRow

    def agree(self):
        values = {"lengths": (96,), "prompt": "random", "samples": 2, "new_tokens": 6}
        return Bound(agree.AgreeSpec, self.loaded, **self.about(**values)), AgreeRow

    def loss(self):
        values = {"lengths": (96,), "tasks": ("random",), "samples": 2}
        return Bound(loss.LossSpec, self.loaded, **self.about(**values)), LossRow

    def rows(self, name):
        work, kind = getattr(self, name)()
        work.run()
        return {row.method: row for row in read_all(self.root, kind)}


@pytest.fixture(autouse=True)
def _no_matrix_products(monkeypatch):
    monkeypatch.setattr(roofline, "gemm_throughput", lambda device, dtype, prefill_s: 1e11)


COMMANDS = ["ttft", "ttft_arranged", "ruler", "agree", "loss"]
FIGURES = {
    "ttft_median_s", "first_token", "same_token_as_dense", "logit_error", "score", "predictions", "agreement", "identical",
    "divergence_median", "choices", "nll_prompt", "nll_answer", "nll_first", "nll_prompt_vs_dense",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_overflows_is_a_failed_row_with_the_remedy(command, overflowing, tmp_path):
    rows = Jobs(overflowing(), tmp_path).rows(command)
    assert set(rows) == {"dense", "streaming"}
    for row in rows.values():
        assert row.status == "failed"
        assert {getattr(row, name) for name in FIGURES & set(row.__dataclass_fields__)} <= {None, ""}
    assert "NotFiniteError: the logits of the prompt's last token are not finite in float16: nothing above 65504" in (
        rows["dense"].error
    )
    assert rows["dense"].error.endswith("use --dtype bfloat16 or --dtype float32")
    if command != "agree":
        assert rows["streaming"].error == rows["dense"].error
    assert not list(tmp_path.glob("*/*/*/*/*.jsonl")), "no sample is kept that came of it"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_remedy_does(command, overflowing, tmp_path):
    rows = Jobs(overflowing(torch.bfloat16), tmp_path).rows(command)
    assert {row.status for row in rows.values()} == {"ok"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS])
def test_every_method_says_so(name, overflowing, prompt):
    """A pattern that chooses by the data is handed no numbers to choose by."""
    loaded = overflowing()
    (plan,) = plans_of(loaded, name)
    with torch.inference_mode(), applied_plan(loaded.model, plan), pytest.raises(NotFiniteError, match=REMEDY):
        generate(loaded.model, prompt(300), 2)


@pytest.mark.slow
def test_a_sweep_fails_as_its_parts_do(overflowing, tmp_path):
    jobs = Jobs(overflowing(), tmp_path)
    variant = MethodSpec.of("tri_mix").with_layers(jobs.loaded.shape, starting_layer=1)
    plans = swept_plans([variant], jobs.loaded.shape, 1024)
    halves = {"ttft": jobs.ttft()[0].spec, "accuracy": jobs.ruler()[0].spec}
    work = Bound(SweepSpec, jobs.loaded, **halves, environment=jobs.here, root=tmp_path, plans={1024: plans})
    rows = work.run()
    assert [row.kind for row in rows] == ["ttft", "ttft", "ruler", "ruler"]
    assert {row.status for row in rows} == {"failed"}
    assert all("not finite in float16" in row.error for row in rows)
    assert len(read_all(tmp_path, TtftRow)) == len(read_all(tmp_path, RulerRow)) == 2


@pytest.mark.slow
def test_a_search_is_one_sentence_and_leaves_nothing_to_go_on_from(overflowing, tmp_path):
    work = search_of(overflowing(), tmp_path)
    with pytest.raises(
        UserError, match=f"small cannot be searched: the attention weights of layer 2 are not finite in {REMEDY}"
    ):
        work.run()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_search_looks_at_the_logits_too(overflowing, tmp_path):
    """The last layer's overflow is in no layer's attention."""
    loaded = overflowing(torch.float32)
    with torch.no_grad():
        loaded.model.lm_head.weight *= 1e38
        loaded.model.lm_head.weight *= 1e3
    with pytest.raises(UserError, match=r"lm_head\.weight holds values that are no numbers, get the checkpoint anew"):
        search_of(loaded, tmp_path).run()
    assert not list(tmp_path.iterdir())


def search_of(loaded, root):
    return Bound(search.SearchSpec, loaded, output=root / "found.json", length=2600, prompt="random")


def probe_of(loaded, root):
    here = environment.current(torch.device("cpu"))
    about = {"environment": here, "root": root, "lengths": (40,), "tasks": ("random",), "samples": 2}
    return Bound(probe.ProbeSpec, loaded, **about, budget=Budget(0.3), window=Triangle(3, 7, 5))


@pytest.mark.slow
def test_a_probe_of_logits_that_are_no_numbers_is_a_failed_row(overflowing, tmp_path):
    loaded = overflowing(torch.float32)
    with torch.no_grad():
        loaded.model.model.norm.weight *= 1e38
        loaded.model.lm_head.weight *= 1e6
    probe_of(loaded, tmp_path).run()
    (row,) = read_all(tmp_path, ProbeRow)
    assert row.status == "failed"
    assert "the logits of the prompt's last token are not finite in float32: the weights may be damaged" in row.error


@pytest.mark.slow
def test_gradients_that_are_no_numbers_are_a_failed_row(make_model, tokenizer, tmp_path):
    """Logits of 1e30 are numbers, and so are values of 1e10; what differentiates the one by the other's weights is not."""
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e33
        model.model.layers[3].self_attn.v_proj.weight *= 1e10
        model.model.layers[3].self_attn.o_proj.weight *= 1e-4
    loaded = LoadedModel("small", model, tokenizer, "random", "")
    with pytest.raises(NotFiniteError, match=r"the gradients of layer \d are not finite in float32"):
        probe.gradients(model, torch.arange(3, 43)[None], 5, Sections(3, 7, 5))
    probe_of(loaded, tmp_path).run()
    (row,) = read_all(tmp_path, ProbeRow)
    assert (row.status, row.triangle) == ("failed", None)
    assert not list(tmp_path.glob("*/*/*/*/*.jsonl"))


@pytest.fixture
def spoiled(monkeypatch):
    """``spoiled(model, place, change)``: the head's n-th logits are changed, n counted over calls, 0 the prompt's."""

    def spoil(model, place, change):
        calls = []

        def hook(module, given, out):
            calls.append(out.shape)
            return change(out.clone()) if len(calls) - 1 == place else out

        model.lm_head.register_forward_hook(hook)

    return spoil


def fill(value, start=5, end=6):
    def change(logits):
        logits[..., start:end] = value
        return logits

    return change


@pytest.mark.slow
@pytest.mark.parametrize("change", [fill(math.nan), fill(math.inf), fill(-math.inf, 0, None)])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_every_step_of_decoding_is_looked_at(change, place, overflowing, prompt, spoiled):
    word = "the prompt's last token" if place == 0 else f"new token {place + 1}"

    def fresh():
        loaded = overflowing(torch.float32, eos_token_id=None)
        spoiled(loaded.model, place, change)
        return loaded, plans_of(loaded, "streaming")[0]

    loaded, plan = fresh()
    with (
        applied_plan(loaded.model, plan),
        pytest.raises(NotFiniteError, match=f"the logits of {word} are not finite in float32"),
    ):
        generate(loaded.model, prompt(40), 6)
    loaded, plan = fresh()
    with pytest.raises(NotFiniteError, match=f"the logits of {word} are"):
        under_plan.follow(loaded.model, plan, prompt(40), 6)
    loaded, plan = fresh()
    with pytest.raises(NotFiniteError, match=f"the logits of {word} are"):
        under_plan.losses(loaded.model, plan, prompt(40), [5, 6, 7, 8, 9])


def test_the_losses_of_a_prompt_are_looked_at(overflowing, prompt, spoiled):
    loaded = overflowing(torch.float32)
    spoiled(loaded.model, 2, fill(math.nan))
    with pytest.raises(NotFiniteError, match="the logits of the prompt's tokens are not finite"):
        under_plan.losses(loaded.model, plans_of(loaded, "dense")[0], prompt(40), [5, 6])


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_tokens_that_a_model_masks_are_no_failure(command, overflowing, tmp_path):
    """A padded vocabulary: the same figures as without the padding, and not NaN for the distance to dense."""
    loaded = overflowing(torch.float32)
    count = loaded.model.config.vocab_size
    plain = Jobs(loaded, tmp_path / "plain").rows(command)

    def pad(module, given, out):
        return torch.cat([out, out.new_full((*out.shape[:-1], 7), -torch.inf)], -1)

    loaded.model.lm_head.register_forward_hook(pad)
    with torch.no_grad():
        assert loaded.model(torch.tensor([[5]])).logits.shape[-1] == count + 7
    assert not obstacle_of(loaded.model)
    padded = Jobs(loaded, tmp_path / "padded").rows(command)
    for method, row in padded.items():
        assert row.status == "ok"
        for name in FIGURES & set(row.__dataclass_fields__) - {"ttft_median_s"}:
            assert getattr(row, name) == getattr(plain[method], name)
    if "ttft" in command:
        assert 0 < padded["streaming"].logit_error < 10


def test_what_is_a_number_is_no_matter_of_its_sign():
    model: Any = torch.nn.Linear(2, 2)
    model.dtype = torch.float32
    low, nan, high = -math.inf, math.nan, math.inf
    for sound in ([1.0, 2.0], [low, -3.0], [0.0, low], [1e38, low]):
        check_logits(torch.tensor([sound, [0.0, 0.0]]), model, "here")
    for bad in ([nan, 1.0], [1.0, nan], [low, nan], [high, 1.0], [high, low], [low, low]):
        with pytest.raises(NotFiniteError, match="the logits here are not finite in float32"):
            check_logits(torch.tensor([[0.0, 0.0], bad]), model, "here")


def test_a_loss_that_a_mask_makes_infinite_is_no_figure(overflowing, prompt):
    loaded = overflowing(torch.float32)
    loaded.model.lm_head.register_forward_hook(lambda module, given, out: fill(-math.inf, 5, 6)(out.clone()))
    with pytest.raises(RuntimeError, match="masks a token that the text has"):
        under_plan.losses(loaded.model, plans_of(loaded, "dense")[0], prompt(40), [7, 5])


@pytest.mark.parametrize(
    ("value", "reference", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 5.0, -math.inf], [3.0, 4.0, -math.inf], 0.2),
        ([3.0, 5.0, -math.inf], [3.0, 4.0, 0.0], math.inf),
        ([3e30, 4e30], [3e30, 4e30], 0.0),
        ([0.0, 5e30], [3e30, 4e30], math.sqrt(10) / 5),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_the_distance_of_logits(value, reference, error):
    assert ttft._relative_rms(torch.tensor(value), torch.tensor(reference)) == pytest.approx(error)


def test_weights_that_are_no_numbers_are_named(overflowing, prompt):
    for dtype in (torch.float16, torch.bfloat16):
        loaded = overflowing(dtype)
        loaded.model.model.layers[2].mlp.up_proj.weight.data[3, 4] = math.nan
        with pytest.raises(NotFiniteError, match=r"the checkpoint's model\.layers\.2\.mlp\.up_proj\.weight holds values"):
            generate(loaded.model, prompt(20), 2)
    loaded = overflowing(torch.bfloat16)
    loaded.model.model.layers[2].mlp.up_proj.weight.data *= 1e37
    loaded.model.model.layers[2].mlp.down_proj.weight.data *= 1e30
    with pytest.raises(NotFiniteError, match="not finite in bfloat16: use --dtype float32"):
        generate(loaded.model, prompt(20), 2)
