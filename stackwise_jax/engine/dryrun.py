"""The arguments of the step of a phase as shapes, and what of a cache goes on from phase to phase."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.curriculum import Phase
from stackwise_jax.data import Loader
from stackwise_jax.engine.optimizer import make_optimizer
from stackwise_jax.engine.resident import split_phase
from stackwise_jax.engine.setup import Setup
from stackwise_jax.engine.step import StepData, StepSpec, TrainState
from stackwise_jax.engine.weights import EMBED, HEAD, Weights, frozen_format, item_format, stack_item
from stackwise_jax.engine.window import Window
from stackwise_jax.memory import Placement
from stackwise_jax.model import dtype_of
from stackwise_jax.objectives import Examples
from stackwise_jax.random_streams import root_key

Tree = Any


def advanced_stacks(before: Phase | None, phase: Phase, loader: Loader) -> int | None:
    """Through how many stacks the cache of the phase before is pushed; None where it is filled anew."""
    if before is None:
        return None
    n = len(before.prefix)

    def content(p: Phase) -> tuple:
        batches = min(p.steps, loader.n_batches)  # always the first of the stream
        formats = [frozen_format(p, EMBED), *map(p.format_of, p.prefix[:n])]
        adapters = {adapter for adapter in p.adapters if adapter.stack in p.prefix[:n]}
        return p.objective, p.noise, p.attention_mode, p.seed, batches, p.prefix[:n], formats, adapters

    merged = phase.merge_adapters and any(adapter.stack in phase.prefix[:n] for adapter in before.adapters)
    return len(phase.prefix) - n if not merged and content(before) == content(phase) else None


def placed(placement: Placement, tree: Tree) -> Tree:
    """The tree of shapes with the shardings of parameters."""
    shardings = placement.params(tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def device_bytes(tree: Tree) -> int:
    """Bytes of a tree of arrays or shapes on one device."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def abstract_step(
    setup: Setup, weights: Weights, spec: StepSpec, phase: Phase, window: Window
) -> tuple[TrainState, Tree, StepData, Tree]:
    """The arguments of the training step of a phase as shapes with shardings."""
    placement, config = setup.placement, setup.config
    weights.declare(phase)
    shape = lambda item: weights.shapes(item, item_format(phase, item, weights.master))
    stacks = {i: weights.full_shapes(i, item_format(phase, stack_item(i), weights.master)) for i in phase.window}
    split = lambda embed, head, stacks: split_phase(spec, window, embed, head, stacks, embed)
    learning, frozen = placed(placement, jax.eval_shape(split, shape(EMBED), shape(HEAD), stacks))
    opt = placed(placement, jax.eval_shape(make_optimizer(spec.optimizer).init, learning))

    def scalar(dtype) -> Any:
        return jax.ShapeDtypeStruct((), dtype, sharding=placement.replicated)

    def batch(*shape: int, dtype=jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.batch)

    n, t = config.data.batch_size, config.data.seq_len
    state = TrainState(scalar(jnp.int32), scalar(jnp.int32), learning, opt)
    examples = Examples(batch(n, t), batch(n, t), batch(n, t), batch(n))
    hidden = batch(n, t, setup.rack.d_model, dtype=dtype_of(setup.rack.compute_dtype)) if phase.prefix else None
    data = StepData(examples, hidden, scalar(jnp.float32), scalar(jnp.int32))
    key = scalar(jax.eval_shape(lambda: root_key(0)).dtype)
    table = jax.ShapeDtypeStruct((setup.tokenizer.vocab_size,), jnp.float32, sharding=placement.replicated)
    keys = dict.fromkeys(("corruption_key", "dropout_key", "rounding_key"), key)
    return state, frozen, data, keys | {"token_bytes_V": table}
