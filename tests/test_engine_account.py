"""The account of a phase against what the engine's own step computes and holds.

Loops are unrolled, because XLA counts the body of a scan once.
"""

import dataclasses
import functools
import time

import jax
import pytest
from tiny import step_parts, tiny

from stackwise_jax.adapters import split_adapters
from stackwise_jax.engine.account import phase_flops_of, step_flops_of, trainable_and_frozen
from stackwise_jax.engine.step import train_step
from stackwise_jax.model import regroup, run_stacks, size_of

SHAPE = (
    "model.d_model=128",
    "model.n_heads=4",
    "model.d_ff=384",
    "data.seq_len=64",
    "model.architecture.n_stacks=3",
    "model.architecture.blocks_per_stack=2",
    "curriculum.plan=custom",
    "optimizer.name=sgd",
)
PHASES = {
    "rackwise": "train: [0, 1, 2], train_embed: true",
    "frozen prefix": "train: [2]",
    "frozen suffix": "train: [0], train_embed: true, train_head: false",
    "train in the middle": "train: [1], train_head: false",
    "adapters alone": "adapt: [0, 1, 2], train_head: false",
    "adapted trunk": "adapt: [0, 1], train: [2]",
}


OPTIONS = {
    "rackwise, microbatches": ("rackwise", "optimizer.microbatches=2"),
    "frozen suffix, recomputed": ("frozen suffix", "model.remat=true"),
    "adapters alone, few predictions": ("adapters alone", "objective.kind=mlm"),
    "train in the middle, tied": ("train in the middle", "model.tie_embeddings=true"),
}


def parts_of(name, *changes):
    return step_parts(tiny(*SHAPE, f"curriculum.phases=[{{{PHASES[name]}}}]", *changes))


def counted(function, *args):
    """FLOPs of a program by XLA; lowering leaves the products as they are."""
    analysis = jax.jit(function).lower(*args).cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def xla_flops(parts):
    """FLOPs of the engine's step and of the prefix whose output it is given."""
    rack, prefix, total = parts.setup.rack, parts.phase.prefix, 0.0
    data = parts.data
    if prefix:
        hidden = jax.ShapeDtypeStruct((*data.examples.tokens_BT.shape, rack.d_model), "float32")
        run = functools.partial(run_stacks, [rack.stacks[i] for i in prefix])
        total, data = counted(run, [parts.weights.full(i) for i in prefix], hidden), data._replace(hidden_BTD=hidden)
    step = functools.partial(train_step, parts.spec)
    return total + counted(step, parts.state(), parts.frozen, data, parts.constants)


@pytest.mark.parametrize("name", [*PHASES, *OPTIONS])
def test_the_formula_is_within_5_percent_of_the_engines_own_step(name, monkeypatch):
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    parts = parts_of(*OPTIONS.get(name, (name,)))
    rack, data = parts.setup.rack, parts.setup.config.data
    formula = step_flops_of(rack, data)((2, 2, 2), parts.phase)
    assert formula == pytest.approx(xla_flops(parts), rel=0.05)
    assert phase_flops_of(rack, parts.phase, data, cached_batches=None) == parts.phase.steps * formula


def test_the_rack_is_regrouped_to_the_sizes_and_answers_are_remembered():
    parts = parts_of("train in the middle")
    rack, data = parts.setup.rack, parts.setup.config.data
    flops, short = step_flops_of(rack, data), dataclasses.replace(parts.phase, path=(0, 1), train=frozenset({1}))
    for sizes in ((2, 2, 2), (4, 2), (1, 1, 4)):
        expected = phase_flops_of(regroup(rack, sizes), short, data, cached_batches=None)
        assert flops(sizes, short) * short.steps == expected
    assert flops((4, 2), short) > flops((2, 2, 2), short) > flops((1, 1, 4), short)
    longer = dataclasses.replace(short, steps=10 * short.steps)
    assert flops((4, 2), longer) == flops((4, 2), short)
    begin = time.perf_counter()
    for _ in range(10_000):
        flops((4, 2), longer)
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("name", PHASES)
def test_what_learns_is_counted_as_the_step_holds_it(name):
    parts = parts_of(name)
    trainable, fixed = trainable_and_frozen(parts.setup.rack, parts.phase)
    assert trainable == size_of(parts.learning)
    trees = parts.weights.trees
    adapters = [split_adapters(trees[item])[0] for item in trees if item.startswith("adapters/")]
    assert trainable + fixed == size_of([tree for item, tree in trees.items() if "adapters" not in item] + adapters)
