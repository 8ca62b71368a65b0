"""The training step of a phase, as a pure function of (state, frozen trees, data).

What learns is the argument that is differentiated; what does not is another argument. Optimizer state and gradients
exist only for what learns. The step sees the window of a phase: the stacks from the first that learns to the head.
What lies before it arrives as activations.

Legend: B batch, T sequence, D d_model, V vocabulary, M microbatches, k predicted positions per sequence.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stackwise_jax.config.schema import OptimizerConfig
from stackwise_jax.curriculum.phase import AttentionMode, Consistency, Noise, Objective
from stackwise_jax.engine.update import apply_update, clip, norm, stack_norms
from stackwise_jax.engine.window import Learns
from stackwise_jax.kernels.cross_entropy import gather_targets, linear_cross_entropy
from stackwise_jax.memory import Placement
from stackwise_jax.model import Rack, Stack, combine, embed_tokens, final_hidden, head_kernel
from stackwise_jax.objectives import Batch, Examples, Vocab, example_keys, make_batch, max_targets

Tree = Any


@dataclass(frozen=True)
class TaskSpec:
    """What is asked of the model: enough to turn examples into a batch and hidden states into a loss. Hashable."""

    rack: Rack  # read for its embedding, final norm and head only
    objective: Objective
    noise: Noise
    attention_mode: AttentionMode | None
    vocab: Vocab
    placement: Placement

    def batch(self, examples: Examples, seed_key: jax.Array, visit: jax.Array) -> Batch:
        """The batch of these examples; visit is 0 for fixed corruption and the step of the run for fresh."""
        keys_B = example_keys(seed_key, examples.example_ids_B, visit)
        return make_batch(self.objective, self.noise, examples, keys_B, self.vocab)

    def embed(self, embed: Tree, batch: Batch) -> jax.Array:
        """The embedding of a batch's inputs, with the share that is hidden where the rack takes it: x_BTD."""
        hidden_B = batch.hidden_B if self.rack.time_embedding != "none" else None
        return embed_tokens(self.rack, embed, batch.inputs_BT, hidden_B)


@dataclass(frozen=True)
class StepSpec:
    """All that decides what a training step compiles to, besides shapes. Equal specs share one compiled step."""

    task: TaskSpec
    groups: tuple[Stack, ...]  # the window; neighbouring alike stacks are merged into one scan
    learns: tuple[Learns, ...]  # per group
    from_tokens: bool  # the window begins with the embedding
    train_embed: bool
    train_head: bool
    dropout: bool
    microbatches: int
    optimizer: OptimizerConfig
    stack_sizes: tuple[tuple[int, ...], ...] | None  # per group, blocks of each stack, where each has a norm to clip
    adapter_rate: float  # learning rate of adapters as a multiple of the phase's
    consistency: Consistency | None


class TrainState(NamedTuple):
    """What a step consumes and returns; donated. Arrays, or their shapes while nothing is allocated."""

    step: Any  # int32, steps done in this phase; counts skipped steps too
    bad_steps: Any  # int32, non-finite steps in a row up to now
    learning: Tree  # {"embed"?, "stacks": one tree per group, "head"?}
    opt: Tree


class StepData(NamedTuple):
    """One step's worth of data on the device. Arrays, or their shapes while nothing is allocated."""

    examples: Examples
    hidden_BTD: Any  # (B, T, D) or None: output of the prefix; None when the window begins with the embedding
    lr: Any  # float32
    visit: Any  # int32, see TaskSpec.batch


def token_loss(
    task: TaskSpec, head: Tree, embed: Tree | None, x_BTD: jax.Array, batch: Batch, *, train_kernel: bool
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the negative log-likelihoods in nats and the number of weighted positions predicted right.

    The head sees only positions that carry weight, and never holds all logits.
    """
    hidden_BTD = final_hidden(task.rack, head, x_BTD)
    seq_len = batch.targets_BT.shape[1]
    k = max_targets(task.objective, task.noise, seq_len)
    targets_Bk, weights_Bk = batch.targets_BT, batch.weights_BT
    if k < seq_len:
        hidden_BTD, targets_Bk, weights_Bk = gather_targets(hidden_BTD, targets_Bk, weights_Bk, k)
    # A head that is split over devices is gathered once here, not in every chunk of the loss.
    kernel_DV = jax.lax.with_sharding_constraint(head_kernel(task.rack, head, embed), task.placement.replicated)
    nll, stats = linear_cross_entropy(
        hidden_BTD,
        kernel_DV,
        targets_Bk,
        weights_Bk,
        n_valid=task.vocab.size,
        train_kernel=train_kernel,
        batch_shards=task.placement.mesh.size,
    )
    return nll, stats["correct"]


def window_loss(
    spec: StepSpec,
    learning: Tree,
    frozen: Tree,
    batch: Batch,
    hidden_BTD: jax.Array | None,
    dropout_key: jax.Array | None,
    reference: Batch | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the window over a (micro)batch: token_loss, and the sum of the distances of `consistency_distance`.

    Differentiable in `learning`. reference: the batch at the noise that the suffix was trained on.
    """
    task = spec.task
    embed = learning.get("embed", frozen.get("embed"))
    head = learning.get("head", frozen.get("head"))
    x_BTD: Any = task.embed(embed, batch) if spec.from_tokens else hidden_BTD
    assert x_BTD is not None
    distance = jnp.float32(0)
    last = max((i for i, learns in enumerate(spec.learns) if learns != "nothing"), default=-1)
    for i, stack in enumerate(spec.groups):
        params = combine(learning["stacks"][i], frozen["stacks"][i])
        key = None if dropout_key is None or spec.learns[i] == "nothing" else jax.random.fold_in(dropout_key, i)
        x_BTD = stack.apply(
            {"params": params},
            x_BTD,
            positions_BT=batch.positions_BT,
            segment_ids_BT=batch.segment_ids_BT,
            attention_mode=task.attention_mode,
            dropout_key=key,
        )
        if reference is not None and i == last:
            distance = consistency_distance(x_BTD, task.embed(frozen["reference"], reference), batch.segment_ids_BT)
    train_kernel = spec.train_head or (spec.train_embed and task.rack.tie_embeddings)
    nll, correct = token_loss(task, head, embed, x_BTD, batch, train_kernel=train_kernel)
    return nll, correct, distance


def consistency_distance(x_BTD: jax.Array, reference_BTD: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """The sum over real tokens of |x - r|^2 / |r|^2, in float32; r is the reference."""
    r_BTD = reference_BTD.astype(jnp.float32)
    apart_BT = jnp.square(x_BTD.astype(jnp.float32) - r_BTD).sum(-1) / (jnp.square(r_BTD).sum(-1) + 1e-6)
    return jnp.where(segment_ids_BT != 0, apart_BT, 0.0).sum()


def _split(tree: Tree, n: int) -> Tree:
    """(B, ...) -> (n, B/n, ...). Each part takes every n-th row, so a batch axis split over devices stays split."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), tree)


def batch_gradients(
    spec: StepSpec,
    learning: Tree,
    frozen: Tree,
    batch: Batch,
    hidden_BTD: jax.Array | None,
    key: jax.Array | None,
    reference: Batch | None = None,
) -> tuple[dict[str, jax.Array], Tree]:
    """({"nll": sum, "correct": number, "distance": sum}, gradient of the mean loss) of the full batch.

    The loss is the mean nll over the tokens that count, plus consistency.weight times the mean distance over the real
    tokens. Computed in spec.microbatches parts.
    """
    total = jnp.maximum(batch.counts_BT.sum(), 1.0)
    pull = 0.0
    if spec.consistency is not None:
        pull = spec.consistency.weight / jnp.maximum((batch.segment_ids_BT != 0).sum(), 1)

    def loss(learning, part: Batch, hidden, reference, key):
        nll, correct, distance = window_loss(spec, learning, frozen, part, hidden, key, reference)
        value = nll / total
        if reference is not None:
            value = value + pull * distance
        return value, {"nll": nll, "correct": correct, "distance": distance}

    grad = jax.grad(loss, has_aux=True)
    if spec.microbatches == 1:
        grads, sums = grad(learning, batch, hidden_BTD, reference, key)
        return sums, grads

    def body(carry, part):
        index, parts = part
        part_key = None if key is None else jax.random.fold_in(key, index)
        grads, sums = grad(learning, *parts, part_key)
        grad_sums, totals = carry
        grad_sums = jax.tree.map(lambda s, g: s + g.astype(s.dtype), grad_sums, grads)
        return (grad_sums, jax.tree.map(jnp.add, totals, sums)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), learning)
    nothing = {name: jnp.float32(0) for name in ("nll", "correct", "distance")}
    parts = (jnp.arange(spec.microbatches), _split((batch, hidden_BTD, reference), spec.microbatches))
    (grads, sums), _ = jax.lax.scan(body, (zeros, nothing), parts)
    return sums, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, learning)


def train_step(
    spec: StepSpec, state: TrainState, frozen: Tree, data: StepData, constants: Tree
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of what learns.

    A loss or gradient that is not finite skips the update: parameters and optimizer state stay as they were. A weight
    whose update is not finite stays as it was. In both cases the step counts as bad.

    Args:
        frozen: {"embed"?, "stacks": one tree per group (for a learning group its fixed part), "head"?}.
        constants: {"corruption_key", "dropout_key", "rounding_key", "token_bytes_V"}.

    Returns:
        The new state, and scalars: loss (nats per token), bits_per_byte of the original text, accuracy (share of the
        predicted positions), grad_norm, bad_steps (in a row), finite, and consistency (mean distance) where it is used.
    """
    batch = spec.task.batch(data.examples, constants["corruption_key"], data.visit)
    key = jax.random.fold_in(constants["dropout_key"], state.step) if spec.dropout else None
    reference = None
    if spec.consistency is not None:
        earlier = dataclasses.replace(spec.task, noise=spec.consistency.noise)
        reference = earlier.batch(data.examples, constants["corruption_key"], data.visit)
    sums, grads = batch_gradients(spec, state.learning, frozen, batch, data.hidden_BTD, key, reference)
    cfg = spec.optimizer
    grad_norm = norm(grads)
    grads = clip(cfg, grads, grad_norm if spec.stack_sizes is None else stack_norms(grads, spec.stack_sizes))
    rounding_key = jax.random.fold_in(constants["rounding_key"], state.step) if cfg.rounding == "stochastic" else None
    fine = jnp.isfinite(sums["nll"]) & jnp.isfinite(grad_norm)
    learning, opt, finite = apply_update(
        cfg, spec.adapter_rate, state.learning, state.opt, grads, data.lr, rounding_key, fine
    )
    bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
    new_state = TrainState(state.step + 1, bad_steps, learning, opt)
    metrics = batch_metrics(batch_sums(batch, sums["nll"], sums["correct"], constants["token_bytes_V"]))
    if reference is not None:
        metrics["consistency"] = sums["distance"] / jnp.maximum((batch.segment_ids_BT != 0).sum(), 1)
    return new_state, metrics | {"grad_norm": grad_norm, "bad_steps": bad_steps, "finite": finite}


def batch_sums(batch: Batch, nll: jax.Array, correct: jax.Array, token_bytes_V: jax.Array) -> dict[str, jax.Array]:
    """The sums that loss, bits per byte and accuracy are quotients of; those of several batches add up."""
    return {
        "nll": nll,
        "tokens": batch.counts_BT.sum(),
        "bytes": (batch.counts_BT * token_bytes_V[batch.targets_BT]).sum(),
        "correct": correct,
        "predicted": (batch.weights_BT > 0).sum().astype(jnp.float32),
    }


def batch_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """From the sums of `batch_sums`: loss in nats per token, bits per byte of the original text, and accuracy on the
    predicted positions."""
    return {
        "loss": sums["nll"] / jnp.maximum(sums["tokens"], 1.0),
        "bits_per_byte": sums["nll"] / jnp.log(2.0) / jnp.maximum(sums["bytes"], 1.0),
        "accuracy": sums["correct"] / jnp.maximum(sums["predicted"], 1.0),
    }
