"""A model split over ranks: tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053, section 3) by transformers' own plan.

The plan of a family names the linear layers that are split by output features ("colwise") and by input features ("rowwise").
Here they become linear layers of a rank's part, of which the second kind sums over the ranks: no hooks, so that prefills
without needless work and compiled layers take them as any other. Embeddings, norms and the head are whole on every rank.

Nothing is ever whole but one module at a time: a drawn weight is drawn as on one GPU and cut, one of a checkpoint is read in
part.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization

from tmbench.errors import UnsupportedModelError, UserError
from tmbench.methods.layer_kinds import layer_kinds
from tmbench.models import fingerprint, parallel
from tmbench.models.attention_modules import kept_whole, self_attentions
from tmbench.models.checkpoint import tensor_shapes
from tmbench.models.geometry import Geometry

COLUMNS, ROWS = "colwise", "rowwise"
Plan = Mapping[nn.Module, tuple[str, str]]
"""Of each linear layer that is split its full name and its style."""
WHOLE = ("replicated_with_grad_allreduce", "replicate")
"""Styles of what every rank has whole."""


class Shard(nn.Linear):
    """A rank's part of a linear layer, ``style`` saying by which features it is split. Made for inference alone."""

    def __init__(self, whole: nn.Linear, style: str, ranks: int) -> None:
        nn.Module.__init__(self)
        self.style = style
        self.ranks = ranks
        columns = style == COLUMNS
        self.in_features = whole.in_features if columns else whole.in_features // ranks
        self.out_features = whole.out_features // ranks if columns else whole.out_features
        self.weight = nn.Parameter(self.part(whole.weight), requires_grad=False)
        self.bias = None if whole.bias is None else nn.Parameter(self.part(whole.bias), requires_grad=False)

    def part(self, whole: Any) -> Tensor:
        """This rank's part of a weight or a bias, a tensor or a slice of a file, in memory of its own."""
        shape = whole.shape if isinstance(whole, Tensor) else whole.get_shape()
        if len(shape) == 1 and self.style == ROWS:
            part = whole[:]
        else:
            axis = 0 if self.style == COLUMNS else 1
            each = shape[axis] // self.ranks
            own = slice(parallel.rank() * each, (parallel.rank() + 1) * each)
            part = whole[own] if axis == 0 else whole[:, own]
        own_memory: Tensor = part.detach().clone(memory_format=torch.contiguous_format)
        return own_memory

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise UnsupportedModelError("a model that is split over GPUs is for inference alone: leave torchrun out")
        if self.style == COLUMNS:
            return F.linear(input, self.weight, self.bias)
        out = F.linear(input, self.weight)
        if torch.compiler.is_compiling():
            from torch.distributed._functional_collectives import all_reduce

            out = all_reduce(out, "sum", list(range(self.ranks)))
        else:
            dist.all_reduce(out)
        return out if self.bias is None else out + self.bias


def plan_of(name: str, model: Any, ranks: int) -> Plan:
    """How each linear layer is split; raises UserError for a model that cannot be."""
    # Some families have other heads in each kind of layer.
    for shape in (Geometry.of(model), *(Geometry.of(model, layer) for layer in range(len(layer_kinds(model.config))))):
        if shape.kv_heads % ranks or shape.heads % ranks:
            raise UserError(
                f"--model {name} has {shape.heads} query heads and {shape.kv_heads} key heads, which {ranks} GPUs cannot "
                "share evenly: give --nproc-per-node a number that divides both"
            )
    found = _styles(model)
    for obstacle in _obstacles(model, found, ranks):
        raise UserError(f"--model {name} {obstacle}: leave torchrun out")
    return {module: (key, style) for key, (module, style) in found.items()}


def _styles(model: Any) -> dict[str, tuple[Any, str]]:
    """What a family's plan splits, and by which style, by its full name."""
    plan, head = dict(model.tp_plan or {}), model.get_output_embeddings()
    found = {}
    for key, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", key), WHOLE[0])
        if style not in WHOLE and module is not head and not isinstance(module, nn.Embedding):
            found[key] = module, style
    return found


def _obstacles(model: Any, found: Mapping[str, tuple[Any, str]], ranks: int) -> Iterator[str]:
    """Why a model cannot be split so, in words that follow its name; none counts behind another."""
    if feature := kept_whole(model):
        yield f"has {feature}, which several GPUs do not share"
    family = f"is of the family {model.config.model_type}"
    for key, (module, style) in found.items():
        if style not in (COLUMNS, ROWS) or not isinstance(module, nn.Linear):
            yield f"{family}, whose {key} is split as {style}, which is not served"
    names = {module: key for key, module in model.named_modules()}
    for attention in self_attentions(model):
        own = [style for key, (_, style) in found.items() if key.startswith(f"{names[attention]}.")]
        if sorted(own) != [COLUMNS] * 3 + [ROWS]:
            yield f"{family}, for whose attention transformers has no such plan"
    for key, (module, style) in found.items():
        features = module.out_features if style == COLUMNS else module.in_features
        if features % ranks:
            yield f"has {features} features in {key}, which {ranks} GPUs cannot share evenly"
    cut = {module for module, _ in found.values()}
    for holder in dict.fromkeys(key.rpartition(".")[0] for key in found):
        if across := _across_features(model.get_submodule(holder), cut):
            yield f"has {holder}.{across}, which takes together what no GPU would have whole"


def _across_features(holder: nn.Module, cut: Container[nn.Module]) -> str:
    """What in a module, between the linear layers that are cut, needs more than a rank's features; "" for nothing.

    A norm of single heads does not, and neither does one number.
    """
    if getattr(holder, "activation_sparsity", 0):
        # Gemma 3n keeps the largest activations, by their mean and deviation.
        return "activation_sparsity"
    each = getattr(holder, "head_dim", None)
    for name, module in holder.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if module not in cut and parameter.numel() > 1 and tuple(parameter.shape) != (each,):
                return ".".join(filter(None, (name, own)))
    return ""


def split(model: Any, plan: Plan, part: nn.Module) -> None:
    """Cut what is planned of a part of the model, a module with all inside of it."""
    for module in list(part.modules()):
        if module in plan:
            key, style = plan[module]
            parent, _, name = key.rpartition(".")
            assert isinstance(module, nn.Linear)
            setattr(model.get_submodule(parent), name, Shard(module, style, parallel.size()))
            # The plan holds the module, which must not hold the whole.
            module._parameters.clear()


def make_real(model: Any, part: nn.Module, device: torch.device) -> None:
    """Give what has no data yet in a module, and in those inside of it, data as transformers draws it."""
    drawing = _drawing(model)
    for module in _children_first(part):
        if _make_room(module, device):
            drawing[module]._init_weights(module)


def draw(model: Any, plan: Plan, device: torch.device, seed: int) -> None:
    """Fill a model of the meta device, a module at a time, with the weights that one GPU would have of that seed.

    Of a model that reads images too they are others, drawn alike.
    """
    torch.manual_seed(seed)
    drawing = _drawing(model)
    left = set(drawing)
    for stage in [module for module in _children_first(model) if isinstance(module, PreTrainedModel)]:
        # Those without data of their own, too: some draw what modules inside of them have.
        todo = [one for one in _children_first(stage) if one in left]
        for module in stage.modules():
            if module in left:
                _drawn_when_made(module, device)
        left -= set(todo)
        for module in todo:
            _make_room(module, device)
            drawing[module]._init_weights(module)
            split(model, plan, module)
    model.tie_weights()


def read(name: str, model: Any, plan: Plan, folder: Path | None, device: torch.device) -> None:
    """Fill a model of the meta device from a checkpoint's safetensors, of which a rank reads its own parts alone.

    Raises UserError for weights that cannot be read so.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(f"--model {name} is quantized, and its weights cannot be split over ranks: leave torchrun out")
    files = [] if folder is None else [file for file in fingerprint.weight_files(folder) if file.endswith(".safetensors")]
    if folder is None or not files:
        raise UserError(
            f"--model {name} has no safetensors on this machine, which is what several GPUs read in parts: "
            f"download them (hf download {name}), or leave torchrun out"
        )
    with torch.no_grad():
        split(model, plan, model)
        places = {key: folder / file for file in files for key in tensor_shapes(folder / file) or ()}
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        _read_weights(name, model, places, tied, device)
        # What is in no file is computed, in modules that may have weights too: those are not drawn over what was read.
        drawing = _drawing(model)
        with initialization.guard_torch_init_functions():
            for module in list(_children_first(model)):
                if _make_room(module, device, weights=False):
                    drawing[module]._init_weights(module)
        model.tie_weights()


def _read_weights(name: str, model: Any, places: Mapping[str, Path], tied: set[str], device: torch.device) -> None:
    from safetensors import safe_open

    opened: dict[Path, Any] = {}
    for owner_name, owner in list(model.named_modules()):
        for own, tensor in list(_saved(owner)):
            key = f"{owner_name}.{own}"
            there = next((one for one in (key, key.removeprefix(f"{model.base_model_prefix}.")) if one in places), None)
            if there is None:
                if key in tied or own in owner._buffers:
                    continue
                raise UserError(
                    f"--model {name} names its weights otherwise than its family does ({key} is not there), so that they "
                    "cannot be read in parts: leave torchrun out"
                )
            path = places[there]
            if path not in opened:
                opened[path] = safe_open(path, framework="pt")
            whole = opened[path].get_slice(there)
            part = (owner.part(whole) if isinstance(owner, Shard) else whole[...]).to(device, tensor.dtype)
            read: Any = part if own in owner._buffers else nn.Parameter(part, requires_grad=False)
            # By which transformers, too, knows what it must not draw.
            read._is_hf_initialized = True
            setattr(owner, own, read)


def _saved(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own tensors that a checkpoint holds: its parameters, and those of its buffers that are no mere tables."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    """The order in which transformers draws a model's weights."""
    for child in list(module.children()):
        yield from _children_first(child)
    yield module


def _drawing(model: nn.Module) -> dict[nn.Module, Any]:
    """For each module the innermost of transformers' models around it, which knows how its weights are drawn."""
    outer_first = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return {module: owner for owner in outer_first for module in owner.modules()}


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _drawn_when_made(module: nn.Module, device: torch.device) -> None:
    """Draw what torch does for such a layer when it is made, before transformers draws it: what follows depends on it."""
    if isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)):
        copy.deepcopy(module).to_empty(device=device).reset_parameters()


def _make_room(module: nn.Module, device: torch.device, *, weights: bool = True) -> bool:
    """Move a module's own tensors from the meta device, empty; whether there were any."""
    found = False
    fresh: Callable[[Tensor], Tensor] = lambda tensor: torch.empty_like(tensor, device=device)  # noqa: E731
    for name, parameter in list(module.named_parameters(recurse=False)) if weights else ():
        if parameter.is_meta:
            module.register_parameter(name, nn.Parameter(fresh(parameter), requires_grad=False))
            found = True
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_meta:
            module._buffers[name] = fresh(buffer)
            found = True
    return found
