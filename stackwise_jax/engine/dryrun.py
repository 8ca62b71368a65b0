"""What each phase of a run will need, found out by compiling its step without allocating anything."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.curriculum import Phase
from stackwise_jax.data import Loader
from stackwise_jax.engine.account import phase_flops_of, trainable_and_frozen
from stackwise_jax.engine.optimizer import make_optimizer
from stackwise_jax.engine.prefix import PrefixCache
from stackwise_jax.engine.programs import StepPrograms, compiled_bytes
from stackwise_jax.engine.resident import split_phase, step_spec
from stackwise_jax.engine.setup import Setup
from stackwise_jax.engine.step import StepData, StepSpec, TrainState
from stackwise_jax.engine.weights import EMBED, HEAD, Weights, item_format, stack_item
from stackwise_jax.engine.window import Window
from stackwise_jax.memory import Placement
from stackwise_jax.model import dtype_of
from stackwise_jax.objectives import Examples

Tree = Any


def plan_rows(setup: Setup) -> list[dict]:
    """One row per phase: what it does, its parameters, FLOPs by formula, and the bytes of its compiled step.

    Bytes are those of one device. weights_bytes counts the window and, where the prefix is recomputed, the prefix;
    activations_bytes are the temporaries of the step without the gradients, and its data.
    """
    root_key = setup.placement.put(jax.random.key(setup.config.run.seed), setup.placement.replicated)
    weights = Weights(setup.rack, setup.placement, None, root_key)
    programs, loader = StepPrograms(setup.placement), setup.loader()
    cache = PrefixCache(setup.config.cache, setup.placement, setup.run_dir)
    rows: list[dict] = []
    before: Phase | None = None  # the last phase, if it was cached
    for phase in setup.plan.phases:
        task = setup.task(phase)
        choice = cache.choose(phase, loader, task)
        if phase.corruption == "auto":
            phase = dataclasses.replace(phase, corruption="fixed" if choice.use else "fresh")
        weights.declare(phase)
        window = Window(setup.rack, phase)
        spec = step_spec(task, phase, window)
        trainable, not_trained = trainable_and_frozen(setup.rack, phase)
        chunks = choice.n_chunks if choice.use else None
        advanced = advanced_stacks(before, phase, loader) if choice.use else None
        before = phase if choice.use else None
        row = _describe(phase) | {
            "trainable_params": trainable,
            "frozen_params": not_trained,
            "flops": phase_flops_of(
                setup.rack, phase, setup.config.data, cached_batches=chunks, advanced_stacks=advanced
            ),
            "cache": choice.reason,
            "cache_bytes": cache.chunk_bytes(loader, task) * choice.n_chunks,
        }
        rows.append(row | _step_bytes(setup, weights, programs, spec, phase, window, recompute=not choice.use))
    return rows


def advanced_stacks(before: Phase | None, phase: Phase, loader: Loader) -> int | None:
    """Through how many stacks the cache of the phase before is pushed; None where it is filled anew."""
    if before is None:
        return None
    n = len(before.prefix)

    def content(p: Phase) -> tuple:
        batches = {loader.batch_id(i) for i in range(p.steps)}
        formats = [p.frozen, *map(p.format_of, p.prefix[:n])]
        return p.objective, p.noise, p.attention_mode, p.seed, batches, p.prefix[:n], formats

    return len(phase.prefix) - n if content(before) == content(phase) else None


def _describe(phase: Phase) -> dict:
    """What a phase does, in words."""
    noise = phase.noise
    span = f"{noise.low:g}-{noise.high:g}"
    spans = {"none": "-", "fixed": f"{noise.low:g}", "range": span, "elbo": f"{span} elbo"}
    ends = (["embed"] if phase.train_embed else []), (["head"] if phase.train_head else [])
    return {
        "name": phase.name,
        "path": list(phase.path),
        "learns": [*ends[0], *sorted(phase.train), *(f"~{i}" for i in sorted(phase.adapt)), *ends[1]],
        "objective": phase.objective.kind,
        "noise": spans[noise.kind],
        "corruption": "-" if phase.objective.kind == "clm" else phase.corruption,
        "attention": phase.attention_mode or "model",
        "frozen": phase.frozen,
        "steps": phase.steps,
    }


def _placed(placement: Placement, tree: Tree) -> Tree:
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
    learning, frozen = _placed(placement, jax.eval_shape(split, shape(EMBED), shape(HEAD), stacks))
    opt = _placed(placement, jax.eval_shape(make_optimizer(spec.optimizer).init, learning))

    def scalar(dtype) -> Any:
        return jax.ShapeDtypeStruct((), dtype, sharding=placement.replicated)

    def batch(*shape: int, dtype=jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.batch)

    n, t = config.data.batch_size, config.data.seq_len
    state = TrainState(scalar(jnp.int32), scalar(jnp.int32), learning, opt)
    examples = Examples(batch(n, t), batch(n, t), batch(n, t), batch(n))
    hidden = batch(n, t, setup.rack.d_model, dtype=dtype_of(setup.rack.compute_dtype)) if phase.prefix else None
    data = StepData(examples, hidden, scalar(jnp.float32), scalar(jnp.int32))
    key = scalar(jax.eval_shape(lambda: jax.random.key(0)).dtype)
    table = jax.ShapeDtypeStruct((setup.tokenizer.vocab_size,), jnp.float32, sharding=placement.replicated)
    return state, frozen, data, {"corruption_key": key, "dropout_key": key, "token_bytes_V": table}


def _step_bytes(
    setup: Setup,
    weights: Weights,
    programs: StepPrograms,
    spec: StepSpec,
    phase: Phase,
    window: Window,
    *,
    recompute: bool,
) -> dict[str, int]:
    state, frozen, data, constants = abstract_step(setup, weights, spec, phase, window)
    compiled = compiled_bytes(programs.get(spec, state, frozen, data, constants))
    gradients = device_bytes(state.learning)
    prefix_bytes = 0
    if phase.prefix and recompute:
        prefix_bytes = device_bytes(weights.shapes(EMBED, phase.frozen))
        prefix_bytes += sum(device_bytes(weights.full_shapes(i, phase.format_of(i))) for i in phase.prefix)
    return {
        "weights_bytes": gradients + device_bytes(frozen) + prefix_bytes,
        "gradients_bytes": gradients,
        "optimizer_bytes": device_bytes(state.opt),
        "activations_bytes": max(compiled["temporaries"] - gradients, 0) + device_bytes(data),
        "total_bytes": compiled["total"] + prefix_bytes,
    }
