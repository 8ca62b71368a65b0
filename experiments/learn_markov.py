"""Does it learn? Training on a Markov source of 64 symbols whose entropy is known.

    python experiments/learn_markov.py [--job NAME] [--set KEY=VALUE] [--smoke] [--json]

Four jobs with twelve blocks of width 128: next-token training end to end (configs/markov.yaml) and stack by stack over
a frozen trunk (configs/markov_append.yaml), masked and diffusion training end to end (markov.yaml with bert_style).
Printed are the held-out loss in nats per predicted token, beside the entropy of the source and what uniform guessing
costs, and the accuracy on held-out text. For masked and diffusion training it counts only positions whose input differs
from the target, so that a copy of the input scores 0.

Legend: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import arguments, configure, finish, print_table

from stackwise_jax.data.builtin import SYMBOLS, markov_entropy
from stackwise_jax.engine import Run, Setup, held_out_batches, load_rack, prepare

BOTH_WAYS = {"model.attention_preset": "bert_style"}
JOBS = {
    "end-to-end": ("markov.yaml", {}),
    "append": ("markov_append.yaml", {}),
    "masked": ("markov.yaml", BOTH_WAYS | {"objective.kind": "mlm"}),
    "diffusion": ("markov.yaml", BOTH_WAYS | {"objective.kind": "diffusion"}),
}


def accuracy(setup: Setup, run_dir: Path) -> float:
    """Share of held-out targets whose likeliest token is right, among those that the input does not show."""
    loaded = load_rack(run_dir)
    task = setup.task(loaded.phase)

    @jax.jit
    def count(params, examples, key):
        batch = task.batch(examples, key, jnp.int32(0))
        logits_BTV = loaded.rack.apply(
            {"params": params},
            batch.inputs_BT,
            positions_BT=batch.positions_BT,
            segment_ids_BT=batch.segment_ids_BT,
            attention_mode=loaded.attention_mode,
        )
        hidden_BT = batch.weights_BT > 0
        if loaded.objective_kind != "clm":
            hidden_BT &= batch.inputs_BT != batch.targets_BT
        hits_BT = logits_BTV[..., : task.vocab.size].argmax(-1) == batch.targets_BT
        return (hits_BT & hidden_BT).sum(), hidden_BT.sum()

    right = total = 0
    for examples in held_out_batches(setup.valid, setup.config.data.batch_size, setup.tokenizer.pad_id, limit=32):
        hits, n = count(loaded.params, examples, jax.random.key(1))
        right, total = right + int(hits), total + int(n)
    return right / total


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--job", choices=JOBS, action="append", help="one of the jobs, may be given again; none: all")
    args = parser.parse_args(argv)
    rows = []
    for name in args.job or JOBS:
        file, changes = JOBS[name]
        changes = changes | ({"curriculum.steps": 2, "model.architecture.n_stacks": 2} if args.smoke else {})
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            setup = prepare(configure(file, changes, args), run_dir)
            summary = Run(setup).train()
            row = {"job": name, "steps": sum(phase.steps for phase in setup.plan.phases)}
            row |= {"held-out loss": summary["held_out_loss"], "accuracy": accuracy(setup, run_dir)}
            rows.append(row | {"seconds": summary["seconds"]})
    known = {"entropy": markov_entropy(), "uniform": math.log(len(SYMBOLS)), "chance": 1 / len(SYMBOLS)}
    text = ", ".join(f"{name} {value:.3f}" for name, value in known.items())
    print_table(f"Markov source: {text}", rows)
    return finish(args, known | {"jobs": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
