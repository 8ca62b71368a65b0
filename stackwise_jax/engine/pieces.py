"""The training step of a phase in pieces, one per stack: what the streamed executor runs. All are pure functions.

Together they compute what `step.train_step` computes; here the loop over the stacks is outside, so that what a stack
needs can come and go, and one compiled piece serves all stacks of equal shape.

Legend: B batch (of a microbatch), T sequence, D d_model, V vocabulary, M microbatches.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stackwise_jax.engine.step import StepData, StepSpec, batch_metrics, batch_sums, consistency_distance, token_loss
from stackwise_jax.engine.update import apply_update, clip, norm
from stackwise_jax.engine.window import Learns
from stackwise_jax.memory import Placement
from stackwise_jax.model import Stack, combine
from stackwise_jax.objectives import Batch

Tree = Any


class Tally(NamedTuple):
    """What is found out about the gradient on the way."""

    squares: jax.Array  # the sum of the squares of what was seen of it
    fine: jax.Array  # whether loss and gradient were finite up to here; if not, nothing changes from here on
    finite: jax.Array  # whether the updates were too


class Opened(NamedTuple):
    """What the pieces of a step share. Tuples have an entry per microbatch, or none where it is not used."""

    batches: tuple[Batch, ...]
    inputs: tuple[jax.Array, ...]  # x_BTD of the first stack of the window
    references: tuple[Batch, ...]  # the same examples at the noise that the suffix was trained on
    dropout_keys: tuple[jax.Array, ...]
    rounding_key: jax.Array
    total: jax.Array  # tokens that the mean is taken over
    pull: jax.Array  # weight of a distance of `consistency_distance`
    sums: dict[str, jax.Array]  # batch_sums of the whole batch but for what only the forward pass knows
    tally: Tally


class Gradient(NamedTuple):
    """What the head's piece adds up over the microbatches."""

    nll: jax.Array
    correct: jax.Array
    ends: Tree  # {"embed"?, "head"?}: those whose gradient comes from the loss


def lean(spec: StepSpec) -> StepSpec:
    """The spec without what belongs to single stacks, which the pieces are told one by one."""
    return dataclasses.replace(spec, groups=(), learns=(), stack_sizes=None)


def open_step(spec: StepSpec, embed: Tree, data: StepData, constants: Tree, step: jax.Array) -> Opened:
    """Corrupt the examples, cut them into microbatches, embed them (embed: None where the window takes activations)."""
    task, n = spec.task, spec.microbatches
    batch = task.batch(data.examples, constants["corruption_key"], data.visit)
    references: tuple[Batch, ...] = ()
    pull: Any = jnp.float32(0)
    if spec.consistency is not None:
        earlier = dataclasses.replace(task, noise=spec.consistency.noise)
        references = _parts(earlier.batch(data.examples, constants["corruption_key"], data.visit), n, task.placement)
        pull = spec.consistency.weight / jnp.maximum((batch.segment_ids_BT != 0).sum(), 1)
    batches = _parts(batch, n, task.placement)
    if spec.from_tokens:
        inputs = tuple(jax.lax.with_sharding_constraint(task.embed(embed, b), task.placement.batch) for b in batches)
    else:
        inputs = _parts(data.hidden_BTD, n, task.placement)
    keys: tuple[jax.Array, ...] = ()
    if spec.dropout:
        key = jax.random.fold_in(constants["dropout_key"], step)
        keys = (key,) if n == 1 else tuple(jax.random.fold_in(key, i) for i in range(n))
    return Opened(
        batches=batches,
        inputs=inputs,
        references=references,
        dropout_keys=keys,
        rounding_key=jax.random.fold_in(constants["rounding_key"], step),
        total=jnp.maximum(batch.counts_BT.sum(), 1.0),
        pull=jnp.asarray(pull, jnp.float32),
        sums=batch_sums(batch, jnp.float32(0), jnp.float32(0), constants["token_bytes_V"])
        | {"real": (batch.segment_ids_BT != 0).sum()},
        tally=Tally(jnp.float32(0), jnp.bool_(True), jnp.bool_(True)),
    )


def _parts(tree: Tree, n: int, placement: Placement) -> tuple:
    """The microbatches of a batch: each takes every n-th row, as those of the resident step do."""
    if n == 1:
        return (tree,)
    part = lambda i: jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x[i::n], placement.batch), tree)
    return tuple(part(i) for i in range(n))


def forward(
    spec: StepSpec,
    stack: Stack,
    learning: Tree,
    frozen: Tree,
    batch: Batch,
    x_BTD: jax.Array,
    key: jax.Array | None,
    place: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """One stack: y_BTD.

    Args:
        learning, frozen: its tree in two.
        key: of dropout; None: none drops.
        place: the group of the stack in the resident step and the first of its blocks there, which decide what drops.
    """
    group, first_block = place
    y_BTD: Any = stack.apply(
        {"params": combine(learning, frozen)},
        x_BTD,
        positions_BT=batch.positions_BT,
        segment_ids_BT=batch.segment_ids_BT,
        attention_mode=spec.task.attention_mode,
        dropout_key=None if key is None else jax.random.fold_in(key, group),
        first_block=first_block,
    )
    return jax.lax.with_sharding_constraint(y_BTD, spec.task.placement.batch)


def backward(
    spec: StepSpec,
    stack: Stack,
    learns: Learns,
    wanted: bool,
    learning: Tree,
    frozen: Tree,
    batch: Batch,
    x_BTD: jax.Array,
    dy_BTD: jax.Array,
    key: jax.Array | None,
    place: tuple[jax.Array, jax.Array],
    so_far: Tree | None,
) -> tuple[jax.Array | None, Tree | None]:
    """(gradient of the stack's input, of what learns in it added to `so_far`), from that of its output.

    Computes the stack again. wanted: whether the gradient of the input is.
    """
    run = lambda learning, x_BTD: forward(spec, stack, learning, frozen, batch, x_BTD, key, place)
    if learns == "nothing":
        _, vjp = jax.vjp(lambda x_BTD: run(learning, x_BTD), x_BTD)
        return jax.lax.with_sharding_constraint(vjp(dy_BTD)[0], spec.task.placement.batch), None
    if not wanted:
        _, vjp = jax.vjp(lambda learning: run(learning, x_BTD), learning)
        return None, _add(spec, so_far, vjp(dy_BTD)[0])
    _, vjp = jax.vjp(run, learning, x_BTD)
    grads, dx_BTD = vjp(dy_BTD)
    return jax.lax.with_sharding_constraint(dx_BTD, spec.task.placement.batch), _add(spec, so_far, grads)


def head_gradient(
    spec: StepSpec,
    ends: Tree,
    frozen: Tree,
    batch: Batch,
    x_BTD: jax.Array,
    total: jax.Array,
    so_far: Gradient | None,
) -> tuple[jax.Array, Gradient]:
    """The loss of a microbatch: (gradient of what enters the final norm, what is added up).

    Args:
        ends: {"head"?, "embed"?}: those that learn from the loss; the embedding only where it is the head too.
        frozen: the same for those that do not.
    """
    train_kernel = spec.train_head or (spec.train_embed and spec.task.rack.tie_embeddings)

    def loss(ends, x_BTD):
        head, embed = ends.get("head", frozen.get("head")), ends.get("embed", frozen.get("embed"))
        nll, correct = token_loss(spec.task, head, embed, x_BTD, batch, train_kernel=train_kernel)
        return nll / total, (nll, correct)

    (d_ends, dx_BTD), (nll, correct) = jax.grad(loss, argnums=(0, 1), has_aux=True)(ends, x_BTD)
    if so_far is not None:
        nll, correct = so_far.nll + nll, so_far.correct + correct
    d_ends = _add(spec, None if so_far is None else so_far.ends, d_ends)
    return jax.lax.with_sharding_constraint(dx_BTD, spec.task.placement.batch), Gradient(nll, correct, d_ends)


def embed_gradient(spec: StepSpec, embed: Tree, batch: Batch, dx_BTD: jax.Array, so_far: Tree | None) -> Tree:
    """The gradient of the embedding, from that of its output, added to `so_far`."""
    _, vjp = jax.vjp(lambda embed: spec.task.embed(embed, batch), embed)
    return _add(spec, so_far, vjp(dx_BTD)[0])


def pull_gradient(
    spec: StepSpec,
    reference: Tree,
    earlier: Batch,
    y_BTD: jax.Array,
    pull: jax.Array,
    dy_BTD: jax.Array,
    so_far: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """(distance added to `so_far`, dy_BTD with its share): the pull of what learns towards what the suffix knows."""

    def distance(y_BTD):
        return consistency_distance(y_BTD, spec.task.embed(reference, earlier), earlier.segment_ids_BT)

    value, slope_BTD = jax.value_and_grad(distance)(y_BTD)
    return value if so_far is None else so_far + value, dy_BTD + (pull * slope_BTD).astype(dy_BTD.dtype)


def note(learning: Tree, gradient: Tree, tally: Tally) -> tuple[Tree, Tally]:
    """A gradient that waits for the norm of the whole: (in the dtypes of what learns, with its squares noted)."""
    gradient = _as(learning, gradient)
    return gradient, tally._replace(squares=tally.squares + jnp.square(norm(gradient)))


def update(
    spec: StepSpec,
    whole: bool,
    learning: Tree,
    opt: Tree,
    gradient: Tree,
    lr: jax.Array,
    key: jax.Array,
    stream: jax.Array,
    nll: jax.Array,
    tally: Tally,
) -> tuple[Tree, Tree, Tally]:
    """One part of what learns: (learning, opt, tally).

    Args:
        whole: the tally knows the whole gradient, which is clipped as one; else this part is clipped by itself.
        learning: {"stacks": (tree,)}, {"embed": tree} or {"head": tree}.
        gradient: of equal structure.
        key, stream: of stochastic rounding; each part has a stream of its own.
    """
    key = jax.random.fold_in(key, stream)
    gradient = _as(learning, gradient)
    own = tally.squares if whole else jnp.square(norm(gradient))
    gradient = clip(spec.optimizer, gradient, jnp.sqrt(own))
    fine = tally.fine & jnp.isfinite(nll) & jnp.isfinite(own)
    new, new_opt, finite = apply_update(spec.optimizer, spec.adapter_rate, learning, opt, gradient, lr, key, fine)
    constrain = lambda tree: jax.lax.with_sharding_constraint(tree, spec.task.placement.params(tree))
    return constrain(new), constrain(new_opt), Tally(own if whole else tally.squares + own, fine, tally.finite & finite)


def close_step(
    sums: dict[str, jax.Array],
    nll: jax.Array,
    correct: jax.Array,
    distance: jax.Array | None,
    tally: Tally,
    step: jax.Array,
    bad_steps: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]:
    """((step, bad_steps), metrics) after the step; the metrics are those of `step.train_step`."""
    finite = tally.finite & jnp.isfinite(nll) & jnp.isfinite(tally.squares)
    bad_steps = jnp.where(finite, 0, bad_steps + 1)
    metrics = batch_metrics(sums | {"nll": nll, "correct": correct})
    if distance is not None:
        metrics["consistency"] = distance / jnp.maximum(sums["real"], 1)
    metrics |= {"grad_norm": jnp.sqrt(tally.squares), "bad_steps": bad_steps, "finite": finite}
    return (step + 1, bad_steps), metrics


def widened(spec: StepSpec, learning: Tree) -> Tree:
    """The shapes of the gradient of what learns while microbatches are added up."""
    wide = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
    return jax.tree.map(wide, learning) if spec.microbatches > 1 else learning


def _as(learning: Tree, gradient: Tree) -> Tree:
    return jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, learning)


def _add(spec: StepSpec, so_far: Tree | None, gradient: Tree) -> Tree:
    """Gradients of microbatches are added up in float32, as in the resident step."""
    if so_far is not None:
        gradient = jax.tree.map(lambda s, g: s + g.astype(s.dtype), so_far, gradient)
    elif spec.microbatches > 1:
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
    return jax.lax.with_sharding_constraint(gradient, spec.task.placement.params(gradient))
