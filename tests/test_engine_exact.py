"""What has to be equal, bit by bit where the same numbers are computed on one device.

Legend: B batch, T sequence, D d_model, V vocabulary, k predicted positions per sequence.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import leaves, metrics, same_bits, saved, step_parts, summary, tiny, train

from stackwise_jax.config.schema import CacheConfig
from stackwise_jax.engine import load_rack, prepare
from stackwise_jax.engine import step as step_module
from stackwise_jax.engine.prefix import Prefix, PrefixCache, put_examples
from stackwise_jax.engine.programs import bare, embed_examples, run_stack
from stackwise_jax.engine.resident import constants_of
from stackwise_jax.engine.step import batch_gradients, token_loss
from stackwise_jax.engine.weights import EMBED, Weights, stack_item
from stackwise_jax.evaluation import evaluate_run, held_out_text
from stackwise_jax.kernels.cross_entropy import linear_cross_entropy
from stackwise_jax.model import concat_blocks, final_hidden, head_kernel
from stackwise_jax.model import logits as head_logits
from stackwise_jax.objectives import Examples, max_targets

pytestmark = pytest.mark.optimized

OBJECTIVES = {
    "clm": [],
    "mlm": ["objective.kind=mlm", "objective.corruption=fixed"],
    "bf16": ["model.compute_dtype=bf16"],
}
# The gradient of a whole batch is a quotient of sums: rows of unlike length make a mean of means another number.
LENGTHS = {0: [16], 1: [9, 5], 2: [3], 3: [2, 2]}


def packed_examples(seq_len: int = 16) -> Examples:
    """Four rows that hold one or two documents of very unlike length, then padding."""
    rng = np.random.default_rng(0)
    tokens_BT, segment_ids_BT, positions_BT = np.zeros((3, len(LENGTHS), seq_len), np.int32)
    for row, lengths in LENGTHS.items():
        start = 0
        for document, length in enumerate(lengths, 1):
            place = slice(start, start + length)
            tokens_BT[row, place] = rng.integers(40, 120, length)
            segment_ids_BT[row, place] = document
            positions_BT[row, place] = np.arange(length)
            start += length
    return Examples(tokens_BT, segment_ids_BT, positions_BT, np.arange(len(LENGTHS), dtype=np.int32))


# The prefix.


@pytest.mark.parametrize("kind", ["host", "disk"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_cached_chunk_is_what_the_prefix_computes(objective, kind, tmp_path):
    config = tiny("model.architecture.n_stacks=4", "curriculum.steps=5", *OBJECTIVES[objective])
    setup = prepare(config, tmp_path)
    loader, placement = setup.loader(fixed=True), setup.placement
    weights = Weights(setup.rack, placement, None, placement.put(jax.random.key(0), placement.replicated))
    for item in [EMBED, *map(stack_item, range(4))]:
        weights.ensure(item, "fp32")
    cache = PrefixCache(CacheConfig(kind=kind), placement, tmp_path)
    visit = placement.put(np.int32(0), placement.replicated)
    advanced = []
    for phase in setup.plan.phases[1:]:
        task = setup.task(phase)
        key = constants_of(placement, phase.seed, 0, setup.tokenizer.token_bytes)["corruption_key"]
        prefix = Prefix(weights, phase, task, placement, key)
        advanced.append(cache.prepare(prefix, weights, phase, loader, kind, "text"))
        ids = [loader.batch_id(i) for i in range(phase.steps)]
        for batch_id, cached_BTD in zip(ids, cache.read(ids), strict=True):
            computed_BTD = prefix(put_examples(placement, loader.examples(batch_id)), visit)
            assert computed_BTD.dtype == (jnp.bfloat16 if objective == "bf16" else jnp.float32)
            assert same_bits(cached_BTD, computed_BTD)
    assert advanced == [None, 1, 1]
    assert {name for name, size in cache.bytes.items() if size} == {kind}
    cache.close()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_on_the_cache_is_training_on_the_recomputed_prefix(objective, tmp_path):
    phases = "curriculum.phases=[{path: [0, 1], train: [1]}]"
    found = {}
    for kind in ("recompute", "host", "disk"):
        config = tiny("curriculum.plan=custom", phases, f"cache.kind={kind}", *OBJECTIVES[objective])
        train(config, tmp_path / kind)
        used = {name for name, size in summary(tmp_path / kind)["phases"][0]["cache_bytes"].items() if size}
        assert used == ({kind} - {"recompute"})
        found[kind] = (tmp_path / kind / "metrics.jsonl").read_bytes(), saved(tmp_path / kind)
    for kind in ("host", "disk"):
        assert found[kind][0] == found["recompute"][0]
        assert same_bits(found[kind][1], found["recompute"][1])


# Plans that are the same training.


def without_names(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in ("phase", "depth")} for row in rows]


def test_stackwise_with_one_stack_is_rackwise(tmp_path):
    for plan in ("stackwise", "rackwise"):
        train(tiny(f"curriculum.plan={plan}", "model.architecture.n_stacks=1"), tmp_path / plan)
    assert without_names(metrics(tmp_path / "stackwise")) == without_names(metrics(tmp_path / "rackwise"))
    assert same_bits(saved(tmp_path / "stackwise"), saved(tmp_path / "rackwise"))


def test_grouping_of_the_blocks_does_not_change_rackwise_training(tmp_path):
    trained = {}
    for stacks, blocks in ((4, 1), (1, 4), (2, 2)):
        run_dir = tmp_path / f"{stacks}x{blocks}"
        depth = [f"model.architecture.n_stacks={stacks}", f"model.architecture.blocks_per_stack={blocks}"]
        train(tiny("curriculum.plan=rackwise", *depth), run_dir)
        items = saved(run_dir)
        blocks_of = concat_blocks([items.pop(stack_item(i)) for i in range(stacks)])
        trained[stacks] = without_names(metrics(run_dir)), items | {"blocks": blocks_of}
    for other in (1, 2):
        assert trained[other][0] == trained[4][0]
        assert same_bits(trained[other][1], trained[4][1])


def test_the_same_configuration_gives_the_same_bits_and_another_seed_others(tmp_path):
    plan = ["objective.kind=mlm", "model.dropout=0.1"]
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        train(tiny(f"run.seed={seed}", *plan), tmp_path / name)
        jax.clear_caches()
    first, second, other = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("first", "second", "other"))
    assert first == second
    assert first != other
    assert same_bits(saved(tmp_path / "first"), saved(tmp_path / "second"))
    hidden = [step_parts(tiny(f"run.seed={n}", *plan), examples=packed_examples()).batch() for n in (1, 2)]
    assert not same_bits(hidden[0].weights_BT, hidden[1].weights_BT)


# Gradients.


@pytest.mark.parametrize("objective", ["clm", "mlm", "diffusion"])
def test_microbatches_give_the_gradient_of_the_full_batch(objective):
    noise = ["objective.noise=elbo"] if objective == "diffusion" else ["objective.mask_fraction=0.4"]
    parts = step_parts(
        tiny("curriculum.plan=rackwise", "model.architecture.n_stacks=1", f"objective.kind={objective}", *noise),
        examples=packed_examples(),
    )
    batch = parts.batch()
    counts_B = np.asarray(batch.counts_BT.sum(axis=1))
    assert counts_B[0::2].sum() != counts_B[1::2].sum()

    @partial(jax.jit, static_argnums=0)
    def gradients(n, learning, frozen, batch):
        spec = dataclasses.replace(parts.spec, microbatches=n)
        return batch_gradients(spec, learning, frozen, batch, None, None)

    sums, grads = gradients(1, parts.learning, parts.frozen, batch)
    for n in (2, 4):
        sums_n, grads_n = gradients(n, parts.learning, parts.frozen, batch)
        assert sums_n["correct"] == sums["correct"]
        np.testing.assert_allclose(sums_n["nll"], sums["nll"], rtol=1e-6)
        for name, full in leaves(grads).items():
            assert np.abs(full).max() > 0, name
            np.testing.assert_allclose(leaves(grads_n)[name], full, rtol=1e-5, atol=1e-5 * np.abs(full).max())


@pytest.mark.parametrize("objective", ["mlm", "diffusion"])
def test_the_head_sees_only_positions_that_carry_weight(objective, monkeypatch):
    fraction = "objective.max_fraction=0.4"
    parts = step_parts(tiny(f"objective.kind={objective}", fraction), examples=packed_examples())
    task, batch, rack = parts.spec.task, parts.batch(), parts.spec.task.rack
    head, embed = parts.learning["head"], parts.learning["embed"]
    x_BTD = jax.random.normal(jax.random.key(0), (4, 16, 32))
    shapes = []

    def spy(x, *args, **kwargs):
        shapes.append(x.shape)
        return linear_cross_entropy(x, *args, **kwargs)

    def everywhere(x_BTD, head):
        hidden_BTD, kernel_DV = final_hidden(rack, head, x_BTD), head_kernel(rack, head, embed)
        reference = {"n_valid": task.vocab.size, "implementation": "reference"}
        nll, stats = linear_cross_entropy(hidden_BTD, kernel_DV, batch.targets_BT, batch.weights_BT, **reference)
        return nll, stats["correct"]

    monkeypatch.setattr(step_module, "linear_cross_entropy", spy)
    gathered = lambda x_BTD, head: token_loss(task, head, embed, x_BTD, batch, train_kernel=True)
    (nll, correct), grads = jax.value_and_grad(gathered, argnums=(0, 1), has_aux=True)(x_BTD, head)
    (full_nll, full_correct), full_grads = jax.value_and_grad(everywhere, argnums=(0, 1), has_aux=True)(x_BTD, head)
    k = max_targets(task.objective, task.noise, 16)
    assert k < 16 and int((batch.weights_BT > 0).sum(axis=1).max()) <= k
    assert shapes == [(4, k, 32)]
    assert correct == full_correct
    np.testing.assert_allclose(nll, full_nll, rtol=1e-6)
    for name, full in leaves(full_grads).items():
        np.testing.assert_allclose(leaves(grads)[name], full, atol=1e-5 * np.abs(full).max(), err_msg=name)
    hidden_from_loss_BT = np.asarray(batch.weights_BT) == 0
    assert not np.asarray(grads[0])[hidden_from_loss_BT].any()


# The model that is handed back.


@pytest.mark.parametrize("frozen", ["fp32", "bf16"])
def test_the_model_handed_back_is_the_model_that_was_trained(frozen, tmp_path):
    run = train(tiny("model.architecture.n_stacks=3", f"curriculum.frozen={frozen}"), tmp_path / "run")
    loaded = load_rack(tmp_path / "run")
    trees = run.weights.trees
    in_memory = {
        "embed": run.weights.on_device("embed"),
        "head": trees["head"],
        "stacks": {f"{i:03d}": run.weights.on_device(stack_item(i)) for i in range(3)},
    }
    stored = {
        name: {leaf.dtype.name for leaf in jax.tree.leaves(tree)} for name, tree in loaded.params["stacks"].items()
    }
    trunk = {"bfloat16"} if frozen == "bf16" else {"float32"}
    assert stored == {"000": trunk, "001": trunk, "002": {"float32"}}
    assert same_bits(loaded.params, in_memory)

    examples = put_examples(run.placement, run.loader.batch(0))
    apply = jax.jit(lambda params: loaded.rack.apply({"params": params}, *examples[:1], examples[2], examples[1]))
    logits_BTV = apply(loaded.params)
    assert same_bits(logits_BTV, apply(in_memory))

    task = run.setup.task(run.phases[-1])
    key, visit = run.placement.put((jax.random.key(0), np.int32(0)), run.placement.replicated)
    x_BTD = embed_examples(task, in_memory["embed"], examples, key, visit)
    for i, stack in enumerate(run.setup.rack.stacks):
        x_BTD = run_stack(task, bare(stack), in_memory["stacks"][f"{i:03d}"], x_BTD, examples)
    top = jax.jit(partial(head_logits, task.rack))
    assert same_bits(top(trees["head"], in_memory["embed"], x_BTD), logits_BTV)


@pytest.mark.parametrize("objective", ["clm", "mlm", "diffusion"])
def test_evaluation_at_each_depth_is_what_its_phase_ended_with(objective, tmp_path):
    noise = ["objective.noise=elbo"] * (objective == "diffusion")
    formats = ["curriculum.frozen=bf16"] * (objective == "clm")
    train(tiny("model.architecture.n_stacks=3", f"objective.kind={objective}", *noise, *formats), tmp_path / "run")
    phases = summary(tmp_path / "run")["phases"]
    assert len({phase["held_out_loss"] for phase in phases}) == 3
    for depth, phase in enumerate(phases, 1):
        loaded = load_rack(tmp_path / "run", depth=depth)
        result = evaluate_run(loaded, held_out_text(loaded), limit=2)
        assert result["loss"] == pytest.approx(phase["held_out_loss"], rel=1e-6)
        assert result["bits_per_byte"] == pytest.approx(phase["bits_per_byte"], rel=1e-6)
        assert result["accuracy"] == pytest.approx(phase["accuracy"], abs=1e-6)
