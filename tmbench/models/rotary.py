"""What a model's rotary embeddings depend on."""

from __future__ import annotations

from transformers import PreTrainedModel


def depends_on_length(model: PreTrainedModel) -> bool:
    """Whether the frequencies follow from how long a text is, and not from its config alone."""
    kinds = [getattr(module, "rope_type", "") for module in model.modules()]
    named = {str(one) for kind in kinds for one in (kind.values() if isinstance(kind, dict) else [kind])}
    return any("dynamic" in kind or "longrope" in kind for kind in named)
