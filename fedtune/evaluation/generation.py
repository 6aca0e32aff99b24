"""Answers to a set of prompts, in padded batches, equal to one prompt at a time.

The decoding loop is our own rather than `transformers.generate`: greedy search and sampling are a few lines,
a hub model's `generation_config` (sampling, penalties, forced tokens) must not leak into a comparison, and a
soft prompt has to stand between the padding and the text, which PEFT's own `generate` does not do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import Module

from fedtune.data.control import text_of
from fedtune.errors import InputError
from fedtune.evaluation.batches import answering_room, cut
from fedtune.evaluation.peaks import Peaks
from fedtune.models.context import context_length, has_prefix, virtual_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Follow = Callable[[int, list[int]], None]


@dataclass(frozen=True)
class Sampling:
    """Draws in place of the likeliest token.

    Attributes:
        temperature: Above 0; logits are divided by it.
        top_p: Tokens are drawn from the least set of likeliest ones with this probability in sum.
        seeds: One a prompt: its draws are its own, in whatever batch it is.
    """

    temperature: float
    top_p: float
    seeds: Sequence[int]


def generate(
    model: Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    memory: int | None = None,
    peaks: Peaks | None = None,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    end: int | None = None,
) -> list[str]:
    """Answers each prompt.

    Args:
        model: A causal language model of transformers, PEFT-wrapped or not (LoRA, prompt tuning, p-tuning).
        tokenizer: Gives the end-of-sequence token and turns the answers into text.
        prompts: Token ids, begin token included. What is longer than the model's context less
            `max_new_tokens` loses its start.
        max_new_tokens: The most tokens of an answer, the end-of-sequence token included.
        batch_size: Prompts decoded together, at most.
        memory: Bytes that they may take beside the weights, about; None: enough.
        peaks: Told what they take.
        stop: Texts; an answer ends before the first of them.
        sampling: None: greedy.
        end: A token that ends an answer beside those of the tokenizer and the model.

    Returns:
        The answers in the order of the prompts, without prompt and special tokens.

    Raises:
        InputError: A prompt has no tokens, or `max_new_tokens` leaves no room in the model's context.
    """
    answers = generate_ids(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        memory=memory,
        peaks=peaks,
        stop=stop,
        sampling=sampling,
        end=end,
    )
    return [answer_text(tokenizer, ids, stop) for ids in answers]


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: Sequence[str] = ()) -> str:
    """An answer's ids as text, up to the first of the stopping texts."""
    text = text_of(ids, tokenizer)
    return text[: min((place for s in stop if (place := text.find(s)) >= 0), default=len(text))]


def generate_ids(
    model: Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    memory: int | None = None,
    peaks: Peaks | None = None,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    end: int | None = None,
    follow: Follow | None = None,
) -> list[list[int]]:
    """As `generate`, but gives token ids, up to the end-of-sequence token and without it.

    The ids of a stopping text, where one was met, are still there. `follow` is called after each token of an
    answer, with the prompt's place and the answer's ids so far; what it raises ends the search.
    """
    room = prompt_room(model, max_new_tokens)
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {place} has no tokens: give its example an instruction.")
    ends = end_tokens(model, tokenizer) | ({end} if end is not None else set())
    pad = next((i for i in (tokenizer.pad_token_id, *ends) if isinstance(i, int)), 0)  # any id: it is masked
    stopped = _Stop(tokenizer, stop)
    answers: list[list[int]] = [[] for _ in prompts]
    texts = [list(prompt)[-room if room is not None else None :] for prompt in prompts]
    fits = None
    if memory is not None:
        whole = "logits_to_keep" not in inspect.signature(_inner(model).forward).parameters
        fits = answering_room(model, memory, max_new_tokens, whole=whole, drawn=sampling is not None)
    # not inference mode: buffers that a model updates while it runs (rope) must stay usable in training
    with evaluating(model), torch.no_grad():
        for places in cut([len(text) for text in texts], batch_size, fits):
            batch = [texts[place] for place in places]
            choose = _Choice(sampling, places, max_new_tokens)
            longest = len(batch[0]) + max_new_tokens
            with peaks.batch("answers", len(batch), longest, model) if peaks else nullcontext():
                decoded = _decode(model, batch, pad, ends, max_new_tokens, choose, stopped, places, follow)
            for place, ids in zip(places, decoded, strict=True):
                answers[place] = ids
    return answers


def _decode(
    model: Module,
    prompts: list[list[int]],
    pad: int,
    ends: frozenset[int],
    max_new_tokens: int,
    choose: _Choice,
    stopped: _Stop,
    places: Sequence[int],
    follow: Follow | None,
) -> list[list[int]]:
    inner = _inner(model)
    device = next(inner.parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)  # (batch, width)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    inputs: dict[str, Tensor] = {"input_ids": ids}
    prefix = has_prefix(model)
    if virtual_tokens(model) and not prefix:
        inputs, mask = _with_soft_prompt(model, inner, prompts, ids, mask)
    takes = inspect.signature(inner.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    cache_name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # whose answer each row of the batch is; shrinks as answers end
    cache: Any = None
    if prefix:
        cache = cast(Any, model).get_prompt(len(prompts))
        mask = torch.cat([mask.new_ones(len(prompts), virtual_tokens(model)), mask], dim=1)
    for step in range(max_new_tokens):
        new = next(iter(inputs.values())).shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]  # padding takes no positions
        out = inner(
            **inputs,
            attention_mask=mask,
            **{cache_name: cache},
            use_cache=True,
            **({"position_ids": positions} if "position_ids" in takes else {}),
            **last_only,
        )
        token = choose(out.logits[:, -1], rows, step)  # (batch,)
        going = []
        for place, (row, one) in enumerate(zip(rows, token.tolist(), strict=True)):
            if row < 0 or one in ends:
                continue
            answers[row].append(one)
            if follow is not None:
                follow(places[row], answers[row])
            if not stopped(answers[row]):
                going.append(place)
        if not going:
            break
        cache = getattr(out, cache_name)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if len(going) <= len(rows) // 2 and hasattr(cache, "batch_select_indices"):
            keep = torch.tensor(going, device=device)  # half have ended: go on with the others alone
            cache.batch_select_indices(keep)
            token, mask, rows = token[keep], mask[keep], [rows[place] for place in going]
        else:
            rows = [row if place in set(going) else -1 for place, row in enumerate(rows)]
        inputs = {"input_ids": token[:, None]}
    return answers


class _Choice:
    """The next token of each row: the likeliest, or a draw from the row's own stream."""

    def __init__(self, sampling: Sampling | None, places: list[int], tokens: int) -> None:
        self._sampling = sampling
        if sampling is not None:
            generators = [torch.Generator().manual_seed(sampling.seeds[place]) for place in places]
            self._uniform = torch.stack(
                [torch.rand(tokens, generator=g, dtype=torch.float64) for g in generators]
            )

    def __call__(self, logits: Tensor, rows: list[int], step: int) -> Tensor:
        """`logits` (batch, vocabulary) of the rows to tokens (batch,)."""
        if self._sampling is None:
            return logits.argmax(-1)
        # on the CPU in float64, so that only the model's own rounding differs between batch sizes
        probabilities = (logits.double().cpu() / self._sampling.temperature).softmax(-1)
        if self._sampling.top_p < 1:
            ranked, order = probabilities.sort(-1, descending=True)
            beyond = ranked.cumsum(-1) - ranked >= self._sampling.top_p  # what comes before is enough
            probabilities = probabilities.masked_fill(
                torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0
            )
        reach = probabilities.cumsum(-1)
        target = self._uniform[rows, step][:, None] * reach[:, -1:]  # a row that has ended is -1: any will do
        drawn = torch.searchsorted(reach, target, right=True)[:, 0]
        return drawn.clamp(max=logits.shape[-1] - 1).to(logits.device)


class _Stop:
    """Whether an answer has come to one of the stopping texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        self._tail = max((len(text.encode()) for text in texts), default=0) + 4  # a token has a byte or more

    def __call__(self, ids: list[int]) -> bool:
        # the end first, since reading the whole answer after each token would be quadratic
        return bool(self._texts) and self._in(ids[-self._tail :]) and self._in(ids)

    def _in(self, ids: list[int]) -> bool:
        text = text_of(ids, self._tokenizer)
        return any(stop in text for stop in self._texts)


def _with_soft_prompt(
    model: Any, inner: Any, prompts: list[list[int]], ids: Tensor, mask: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Embeds the batch as padding, soft prompt, text: so each row is what it would be alone, shifted."""
    if model.active_peft_config.peft_type not in ("PROMPT_TUNING", "P_TUNING"):
        raise InputError(f"cannot generate with {model.active_peft_config.peft_type}; merge it, or use LoRA.")
    embedded = inner.get_input_embeddings()(ids)  # (batch, width, dim)
    soft = model.get_prompt(len(prompts)).to(embedded.dtype)  # (batch, virtual, dim)
    ones = mask.new_ones(soft.shape[1])
    rows, masks = [], []
    for row, (prompt, virtual) in enumerate(zip(prompts, soft, strict=True)):
        gap = ids.shape[1] - len(prompt)
        rows.append(torch.cat([embedded[row, :gap], virtual, embedded[row, gap:]]))
        masks.append(torch.cat([mask[row, :gap], ones, mask[row, gap:]]))
    return {"inputs_embeds": torch.stack(rows)}, torch.stack(masks)


def end_tokens(model: Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokenizer's and the model's: chat models end their turn with a token of their own."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [tokenizer.eos_token_id, *listed] if isinstance(token, int))


def prompt_room(model: Module, max_new_tokens: int, *, reserved: int = 0) -> int | None:
    """Tokens of a prompt that fit before an answer; None where there is no limit.

    Args:
        model: Who answers.
        max_new_tokens: The most tokens of an answer.
        reserved: As of `context_length`.

    Raises:
        InputError: There is no room for a prompt.
    """
    context = context_length(model, reserved=reserved)
    if context is not None and context - max_new_tokens < 2:  # a begin token and one of text
        raise InputError(
            f"evaluation.max_new_tokens must be at most {context - 2}, since the model sees {context} tokens "
            f"of text, got {max_new_tokens}."
        )
    return None if context is None else context - max_new_tokens


def _inner(model: Any) -> Any:
    """The model of transformers inside a PEFT wrapper. LoRA works in there, a soft prompt does not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module is in the mode it was in, also where they were mixed."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
