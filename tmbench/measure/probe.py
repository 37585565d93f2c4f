"""How much each layer's streaming, middle and last section of attention matters to the first generated token.

For a prompt whose answer is known, z is the logit of the answer's first token at the prompt's last position, under dense
attention. What is recorded of layer l, head h and section A is the mean over the section's pairs of

    |dz/ds_ij|,  dz/ds_ij,  |dz/dp_ij|  and  dz/dp_ij

with the scaled attention logits s and ``p = softmax(s)``, added up in the backward pass of ``tmbench_kernels.DenseProbe``,
whose module has the formulas and what they mean. Rows hold the mean over samples, and for a layer the mean over its heads.
This is the gradient probing of TriangleMix (He et al. 2025, arXiv 2507.21526), which says "gradient" and "averaged"; |dz/ds|
is what a proposal goes by unless another one is asked for.

Memory is linear in the length. Of every layer the forward pass keeps the hidden states that entered it; the backward pass
runs layers once more, one after the other, and attention recomputes its probabilities in blocks of query rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tmbench.engine.attention import applied_plan
from tmbench.engine.calls import keep_last
from tmbench.engine.decoder_layers import decoder_layers
from tmbench.engine.finite import check_logits, not_finite
from tmbench.engine.first_token import synchronize
from tmbench.engine.forwards import replace_forward
from tmbench.engine.memory import PeakMemory
from tmbench.errors import UnsupportedModelError, UserError
from tmbench.measure.attempt import attempt
from tmbench.measure.executor import Worker
from tmbench.measure.keeping import RowTarget
from tmbench.measure.shard import row_target
from tmbench.measure.spec import Item, ItemSpec, Part, RowSpec, Step
from tmbench.methods.layers import Budget, Proposal, Rule, propose
from tmbench.methods.plan import Plan, backends_name
from tmbench.models.attention_modules import attention_modules, logits_feature, parents
from tmbench.models.loading import LoadedModel
from tmbench.results.failures import Failure, release_memory
from tmbench.results.parameters_text import parameters_text
from tmbench.results.rows import ProbeRow, now
from tmbench.results.sample_files import Kept
from tmbench.results.words import counted
from tmbench.suites.prompts import Kind
from tmbench.suites.questions import Question, check_task, longest_prompt, questions, wording_hash
from tmbench_kernels import MEASURES, SECTIONS, DenseProbe, Sections, Triangle

METHOD = "dense"
"""A probe looks at dense attention: its rows are in that method's file."""
Derivative = Literal["logits", "probabilities"]
"""What a proposal goes by: |dz/ds|, before the softmax, or |dz/dp|, after it."""


@dataclass(frozen=True)
class Gradients:
    """What one prompt's backward pass found."""

    means: Tensor
    """float64 ``[layers, heads, len(SECTIONS), len(MEASURES)]`` on the CPU: means over pairs, NaN where there are none.

    Of the layers of full attention, in ascending order.
    """
    probability: float
    """Of the true next token."""
    likeliest: bool
    """Whether it is the likeliest."""


@dataclass(frozen=True)
class Proposing:
    """How layers are proposed."""

    budget: Budget
    rule: Rule = "rank"
    derivative: Derivative = "logits"


@dataclass(frozen=True)
class ProbeSample:
    """One prompt's gradients: a line of the JSONL file."""

    index: int
    prompt_tokens: int
    target: int
    """The id of the true next token."""
    probability: float
    likeliest: bool
    kept_share: float
    source: str
    backends: str
    seconds: float
    peak_memory: int | None
    means: list[list[list[list[float | None]]]]
    """By layer, head, section and measure."""
    prompt_hash: str = ""
    """A hash of the prompt's token ids; "" in files of older versions."""
    layers: list[int] = field(default_factory=list)
    """The numbers of the model's layers that ``means`` are of; none where it is all of them."""


@dataclass(frozen=True, kw_only=True)
class ProbeItem(Item):
    """One prompt, and the token that should follow it."""

    question: Question


@dataclass(frozen=True, kw_only=True)
class ProbeSpec(RowSpec[ProbeRow], ItemSpec[ProbeRow]):
    """What one ``tmbench probe`` measures, and how it proposes layers."""

    lengths: Sequence[int]
    tasks: Sequence[Kind]
    samples: int
    """Of each task."""
    budget: Budget
    window: Triangle = field(default_factory=Triangle)
    """Where the sections are: streaming is what this triangle has of first keys and local window."""
    derivative: Derivative = "logits"
    rule: Rule = "rank"

    @property
    def sections(self) -> Sections:
        return Sections(self.window.n_init, self.window.n_local, self.window.last_n)

    def check(self, loaded: LoadedModel) -> None:
        """Raise UserError before anything is measured where the model cannot be probed, or nothing is in the middle."""
        attention_modules(loaded.model)
        if feature := logits_feature(loaded.model):
            raise UserError(f"tmbench probe does not differentiate {feature}, which {loaded.name} has: use another --model")
        if loaded.model.dtype == torch.float16:
            raise UserError("--dtype float16 cannot hold gradients as small as these: use bfloat16 or float32")
        for length in self.lengths:
            for task in self.tasks:
                check_task(task, length, loaded, self.samples)
            self.check_prompts(loaded, length, [longest_prompt(task, length, loaded) for task in self.tasks])

    def check_prompts(self, loaded: LoadedModel, length: int, tokens: Sequence[int]) -> None:
        """Raise UserError if one of a length's prompts, of so many tokens, has no middle, or the budget cannot be met."""
        if self.sections.pairs(min(tokens))[SECTIONS.index("middle")] == 0:
            raise UserError(
                f"--length {length} leaves no pair between the first {counted(self.window.n_init, 'key')}, the window of "
                f"{self.window.n_local} and the last {counted(self.window.last_n, 'query', 'queries')}, "
                f"as a prompt has {min(tokens)} tokens "
                "of it: give a longer one, or a smaller --n-local"
            )
        # A budget that cannot be met is refused now and not after the measurement.
        propose([1.0] * len(loaded.shape.full), statistics.mean(map(self.kept_share, tokens)), self.budget, self.rule)

    def kept_share(self, length: int) -> float:
        """The share of the causal pairs that is not in the middle section."""
        pairs = self.sections.pairs(length)
        return 1 - pairs[SECTIONS.index("middle")] / sum(pairs)

    def row(self, loaded: LoadedModel, task: str, length: int) -> ProbeRow:
        """A row without figures."""
        return ProbeRow(
            **self.common(loaded),
            method=METHOD,
            parameters=parameters_text(asdict(self.sections)),
            length=length,
            task=task,
            samples=self.samples,
            wording_hash="+".join(filter(None, dict.fromkeys(wording_hash(part) for part in task.split("+")))),
            source="",
            time=now(),
        )

    @property
    def task(self) -> str:
        """The tasks as rows name them."""
        return "+".join(map(str, self.tasks))

    def parts(self, loaded: LoadedModel) -> Iterator[Part[ProbeRow]]:
        """One part, length by length; each makes a row for every head and every layer's mean."""
        total = sum(len(self.places(self.samples, *one)) for one in product(self.lengths, map(str, self.tasks)))
        yield Part(self, "Probe", "Probed", total, self._rounds(loaded))

    def _rounds(self, loaded: LoadedModel) -> Iterator[Step[ProbeRow] | Sequence[RowTarget[ProbeRow, ProbeSample]]]:
        for length in self.lengths:
            asked: list[Question] = []
            failure: Failure | None = None
            for task in self.tasks:
                own = self.places(self.samples, length, str(task))
                yield Step(f"{task} at {length}: preparing {counted(len(own), 'prompt')}")
                made = attempt(partial(self._asked, loaded, task, length, own))
                if isinstance(made, Failure):
                    failure = made
                else:
                    asked += made
            if failure is None and asked:
                self.check_prompts(loaded, length, [len(one.prompt) for one in asked])
            yield [self._target(loaded, length, asked, failure)]

    def _asked(self, loaded: LoadedModel, task: Kind, length: int, numbers: Sequence[int]) -> list[Question]:
        return list(questions(task, length, numbers, loaded, self.seed))

    def _target(
        self, loaded: LoadedModel, length: int, asked: Sequence[Question], failure: Failure | None
    ) -> RowTarget[ProbeRow, ProbeSample]:
        """All rows of a length; its samples lie in a file for each task."""
        names = map(str, self.tasks)
        files = {task: Kept(self.root, self.row(loaded, task, length), task, ProbeSample) for task in names}
        items = [
            ProbeItem(
                title=f"{question.task} at {length}, sample {question.index + 1} of {self.samples}",
                index=question.index,
                file=question.task,
                question=question,
            )
            for question in asked
        ]
        row = replace(self.row(loaded, self.task, length), sample_files="+".join(file.name for file in files.values()))
        return row_target(
            self,
            f"{self.task} at {length}",
            items if failure is None else (),
            files,
            rows=[row],
            make=partial(gradient_rows, self.proposing),
            belongs=_belongs,
            more=lambda item: item.question.told,
            failure=failure,
            latest=rivals,
            wish=asdict(self.proposing),
        )

    @property
    def proposing(self) -> Proposing:
        """How layers are proposed."""
        return Proposing(self.budget, self.rule, self.derivative)

    def measure(self, item: ProbeItem, worker: Worker) -> None:
        """Differentiate one prompt's answer."""
        try:
            worker.keep(_sample(self, worker.loaded, item.question))
        finally:
            release_memory()


def rivals(row: ProbeRow) -> tuple[Any, ...]:
    """What rows have in common of which the newest counts: of a proposal that was asked for again --layers auto takes it."""
    return row.status, row.model, row.model_hash


def _belongs(item: ProbeItem, kept: ProbeSample) -> bool:
    """What was read of another prompt or towards another token says nothing of this sample."""
    return (kept.prompt_hash, kept.target) == (item.question.prompt_hash, item.question.answer[0])


def gradients(model: PreTrainedModel, ids: Tensor, target: int, sections: Sections) -> tuple[Gradients, str]:
    """The gradients of one prompt, and what ran, as "pattern:backend" joined by "+".

    Args:
        model: any model that methods can be applied to; nothing of it is changed, and no parameter gets a gradient.
        ids: ``[1, length]`` on the model's device, at least two tokens.
        target: the id of the true next token.
        sections: where the sections are.

    Raises:
        UnsupportedModelError: as ``tmbench.applied``, and for a layer that attends more than once.
        NotFiniteError: logits or gradients that are not finite.
        RuntimeError: a layer's attention was not differentiated, or no layer has a gradient.
    """
    modules = attention_modules(model)
    found: dict[int, Tensor] = {}

    def record(layer: int, sums: Tensor) -> None:
        if layer in found:
            raise UnsupportedModelError(
                f"layer {layer} of {type(model).__name__} attends more than once, which a probe does not tell apart"
            )
        found[layer] = sums[0].cpu()

    layers = [int(module.layer_idx) for module in modules]
    of_layer = {layer: DenseProbe(sections=sections, record=partial(record, layer)) for layer in layers}
    patterns = tuple(map(of_layer.get, range(model.config.get_text_config().num_hidden_layers)))
    with (
        torch.enable_grad(),
        applied_plan(model, Plan(METHOD, patterns)) as session,
        _differentiable(model, modules),
    ):
        logits = model(input_ids=ids, use_cache=False, return_dict=True, **keep_last(model)).logits[0, -1].float()
        check_logits(logits, model, "of the prompt's last token")
        logits[target].backward()
    session.check_complete()
    if len(found) != len(modules):
        raise RuntimeError(f"only {len(found)} of {counted(len(modules), 'layer')} were differentiated")
    pairs = torch.tensor(sections.pairs(ids.shape[1]), dtype=torch.float64)
    sums = torch.stack([found[layer] for layer in layers])
    # The middle of the last layer has none in any model; keys that all queries see always have some.
    if not sums.any():
        raise RuntimeError(f"no layer of {type(model).__name__} has any gradient in {model.dtype}: none can be proposed")
    for layer, own in zip(layers, sums, strict=True):
        if not own.isfinite().all():
            raise not_finite(f"the gradients of layer {layer}", model)
    logits = logits.detach()
    probability = float(logits.softmax(-1)[target])
    means = sums / torch.where(pairs == 0, torch.nan, pairs)[:, None]
    return Gradients(means, probability, int(logits.argmax()) == target), backends_name(session.backends)


@contextmanager
def _differentiable(model: PreTrainedModel, modules: Sequence[Any]) -> Iterator[None]:
    """Inside, gradients flow from the logits down to the embeddings, through layers that are run again for them."""
    holder = parents(model)
    # Layers that stay the model's own stand in the same list, where they can be told.
    layers = decoder_layers(model, modules)
    own = [holder[module] for module in modules] if layers is None else [layer.module for layer in layers]
    with ExitStack() as stack:
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        hook = model.get_input_embeddings().register_forward_hook(lambda module, given, out: out.requires_grad_())
        stack.callback(hook.remove)
        for layer in dict.fromkeys(own):
            replace_forward(stack, layer, partial(_again, layer.forward))
        yield


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer of which only the inputs are kept for the backward pass, which runs it once more."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _sample(spec: ProbeSpec, loaded: LoadedModel, question: Question) -> ProbeSample:
    ids = torch.tensor([question.prompt], device=loaded.device)
    peak = PeakMemory(ids.device)
    synchronize(ids.device)
    start = time.perf_counter()
    found, backends = gradients(loaded.model, ids, question.answer[0], spec.sections)
    seconds = time.perf_counter() - start
    means: list[Any] = found.means.tolist()
    return ProbeSample(
        index=question.index,
        prompt_tokens=ids.shape[1],
        target=question.answer[0],
        probability=found.probability,
        likeliest=found.likeliest,
        kept_share=spec.kept_share(ids.shape[1]),
        source=question.source,
        backends=backends,
        seconds=seconds,
        peak_memory=peak.bytes,
        # Six digits are more than bfloat16 has, and a third of the file.
        means=[[[[_short(x) for x in section] for section in head] for head in layer] for layer in means],
        prompt_hash=question.prompt_hash,
        layers=list(loaded.shape.full) if loaded.shape.native else [],
    )


def _short(value: float) -> float | None:
    """Six significant digits; None for a section without pairs."""
    return None if value != value else float(f"{value:.6g}")


def gradient_rows(proposing: Proposing, known: Sequence[ProbeRow], samples: Sequence[ProbeSample]) -> list[ProbeRow]:
    """Each layer's mean and its heads, over all samples, with the proposal in the layers' rows."""
    (row,) = known
    means = torch.tensor([[[[[torch.nan if x is None else x for x in section] for section in head] for head in layer]
                           for layer in sample.means] for sample in samples], dtype=torch.float64).mean(0)  # fmt: skip
    by_layer = means.mean(1)
    kept = statistics.mean(sample.kept_share for sample in samples)
    proposal = proposed(by_layer, kept, proposing)
    numbers = samples[0].layers or range(len(means))
    peaks = [sample.peak_memory for sample in samples if sample.peak_memory is not None]
    common = replace(
        row,
        source="+".join(dict.fromkeys(sample.source for sample in samples)),
        kept_share=kept,
        prompt_tokens_mean=statistics.mean(sample.prompt_tokens for sample in samples),
        probability_mean=statistics.mean(sample.probability for sample in samples),
        answered=statistics.mean(sample.likeliest for sample in samples),
        seconds_per_sample=statistics.mean(sample.seconds for sample in samples),
        peak_memory_bytes=max(peaks, default=None),
    )
    rows = []
    for place, layer in enumerate(numbers):
        said: dict[str, Any] = {
            "triangle": place in proposal.layers,
            "proposal": f"{proposing.rule}, {proposing.budget}, {proposing.derivative}",
            "lost_share": proposal.lost,
            "pairs_share": proposal.pairs,
        }
        rows.append(replace(common, layer=layer, **_figures(by_layer[place]), **said))
        rows += [replace(common, layer=layer, head=head, **_figures(own)) for head, own in enumerate(means[place])]
    return rows


def proposed(by_layer: Tensor, kept: float, proposing: Proposing) -> Proposal:
    """The proposal for layers' means ``[layers, sections, measures]``, by their places there.

    Raises ValueError where they are not finite.
    """
    middle = by_layer[:, SECTIONS.index("middle"), MEASURES.index(proposing.derivative)]
    return propose([float(value) for value in middle], kept, proposing.budget, proposing.rule)


def _figures(means: Tensor) -> dict[str, Any]:
    """The columns of one head or layer, from ``[sections, measures]``."""
    return {
        f"{section}_{measure}": None if value != value else value
        for section, values in zip(SECTIONS, means.tolist(), strict=True)
        for measure, value in zip(MEASURES, values, strict=True)
    }
