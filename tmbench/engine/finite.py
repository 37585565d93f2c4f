"""Whether what a model computed is made of numbers: a figure made of NaN would look like one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tmbench.errors import NotFiniteError


def check_logits(logits: Tensor, model: PreTrainedModel, place: str) -> None:
    """Raise NotFiniteError where logits ``[..., vocabulary]`` hold NaN or infinity anywhere, or minus infinity alone.

    Models mask tokens that must never come, such as a vocabulary's padding, with minus infinity: these logits are sound.
    ``place`` says whose logits they are, as "of the prompt's last token".
    """
    # NaN and infinity survive a maximum; minus infinity does where there is nothing else.
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise not_finite(f"the logits {place}", model)


def not_finite(what: str, model: PreTrainedModel) -> NotFiniteError:
    """The error to raise, with the remedy that this model's type and weights suggest; ``what`` is plural."""
    kind = str(model.dtype).removeprefix("torch.")
    broken = next((name for name, weight in model.named_parameters() if _broken(weight)), None)
    if broken is not None:
        remedy = f"the checkpoint's {broken} holds values that are no numbers, get the checkpoint anew"
    elif model.dtype == torch.float16:
        remedy = "nothing above 65504 fits into that type, use --dtype bfloat16 or --dtype float32"
    elif model.dtype == torch.bfloat16:
        remedy = "use --dtype float32"
    else:
        remedy = "the weights may be damaged, see whether --method dense on a short --length fails too"
    return NotFiniteError(f"{what} are not finite in {kind}: {remedy}")


def _broken(weight: Tensor) -> bool:
    """Whether a weight is no number whatever type it is loaded in; in float16 a large one is infinite by that alone."""
    bad = weight.isnan() if weight.dtype == torch.float16 else ~weight.isfinite()
    return bool(bad.any())
