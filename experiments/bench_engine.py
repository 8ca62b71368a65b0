"""The engine's step and loop against a bare jitted step of the same model, written by hand.

    python experiments/bench_engine.py [--rounds N] [--steps N] [--set KEY=VALUE] [--smoke] [--json]

Model, data and optimizer are those of configs/quickstart.yaml, end to end (plan rackwise). Four things take turns:

- bare: a jitted, donated step: embedding, one Stack.apply over all blocks, the package's chunked cross entropy,
  clip and AdamW from optax with the same mask; the same data again and again, already on the device; no metrics;
- bare, full logits: the same with a plain log-softmax over all logits;
- step: the engine's compiled step alone, on data already on the device;
- loop: the engine's whole loop (run_phase under engine.Run), with its data feed, its reading of metrics,
  metrics.jsonl, console and TensorBoard.

Overheads are ratios of medians to "bare", of wall time and of the CPU time of all threads. Before timing, the losses of
engine and bare step must agree.

Legend: B batch, T sequence, D d_model, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import PhaseLoop, arguments, configure, finish, in_turns, print_table

from stackwise_jax.engine.optimizer import decay_mask
from stackwise_jax.kernels.cross_entropy import linear_cross_entropy
from stackwise_jax.model import combine, embed_tokens, final_hidden, head_kernel


def bare_step(loop: PhaseLoop, *, full_logits: bool) -> tuple[Callable, Any]:
    """(step(state, examples) -> (state, loss), its first state (parameters, optimizer state))."""
    executor, cfg = loop.executor, loop.setup.config.optimizer
    task, (stack,) = executor.spec.task, executor.spec.groups
    fixed = executor.frozen["stacks"][0]
    rule = optax.adamw(cfg.lr, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=decay_mask)
    optimizer = optax.chain(optax.clip_by_global_norm(cfg.grad_clip), rule)

    def loss(params, fixed, examples):
        tokens_BT, ids_BT = examples.tokens_BT, examples.segment_ids_BT
        targets_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
        weights_BT = (ids_BT != 0) & (jnp.pad(ids_BT[:, 1:], ((0, 0), (0, 1))) == ids_BT)
        weights_BT = weights_BT.astype(jnp.float32)
        x_BTD = embed_tokens(task.rack, params["embed"], tokens_BT)
        blocks = {"params": combine(params["stacks"][0], fixed)}
        x_BTD = stack.apply(blocks, x_BTD, examples.positions_BT, ids_BT, "causal")
        x_BTD = final_hidden(task.rack, params["head"], x_BTD)
        kernel_DV = head_kernel(task.rack, params["head"], params["embed"])
        if full_logits:
            logits_BTV = (x_BTD @ kernel_DV)[..., : task.vocab.size]
            nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
            total = (weights_BT * nll_BT).sum()
        else:
            total, _ = linear_cross_entropy(x_BTD, kernel_DV, targets_BT, weights_BT, n_valid=task.vocab.size)
        return total / weights_BT.sum()

    def step(state, fixed, examples):
        params, opt = state
        value, grads = jax.value_and_grad(loss)(params, fixed, examples)
        updates, opt = optimizer.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    params = jax.tree.map(jnp.copy, executor.state.learning)
    state = (params, optimizer.init(params))
    compiled = jax.jit(step, donate_argnums=0).lower(state, fixed, loop.example.examples).compile()
    return lambda state, examples: compiled(state, fixed, examples), state


def check_same_losses(loop: PhaseLoop, bare: dict[str, list], n: int = 3) -> None:
    """A few steps of each on the same data: they must do the same, or the timing compares unlike things."""
    # Steps on one batch at the full rate, as the bare step takes them.
    lr = jax.device_put(jnp.float32(loop.setup.config.optimizer.lr), loop.example.lr.sharding)
    loop.example = loop.example._replace(lr=lr)
    engine = [loop.steps_alone(1)["loss"] for _ in range(n)]
    for name, (step, state) in bare.items():
        losses = []
        for _ in range(n):
            state, loss = step(state, loop.example.examples)
            losses.append(float(loss))
        bare[name][1] = state
        np.testing.assert_allclose(losses, engine, rtol=1e-3, err_msg=f"{name} is not the engine's computation")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each is timed")
    parser.add_argument("--steps", type=int, default=4, help="steps each time")
    args = parser.parse_args(argv)
    rounds, n = (2, 2) if args.smoke else (args.rounds, args.steps)
    changes = {"curriculum.plan": "rackwise", "curriculum.steps": (rounds + 2) * n, "run.save_every": 0}
    with PhaseLoop(configure("quickstart.yaml", changes, args)) as loop:
        bare = {name: [*bare_step(loop, full_logits="full" in name)] for name in ("bare", "bare, full logits")}
        check_same_losses(loop, bare)

        def run_bare(name: str) -> None:
            step, state = bare[name]
            for _ in range(n):
                state, _ = step(state, loop.example.examples)
            bare[name][1] = jax.block_until_ready(state)

        work: dict[str, Callable[[], Any]] = {name: (lambda name=name: run_bare(name)) for name in bare}
        work |= {"step": lambda: loop.steps_alone(n), "loop": lambda: loop.loop(n)}
        seconds = in_turns(work, rounds)
    rows, overhead, base = [], {}, seconds["bare"]
    for name, time in seconds.items():
        overhead[name] = {"wall": time.wall / base.wall - 1, "cpu": time.cpu / base.cpu - 1}
        row = {"": name, "ms per step": 1e3 * time.wall / n, "overhead": f"{overhead[name]['wall']:+.1%}"}
        rows.append(row | {"CPU ms per step": 1e3 * time.cpu / n, "CPU overhead": f"{overhead[name]['cpu']:+.1%}"})
    print_table("Engine against a bare jitted step (target: at most 5 % overhead)", rows)
    per_step = {name: time.wall / n for name, time in seconds.items()}
    return finish(args, {"seconds_per_step": per_step, "overhead": overhead})


if __name__ == "__main__":
    main(sys.argv[1:])
