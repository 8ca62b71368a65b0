"""From a prompt to text: the sampler that suits what the model was trained on, around a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stackwise_jax.config.schema import ObjectiveKind
from stackwise_jax.curriculum.phase import AttentionMode
from stackwise_jax.data import Tokenizer
from stackwise_jax.engine import LoadedRun, vocab_of
from stackwise_jax.errors import UsageError
from stackwise_jax.model import Rack
from stackwise_jax.random_streams import Stream, root_key, stream_key
from stackwise_jax.sampling.causal import generate_causal
from stackwise_jax.sampling.depth import generate_depth, levels_fall
from stackwise_jax.sampling.independent import Expert, generate_independent, intervals_fall
from stackwise_jax.sampling.settle import Order
from stackwise_jax.sampling.unmask import generate_unmask


@dataclass(frozen=True)
class Sample:
    """A text and what it took. text: prompt and continuation; n_prompt, n_new: tokens (BOS counts as prompt)."""

    text: str
    n_prompt: int
    n_new: int


def sample(
    rack: Rack,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    prompt: str,
    *,
    objective_kind: ObjectiveKind,
    attention_mode: AttentionMode | None = None,
    levels: Sequence[float] | None = None,
    experts: Sequence[Expert] = (),
    max_tokens: int = 128,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    steps: int | None = None,
    order: Order | None = None,
    block_size: int | None = None,
) -> Sample:
    """Continue a text in the way that the model was trained for.

    clm: left to right (`generate_causal`). mlm and diffusion fill max_tokens masks behind the prompt: with `experts`
    one rack after the other (`generate_independent`), with `levels` in one pass through the depth (`generate_depth`),
    else in several passes (`generate_unmask`).

    BOS is put before the prompt, so an empty one is fine. The text ends at EOS, where the model says that the document
    ends. Invalid UTF-8 in what a byte model says is replaced.

    Args:
        rack, params: the model, as for `rack.apply`; of experts the last, which is not used alone.
        tokenizer: of the run.
        prompt: text to start from.
        objective_kind: what the model was trained on.
        attention_mode: as it was trained (mlm and diffusion); None: each block's own.
        levels: of a rack trained right to left, the share hidden at each stack.
        experts: racks trained apart on intervals of noise, highest first.
        max_tokens: new tokens at most.
        seed: the same seed gives the same text; taken modulo 2**32.
        temperature, top_k, top_p: see `Filters`.
        steps: forward passes, for `generate_unmask` and `generate_independent`.
        order: which tokens are settled first, for all that fill masks; None: confidence.
        block_size: see `generate_unmask`.

    Raises:
        UsageError: an argument out of its range, or one that the model's way of sampling does not have.
    """
    prompt_ids = np.array([tokenizer.bos_id, *tokenizer.encode(prompt)], np.int32)
    how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    how |= {"vocab": vocab_of(tokenizer), "key": stream_key(root_key(seed % 2**32), Stream.SAMPLING)}
    if objective_kind == "clm":
        given = {"steps": steps, "block_size": block_size, "order": order}
        _refuse(given, "the model was trained left to right (clm) and has no masks to fill")
        stop_ids = (tokenizer.eos_id,)
        ids = generate_causal(rack, params, prompt_ids, max_tokens=max_tokens, stop_ids=stop_ids, **how)
    else:
        how |= {"length": max_tokens, "order": order or "confidence", "attention_mode": attention_mode}
        how |= {"levels": levels, "experts": experts, "steps": steps, "block_size": block_size}
        ids = _through_first(tokenizer.eos_id, _fill_masks(rack, params, prompt_ids, **how), len(prompt_ids))
    return Sample(tokenizer.decode(ids), n_prompt=len(prompt_ids), n_new=len(ids) - len(prompt_ids))


def _through_first(end_id: int, ids: np.ndarray, n_prompt: int) -> np.ndarray:
    """The ids up to the first `end_id` behind the prompt, all where there is none."""
    ends = n_prompt + np.flatnonzero(ids[n_prompt:] == end_id)
    return ids[: ends[0] + 1] if len(ends) else ids


def _fill_masks(
    rack: Rack,
    params: Mapping[str, Any],
    prompt_ids: np.ndarray,
    *,
    levels: Sequence[float] | None,
    experts: Sequence[Expert],
    steps: int | None,
    block_size: int | None,
    **how: Any,
) -> np.ndarray:
    """The ids (P + max_tokens,) of the prompt and what is filled in behind it, in the way that fits the model."""
    if experts:
        _refuse({"block_size": block_size}, "racks that were trained apart take turns by the share that is hidden")
        return generate_independent(experts, prompt_ids, steps=steps, **how)
    if levels is not None:
        passes = {"steps": steps, "block_size": block_size}
        _refuse(passes, "the model's depth is its time (objective.time depth), so it fills all masks in one pass")
        return generate_depth(rack, params, prompt_ids, levels=levels, **how)
    return generate_unmask(rack, params, prompt_ids, steps=steps, block_size=block_size, **how)


def _refuse(options: Mapping[str, Any], why: str) -> None:
    names = [f"--{name}" for name, value in options.items() if value is not None]
    if names:
        raise UsageError(f"{why}; leave out {' and '.join(names)}")


def sample_text(rack: Rack, params: Mapping[str, Any], tokenizer: Tokenizer, prompt: str, **how: Any) -> str:
    """The text of `sample`, which takes the same arguments."""
    return sample(rack, params, tokenizer, prompt, **how).text


def model_of(runs: Sequence[LoadedRun]) -> dict[str, Any]:
    """What `sample` has to know of the model of a run, as its arguments: all but the prompt and how to sample.

    Args:
        runs: one model, or several that were trained apart, in the order of their phases. Those whose noise falls from
            one to the next sample together; of any others the last one samples alone. Levels that rise somewhere are
            left out: there is no single pass for them.
    """
    last = runs[-1]
    noises = [run.phase.noise for run in runs]
    together = len(runs) > 1 and intervals_fall([(noise.low, noise.high) for noise in noises])
    experts = [Expert(n.low, n.high, run.rack, run.params) for n, run in zip(noises, runs, strict=True)]
    return {
        "rack": last.rack,
        "params": last.params,
        "tokenizer": last.tokenizer,
        "objective_kind": last.objective_kind,
        "attention_mode": last.attention_mode,
        "levels": last.levels if last.levels and levels_fall(last.levels) else None,
        "experts": tuple(experts) if together else (),
    }
