"""Checkpoints whose weights are edited."""

from __future__ import annotations

from safetensors.torch import load_file, save_file


def change_weights(folder, edit):
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, {"format": "pt"})
