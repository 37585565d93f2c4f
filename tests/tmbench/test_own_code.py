"""Checkpoints that bring code of their own: not run unless it is trusted, and rows of another model where it is."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tmbench.engine.attention import applied
from tmbench.errors import UnsupportedModelError, UserError
from tmbench.measure.spec import ModelSource
from tmbench.models import loading
from tmbench.models.attention_modules import attention_modules
from tmbench.models.own_code import PACKAGE
from tmbench.report.settings import TtftSetting
from tmbench.results.rows import TtftRow
from tmbench.results.tables import read_all

TINY = Path(loading.__file__).parent / "tiny"
MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
from .scale import SCALE

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * SCALE
        return out
"""
ATTENTION = """
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

class OwnAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        own = LlamaAttention(config, layer_idx)
        self.config, self.layer_idx, self.is_causal, self.head_dim = config, layer_idx, True, own.head_dim
        self.scaling, self.num_key_value_groups, self.attention_dropout = own.scaling, own.num_key_value_groups, 0.0
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = own.q_proj, own.k_proj, own.v_proj, own.o_proj

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = LOOKED_UP
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights
"""
REPLACED = """
    def __init__(self, config):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.self_attn = OwnAttention(config, number)
        self.post_init()
"""


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """Where transformers puts such code, and nothing of it left behind."""
    before, found = set(sys.modules), list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == PACKAGE:
            del sys.modules[name]
    sys.path[:] = found


def written(folder: Path, code: str, family: str = "own-llama") -> Path:
    """The embedded model as a checkpoint with that code."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": family, "auto_map": own}))
    (folder / "own.py").write_text(code)
    (folder / "scale.py").write_text("SCALE = 2.0\n")
    return folder


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "own", MODEL)


def test_code_that_is_not_trusted_does_not_run(folder):
    with pytest.raises(UserError, match=r"brings code of its own \(auto_map\), which tmbench does not run: .* or "
                                        r"--trust-remote-code runs it$"):  # fmt: skip
        loading.load(str(folder), device="cpu")


@pytest.mark.slow
def test_code_that_is_trusted_runs(folder, prompt):
    loaded = loading.load(str(folder), device="cpu", trust_remote_code=True)
    assert loaded.remote_code
    assert loaded.notes == ()
    plain = loading.load("tiny", device="cpu")
    ids = prompt(200)
    with torch.inference_mode(), applied(loaded.model, "dense"):
        got = loaded.model(ids).logits
    with torch.inference_mode():
        torch.testing.assert_close(got, 2 * plain.model(ids).logits, rtol=1e-4, atol=1e-4)
    # A family that transformers has too runs by the checkpoint's code where that is trusted, and by transformers' where not.
    both = written(folder.parent / "both", MODEL.replace('"own-llama"', '"llama"'), "llama")
    distrusted = loading.load(str(both), device="cpu")
    assert not distrusted.remote_code
    assert distrusted.notes[0].endswith("its family is transformers' own, and --trust-remote-code runs it")
    assert loading.load(str(both), device="cpu", trust_remote_code=True).remote_code
    assert not loading.load("tiny", device="cpu", trust_remote_code=True).remote_code


@pytest.mark.slow
def test_what_ran_is_a_model_of_its_own(folder):
    loaded = loading.load(str(folder), device="cpu", trust_remote_code=True)
    assert loaded.row_fields()["remote_code"] is True
    again = ModelSource.of(loaded).load(plan_only=True)
    assert again.row_fields() == loaded.row_fields()
    # A file that the code imports counts as much as the one that the config names.
    (folder / "scale.py").write_text("SCALE = 3.0\n")
    assert loading.load(str(folder), device="cpu", trust_remote_code=True).model_hash != loaded.model_hash


@pytest.mark.slow
@pytest.mark.parametrize(
    ("look_up", "served"),
    [
        ("ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)", True),
        ("ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]", True),
        ("eager_attention_forward", False),
    ],
)
def test_attention_of_its_own_is_served_where_it_is_looked_up(look_up, served, tmp_path, prompt):
    code = ATTENTION.replace("LOOKED_UP", look_up) + MODEL + REPLACED
    loaded = loading.load(str(written(tmp_path / "own", code)), device="cpu", trust_remote_code=True)
    if not served:
        with pytest.raises(UnsupportedModelError, match="OwnForCausalLM does not use transformers' attention interface"):
            attention_modules(loaded.model)
        return
    ids = prompt(600)
    with torch.inference_mode():
        with applied(loaded.model, "dense") as session:
            dense = loaded.model(ids).logits
            session.check_complete()
        with applied(loaded.model, "streaming", n_local=64) as session:
            sparse = loaded.model(ids).logits
            session.check_complete()
        expected = 2 * loading.load("tiny", device="cpu").model(ids).logits
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sparse, expected, atol=0.1)


@pytest.mark.slow
def test_rows_say_so(folder, tmp_path, tmbench):
    given = ("ttft", "--model", str(folder), "--length", "256", "--method", "dense", "--repeats", "1", "--device", "cpu",
             "--output-dir", str(tmp_path / "results"))  # fmt: skip
    code, out, err = tmbench(*given)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    code, _, err = tmbench(*given, "--trust-remote-code")
    assert code == 0, err
    (row,) = read_all(tmp_path / "results", TtftRow)
    assert row.remote_code
    assert "by the checkpoint's own code" in TtftSetting.of(row, 0).subject
    code, _, err = tmbench(
        "ruler-data", "--model", str(folder), "--trust-remote-code", "--length", "1K", "--task", "vt", "--samples", "1",
        "--output", str(tmp_path / "data"),
    )  # fmt: skip
    assert code == 0, err
    code, out, err = tmbench("list", "--model", str(folder), "--trust-remote-code")
    assert code == 0, err
    assert "full attention" in out
    code, out, err = tmbench(
        "ruler", "--model", str(folder), "--trust-remote-code", "--length", "1K", "--task", "vt", "--dry-run", "--offline"
    )
    assert code == 0, err
