"""From a prompt to text: the sampler that suits what the model was trained on, around a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from stackwise_jax.config.schema import ObjectiveKind
from stackwise_jax.curriculum.phase import AttentionMode
from stackwise_jax.data import Tokenizer
from stackwise_jax.engine import vocab_of
from stackwise_jax.model import Rack
from stackwise_jax.sampling.causal import generate_causal
from stackwise_jax.sampling.unmask import Order, generate_unmask


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
    max_tokens: int = 128,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    steps: int | None = None,
    order: Order = "confidence",
) -> Sample:
    """Continue a text: left to right for clm, by unmasking a block of max_tokens behind it for mlm and diffusion.

    BOS is put before the prompt, so an empty one is fine. A causal text may end early, at EOS or at the BOS of a next
    document. Invalid UTF-8 in what a byte model says is replaced.

    Args:
        rack, params: the model, as for `rack.apply`.
        tokenizer: of the run.
        prompt: text to start from.
        objective_kind: what the model was trained on.
        attention_mode: as it was trained (mlm and diffusion); None: each block's own.
        max_tokens: new tokens (clm: at most).
        seed: the same seed gives the same text; taken modulo 2**32.
        temperature, top_k, top_p: see `Filters`.
        steps, order: see `generate_unmask`; without effect for clm.

    Raises:
        UsageError: an argument out of its range.
    """
    prompt_ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)]).astype(np.int32)
    how = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "vocab": vocab_of(tokenizer),
        "key": jax.random.key(seed % 2**32),
    }
    if objective_kind == "clm":
        stop_ids = (tokenizer.eos_id, tokenizer.bos_id)
        ids = generate_causal(rack, params, prompt_ids, max_tokens=max_tokens, stop_ids=stop_ids, **how)
    else:
        filling = {"length": max_tokens, "steps": steps, "order": order, "attention_mode": attention_mode}
        ids = generate_unmask(rack, params, prompt_ids, **filling, **how)
    return Sample(tokenizer.decode(ids), n_prompt=len(prompt_ids), n_new=len(ids) - len(prompt_ids))


def sample_text(rack: Rack, params: Mapping[str, Any], tokenizer: Tokenizer, prompt: str, **how: Any) -> str:
    """The text of `sample`, which takes the same arguments."""
    return sample(rack, params, tokenizer, prompt, **how).text
