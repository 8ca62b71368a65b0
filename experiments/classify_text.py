"""Text classification: one attention against another at equal size, trained end to end on a labelled file.

    python experiments/classify_text.py --train FILE --valid FILE --test FILE [--attention PRESET ..] [--seeds N]
        [--rates R ..] [--steps N] [--set KEY=VALUE] [--smoke] [--json]

The model is the embedding, the stacks of a rack, all looking both ways, its final norm, the mean over the real tokens
and a linear head. The stacks of every attention hold as many numbers, within 2 %, as those of the first: d_ff makes up
for what the attention takes or saves. Two controls: the same model without stacks (a bag of embeddings), and the
commonest class of the training file.

Every model is trained with each learning rate at seed 0 and with the best of them at the other seeds. The validation
file chooses rate and step (the best accuracy, then the lowest loss); training ends when it has not become better for a
while; the test file is read once per run, at that step. A seed decides initial values, order and dropout. The step is
timed afterwards, in turns between the models; its bytes are XLA's count: arguments, outputs and temporaries.

Sections model, optimizer and tokenizer and data.seq_len and data.batch_size of the configuration hold (--set).

Legend: B batch, T sequence, D d_model, C classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import arguments, configure, finish, in_turns, print_table

from stackwise_jax.config import StackWiseConfig
from stackwise_jax.config.schema import OptimizerConfig
from stackwise_jax.data import (
    NO_LABEL,
    LabelledBatch,
    LabelledDataset,
    LabelledLoader,
    encode_labelled,
    labelled_batches,
    load_tokenizer,
    read_labelled,
)
from stackwise_jax.engine.optimizer import learning_rate, make_optimizer
from stackwise_jax.engine.programs import compiled_bytes
from stackwise_jax.engine.update import apply_update, clip, norm
from stackwise_jax.errors import UsageError
from stackwise_jax.model import (
    Rack,
    Stack,
    combine,
    create_rack_from_config,
    embed_tokens,
    final_hidden,
    init_embed,
    init_stack,
    run_stacks,
    size_of,
    split_fixed,
)
from stackwise_jax.objectives import Examples

ATTENTIONS = ("bert_style", "mla_attention", "kernel_attention", "mlgka")
ATTENTION_HELP = "model.attention_preset and keys of model for it alone, as mlgka,kernel.bandwidth=2; repeatable"
BAG, MAJORITY = "bag of embeddings", "commonest class"
EQUAL = 0.02  # how far the sizes of stacks may differ
EVAL_BATCH = 256
Tree = Any


@dataclass(frozen=True)
class Classifier:
    """Embedding, stacks (perhaps none), final norm, mean over real tokens, linear head."""

    rack: Rack
    stacks: tuple[Stack, ...]
    n_classes: int

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """(what learns: {"embed", "stacks", "head"}, what is fixed: a tree per stack); the head begins at zero."""
        parts = [split_fixed(stack, init_stack(self.rack, i, key)) for i, stack in enumerate(self.stacks)]
        dim = self.rack.d_model
        head = {"norm": {"scale": jnp.ones(dim)}, "kernel": jnp.zeros((dim, self.n_classes))}
        learning = {"embed": init_embed(self.rack, key), "stacks": tuple(part for part, _ in parts), "head": head}
        return learning, tuple(part for _, part in parts)

    def logits(self, learning: Tree, fixed: Tree, examples: Examples, dropout_key: jax.Array | None) -> jax.Array:
        """(B, C) float32; dropout_key None: no dropout."""
        x_BTD = run_stacks(
            self.stacks,
            [combine(a, b) for a, b in zip(learning["stacks"], fixed, strict=True)],
            embed_tokens(self.rack, learning["embed"], examples.tokens_BT),
            positions_BT=examples.positions_BT,
            segment_ids_BT=examples.segment_ids_BT,
            attention_mode="bidirectional",
            dropout_key=dropout_key,
        )
        x_BTD = final_hidden(self.rack, learning["head"], x_BTD).astype(jnp.float32)
        real_BT = (examples.segment_ids_BT > 0).astype(jnp.float32)
        mean_BD = jnp.einsum("btd,bt->bd", x_BTD, real_BT) / jnp.maximum(real_BT.sum(axis=1), 1.0)[:, None]
        return mean_BD @ learning["head"]["kernel"]


def train_step(
    model: Classifier, cfg: OptimizerConfig, token_dropout: float,
    state: tuple[Tree, Tree], fixed: Tree, batch: LabelledBatch, lr: jax.Array, key: jax.Array,
) -> tuple[tuple[Tree, Tree], jax.Array]:  # fmt: skip
    """One update of (what learns, optimizer state) by the mean cross entropy of a batch: (state, loss).

    token_dropout: the share of a text's tokens that are left out (Iyyer et al. 2015), as padding is: nobody sees them
    and the mean does not count them; bos stays.
    """
    learning, opt = state
    tokens_key, branches_key, rounding_key = jax.random.split(key, 3)
    examples = batch.examples
    kept_BT = jax.random.bernoulli(tokens_key, 1 - token_dropout, examples.tokens_BT.shape)
    ids_BT = jnp.where(kept_BT | (examples.positions_BT == 0), examples.segment_ids_BT, 0)
    examples = examples._replace(segment_ids_BT=ids_BT)

    def loss_of(learning: Tree) -> jax.Array:
        logits_BC = model.logits(learning, fixed, examples, branches_key)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BC, batch.labels_B).mean()

    loss, grads = jax.value_and_grad(loss_of)(learning)
    size = norm(grads)
    fine = jnp.isfinite(loss) & jnp.isfinite(size)
    grads = clip(cfg, grads, size)
    learning, opt, _ = apply_update(cfg, 1.0, learning, opt, grads, lr, rounding_key, fine)
    return (learning, opt), loss


def scores(model: Classifier, learning: Tree, fixed: Tree, batch: LabelledBatch) -> tuple[jax.Array, jax.Array]:
    """(right answers, summed negative log-likelihood) of the rows that have a label."""
    logits_BC = model.logits(learning, fixed, batch.examples, None)
    real_B = batch.labels_B != NO_LABEL
    nll_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, jnp.maximum(batch.labels_B, 0))
    return ((logits_BC.argmax(-1) == batch.labels_B) & real_B).sum(), (nll_B * real_B).sum()


class Data(NamedTuple):
    """The three files."""

    train: LabelledDataset
    valid: LabelledDataset
    test: LabelledDataset
    vocab_size: int


class Outcome(NamedTuple):
    """One run. step: where validation was best; steps: how many were made."""

    valid: float
    valid_loss: float
    test: float
    step: int
    steps: int


class Trainer:
    """One model with its compiled step, and runs of it from fresh weights."""

    def __init__(self, model: Classifier, data: Data, config: StackWiseConfig, args: argparse.Namespace):
        self.model, self.data, self.args = model, data, args
        self.cfg, self.batch_size = config.optimizer, config.data.batch_size
        self._init = jax.jit(model.init)
        self._scores = jax.jit(functools.partial(scores, model))
        step = functools.partial(train_step, model, self.cfg, args.token_dropout)
        self._timed = self._fresh(0)
        self._example = LabelledLoader(data.train, self.batch_size, seed=0).batch(0)
        inputs = (*self._timed, self._example, jnp.float32(0), jax.random.key(0))
        self.step = jax.jit(step, donate_argnums=0).lower(*inputs).compile()
        self.bytes = compiled_bytes(self.step)["total"]

    def run(self, rate: float, seed: int) -> Outcome:
        """Train until validation has not become better for a while, at most args.steps."""
        args, stream = self.args, LabelledLoader(self.data.train, self.batch_size, seed)
        cfg = dataclasses.replace(self.cfg, lr=rate)
        (state, fixed), key = self._fresh(seed), jax.random.fold_in(jax.random.key(seed), 1)
        best, best_step, kept = (-1.0, 0.0), 0, state[0]
        for step in range(1, args.steps + 1):
            lr, step_key = jnp.float32(learning_rate(cfg, args.steps, step - 1)), jax.random.fold_in(key, step)
            state, _ = self.step(state, fixed, stream.batch(step - 1), lr, step_key)
            if step % args.eval_every and step < args.steps:
                continue
            accuracy, loss = self._evaluate(state[0], fixed, self.data.valid)
            if (accuracy, -loss) > best:
                best, best_step, kept = (accuracy, -loss), step, jax.tree.map(jnp.copy, state[0])
            elif step - best_step >= args.patience * args.eval_every:
                break
        test, _ = self._evaluate(kept, fixed, self.data.test)
        return Outcome(best[0], -best[1], test, best_step, step)

    def steps(self, n: int) -> None:
        """The compiled step alone, n times on the same data."""
        state, fixed = self._timed
        for _ in range(n):
            state, _ = self.step(state, fixed, self._example, jnp.float32(0), jax.random.key(0))
        self._timed = jax.block_until_ready(state), fixed

    def _fresh(self, seed: int) -> tuple[tuple[Tree, Tree], Tree]:
        learning, fixed = self._init(jax.random.fold_in(jax.random.key(seed), 0))
        return (learning, make_optimizer(self.cfg).init(learning)), fixed

    def _evaluate(self, learning: Tree, fixed: Tree, dataset: LabelledDataset) -> tuple[float, float]:
        """(accuracy, mean loss)."""
        sums = [self._scores(learning, fixed, batch) for batch in labelled_batches(dataset, EVAL_BATCH)]
        right, nll = map(sum, zip(*jax.device_get(sums), strict=True))
        return float(right) / len(dataset), float(nll) / len(dataset)


def read_data(config: StackWiseConfig, args: argparse.Namespace) -> Data:
    """The files as sequences; the classes are those of the training file, and so is the text of the tokenizer."""
    read = functools.partial(read_labelled, header=not args.no_header, label_first=args.label_first)
    train = read(args.train)
    if len(train.classes) < 2:
        raise UsageError(f"{args.train} has the class {train.classes[0]} only; give a file with two or more")
    tokenizer = load_tokenizer(config.tokenizer, lambda: train.texts)
    others = [read(path, classes=train.classes) for path in (args.valid, args.test)]
    sets = [encode_labelled(texts, tokenizer, config.data.seq_len) for texts in (train, *others)]
    return Data(*sets, vocab_size=tokenizer.vocab_size)


def stack_numbers(rack: Rack) -> int:
    """How many numbers the stacks hold, fixed ones included."""
    return sum(size_of(jax.eval_shape(stack.init_params, jax.random.key(0))) for stack in rack.stacks)


def configurations(args: argparse.Namespace) -> dict[str, StackWiseConfig]:
    """A configuration per attention, by what was given for it."""
    changes = {"tokenizer.kind": "bytes" if args.smoke else "sentencepiece", "tokenizer.vocab_size": 4096}
    changes |= {"data.seq_len": 64, "data.batch_size": 32, "model.d_model": 64, "model.d_ff": 128, "model.n_heads": 4}
    changes |= {"model.architecture.n_stacks": 2, "model.architecture.blocks_per_stack": 1, "model.dropout": 0.2}
    changes |= {"model.freeze_up_proj": False, "optimizer.schedule": "wsd"}
    configs = {}
    for name in args.attention or ATTENTIONS:
        preset, *own = name.split(",")
        own = dict(setting.partition("=")[::2] for setting in own)
        own = {"model.attention_preset": preset} | {f"model.{key}": value for key, value in own.items()}
        configs[name] = configure("quickstart.yaml", changes | own, args)
    return configs


def equal_racks(configs: Mapping[str, StackWiseConfig], vocab_size: int) -> dict[str, Rack]:
    """A rack per attention; the first has d_ff as configured, the others what makes their stacks as large.

    Raises:
        UsageError: no d_ff does.
    """

    def rack(name: str, d_ff: int) -> Rack:
        model = dataclasses.replace(configs[name].model, d_ff=d_ff)
        return create_rack_from_config(dataclasses.replace(configs[name], model=model), vocab_size)

    first = next(iter(configs))
    given = configs[first].model.d_ff
    target = stack_numbers(rack(first, given))
    racks = {}
    for name in configs:
        size = stack_numbers(rack(name, given))
        per_unit = stack_numbers(rack(name, given + 1)) - size  # a stack grows linearly with d_ff
        d_ff = given + round((target - size) / per_unit)
        if d_ff < 1 or abs(stack_numbers(rack(name, d_ff)) / target - 1) > EQUAL:
            raise UsageError(
                f"no model.d_ff gives the stacks of {name} the size of {first}'s; write a larger model.d_ff"
            )
        racks[name] = rack(name, d_ff)
    return racks


def results_of(name: str, trainer: Trainer) -> dict[str, Any]:
    """The best of the learning rates by validation at seed 0, and what it gives over the seeds."""
    args = trainer.args
    tuned = {rate: trainer.run(rate, 0) for rate in args.rates}
    rate = max(tuned, key=lambda rate: (tuned[rate].valid, -tuned[rate].valid_loss))
    runs = [tuned[rate], *(trainer.run(rate, seed) for seed in range(1, args.seeds))]
    learning, fixed = jax.eval_shape(trainer.model.init, jax.random.key(0))
    blocks = [block for stack in trainer.model.stacks for block in stack.blocks]
    result = {
        "attention": name,
        "parameters": size_of((learning, fixed)),
        "stacks": size_of((learning["stacks"], fixed)),
        "fixed": size_of(fixed),
        "d_ff": blocks[0].d_ff if blocks else None,
        "rate": rate,
        "tuned": {f"{rate:g}": outcome.valid for rate, outcome in tuned.items()},
        "bytes": trainer.bytes,
    } | {field: [getattr(run, field) for run in runs] for field in Outcome._fields}
    print(f"{name}: rate {rate:g}, valid {result['valid']}, test {result['test']}", flush=True, file=sys.stderr)
    return result


def table_row(result: dict[str, Any]) -> dict[str, Any]:
    """A line of the table: the mean over the seeds, and the distance of the extremes."""
    return {
        "attention": result["attention"],
        "parameters": result["parameters"],
        "stacks": result["stacks"],
        "d_ff": result["d_ff"] or "",
        "rate": f"{result['rate']:g}",
        "test": statistics.mean(result["test"]),
        "spread": max(result["test"]) - min(result["test"]),
        "ms/step": 1e3 * result["seconds_per_step"],
        "CPU ms": 1e3 * result["cpu_seconds_per_step"],
        "seconds": result["seconds"],
        "MiB": result["bytes"] / 2**20,
    }


def options(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = arguments((__doc__ or "").split("\n")[0])
    for name in ("train", "valid", "test"):
        parser.add_argument(f"--{name}", required=True, metavar="FILE", help="a text, a tab and a label per line")
    parser.add_argument("--no_header", action="store_true", help="the first line is an example")
    parser.add_argument("--label_first", action="store_true", help="the label stands before the text")
    parser.add_argument("--attention", action="append", metavar="PRESET[,KEY=VALUE ..]", help=ATTENTION_HELP)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="learning rates to try")
    parser.add_argument("--seeds", type=int, default=3, help="runs with the best rate: seeds 0, 1, ..")
    parser.add_argument("--steps", type=int, default=500, help="the most of a run; the schedule is for so many")
    parser.add_argument("--eval_every", type=int, default=100, help="steps between looks at the validation file")
    parser.add_argument("--patience", type=int, default=3, help="looks without a better one that end a run")
    parser.add_argument("--token_dropout", type=float, default=0.2, help="share of the tokens left out in training")
    parser.add_argument("--rounds", type=int, default=10, help="how often each step is timed")
    args = parser.parse_args(argv)
    if args.smoke:
        args.rates, args.seeds, args.steps, args.eval_every, args.rounds = args.rates[:1], 1, 40, 20, 1
    return parser, args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser, args = options(argv)
    try:
        configs = configurations(args)
        config = next(iter(configs.values()))
        data = read_data(config, args)
        racks = equal_racks(configs, data.vocab_size)
        n_classes = len(data.train.classes)
        models = {name: Classifier(rack, rack.stacks, n_classes) for name, rack in racks.items()}
        models[BAG] = Classifier(next(iter(racks.values())), (), n_classes)
        trainers = {name: Trainer(model, data, config, args) for name, model in models.items()}
    except UsageError as error:
        parser.error(str(error))
    results = [results_of(name, trainer) for name, trainer in trainers.items()]
    timed = 1 if args.smoke else 5
    times = in_turns({name: lambda t=trainer: t.steps(timed) for name, trainer in trainers.items()}, args.rounds)
    for result in results:
        time = times[result["attention"]]
        result |= {"seconds_per_step": time.wall / timed, "cpu_seconds_per_step": time.cpu / timed}
        result["seconds"] = result["seconds_per_step"] * statistics.mean(result["steps"])  # of a run, looks left out
    commonest = int(np.bincount(data.train.labels_N).argmax())
    majority = float((data.test.labels_N == commonest).mean())
    error = (0.25 / len(data.test)) ** 0.5
    print_table(f"Test accuracy (its sampling error is up to {error:.3f})", [table_row(result) for result in results])
    print(f"{MAJORITY}: {majority:.3f}")
    sizes = {"examples": [len(part) for part in data[:3]], "cut": [part.n_cut for part in data[:3]]}
    return finish(args, sizes | {"classes": data.train.classes, "majority": majority, "rows": results})


if __name__ == "__main__":
    main(sys.argv[1:])
