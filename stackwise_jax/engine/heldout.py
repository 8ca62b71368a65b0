"""Loss on held-out text, at any depth of a rack. Used after each phase and by the evaluate command.

Legend: B batch, T sequence, D d_model, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from stackwise_jax.data import Dataset
from stackwise_jax.engine.programs import bare, embed_examples, loss_sums, run_stack
from stackwise_jax.engine.step import TaskSpec
from stackwise_jax.model import Stack
from stackwise_jax.objectives import Examples
from stackwise_jax.random_streams import root_key

Tree = Any
GROUP = 8  # batches that pass the stacks together
HELD_OUT_SEED = 20_240  # corruption of held-out text is the same in every run


def held_out_batches(dataset: Dataset, batch_size: int, pad_id: int, limit: int = 0) -> Iterator[Examples]:
    """The examples in order, host arrays; the last batch is filled up with padding rows, which carry no weight.

    Args:
        limit: at most so many batches; 0: all.
    """
    n_batches = -(-len(dataset) // batch_size)
    for i in range(min(n_batches, limit) if limit else n_batches):
        rows = slice(i * batch_size, min((i + 1) * batch_size, len(dataset)))
        missing = batch_size - (rows.stop - rows.start)

        def fill(rows_NT: np.ndarray, value: int, missing=missing) -> np.ndarray:
            return np.pad(rows_NT, ((0, missing), (0, 0)), constant_values=value)

        yield Examples(
            fill(dataset.tokens_NT[rows], pad_id),
            fill(dataset.segment_ids_NT[rows], 0),
            fill(dataset.positions_NT[rows], 0),
            np.arange(i * batch_size, (i + 1) * batch_size, dtype=np.int32),
        )


def held_out(
    task: TaskSpec,
    stacks: Sequence[tuple[Stack, Tree]],
    embed: Tree,
    head: Tree,
    batches: Iterator[Examples],
    token_bytes_V: jax.Array,
) -> dict[str, float]:
    """Mean loss over held-out batches, without dropout: the `quotients` of `held_out_sums`."""
    return quotients(held_out_sums(task, stacks, embed, head, batches, token_bytes_V))


def held_out_sums(
    task: TaskSpec,
    stacks: Sequence[tuple[Stack, Tree]],
    embed: Tree,
    head: Tree,
    batches: Iterator[Examples],
    token_bytes_V: jax.Array,
    *,
    draw: int = 0,
) -> list[dict[str, float]]:
    """The sums of `batch_sums` for each of the batches, without dropout.

    Args:
        stacks: (stack, params) from input to head; params on the device or in host memory.
        draw: which of the reproducible corruptions of the text is used (mlm, diffusion).
    """
    placement = task.placement
    key = placement.put(root_key(HELD_OUT_SEED), placement.replicated)
    visit = placement.put(np.int32(draw), placement.replicated)
    sums: list[dict[str, jax.Array]] = []
    batches = iter(batches)
    # A few batches at a time pass stack by stack: a stack that rests in host memory is copied once for all of them.
    while group := [placement.put(examples, placement.batch) for examples in itertools.islice(batches, GROUP)]:
        hidden = [embed_examples(task, embed, examples, key, visit) for examples in group]
        for stack, resting in stacks:
            params = placement.put(resting, placement.params(resting))
            hidden = [run_stack(task, bare(stack), params, x_BTD, ex) for x_BTD, ex in zip(hidden, group, strict=True)]
            jax.block_until_ready(hidden)  # so that at most one stack's copy is there
        for x_BTD, examples in zip(hidden, group, strict=True):
            sums.append(jax.device_get(loss_sums(task, head, embed, x_BTD, examples, key, visit, token_bytes_V)))
    return [{name: float(value) for name, value in of_batch.items()} for of_batch in sums]


def quotients(sums: Sequence[dict[str, float]]) -> dict[str, float]:
    """loss (nats per token), perplexity, bits_per_byte, accuracy and tokens from the sums of some batches."""
    totals = {name: sum((of_batch[name] for of_batch in sums), 0.0) for name in sums[0]}
    loss = totals["nll"] / max(totals["tokens"], 1.0)
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": totals["nll"] / math.log(2) / max(totals["bytes"], 1.0),
        "accuracy": totals["correct"] / max(totals["predicted"], 1.0),
        "tokens": totals["tokens"],
    }
