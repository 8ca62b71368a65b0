"""What the plans do when they run: what is equal, what goes on over a phase border, and what is compiled.

Legend: B batch, T sequence, D d_model.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from tiny import leaves, losses, metrics, same_bits, saved, step_parts, summary, tiny, train

from stackwise_jax.checkpoint import Store
from stackwise_jax.engine import Run, load_experts, load_rack, prepare
from stackwise_jax.engine.carry import item_state, join_state
from stackwise_jax.engine.step import consistency_distance, window_loss
from stackwise_jax.engine.weights import EMBED, HEAD, learning_items, stack_item
from stackwise_jax.errors import UsageError
from stackwise_jax.evaluation import evaluate_experts, evaluate_run, held_out_text

DIFFUSION = ["objective.kind=diffusion", "objective.noise=elbo"]
# Plan -> what it needs beside its name, and how many training steps it compiles for four stacks (docs/curricula.md).
PLANS = {
    "rackwise": ([], 1),
    "stackwise": ([], 2),
    "layerwise": (["model.architecture.blocks_per_stack=2", "model.architecture.n_stacks=2"], 2),
    "blockwise": (["model.architecture.n_stacks=4"], 2),
    "append": ([], 2),
    "prepend": ([], 4),
    "grow": ([], 4),
    "keep_last": ([], 2),
    "cycle": (["curriculum.rounds=2"], 4),
    "independent": (DIFFUSION, 4),
    "overlap": (["curriculum.plan=append", "curriculum.overlap=1"], 3),
    "adapt": (["curriculum.plan=append", "curriculum.trunk=adapt"], 4),
    "fusion": (["curriculum.learn=[1, 3]"], 1),
    "joint": ([], 1),
}


def rows(run_dir) -> list[dict]:
    """metrics.jsonl without the names of phases and what counts them."""
    drop = ("phase", "depth", "step", "lr")
    return [{name: value for name, value in row.items() if name not in drop} for row in metrics(run_dir)]


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_runs_compiles_what_the_docs_say_and_leaves_a_rack(plan, tmp_path):
    changes, compiled = PLANS[plan]
    name = [] if plan in ("overlap", "adapt") else [f"curriculum.plan={plan}"]
    run = train(tiny("model.architecture.n_stacks=4", *name, *changes), tmp_path / "run")
    assert run.programs.compilations == compiled
    assert all(np.isfinite(losses(tmp_path / "run")))
    loaded = load_experts(tmp_path / "run")
    stacks = [stack for expert in loaded for stack in expert.path]
    assert sorted(stacks) == list(range(len(run.setup.rack.stacks)))


class Gradients(Run):
    """A run that keeps what each phase has found after one step of sgd without clipping: the momentum, which is the
    gradient."""

    def _loop(self, work, executor, start):
        learned = super()._loop(work, executor, start)
        self.found = [*getattr(self, "found", []), leaves(carried(work.phase, executor))]
        return learned


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_streamed_is_the_plan_resident(plan, tmp_path):
    """Weights and optimizer state that come and go stack by stack give the training of those that stay."""
    changes, _ = PLANS[plan]
    name = [] if plan in ("overlap", "adapt") else [f"curriculum.plan={plan}"]
    changes = ["curriculum.learn=[0, 2]" if change.startswith("curriculum.learn") else change for change in changes]
    changes += ["optimizer.name=sgd", "optimizer.grad_clip=0", "curriculum.steps=1"]
    runs = {"resident": [], "streamed": ["memory.offload=all", "memory.stack_inputs=host"]}
    gradients = {}
    for how, memory in runs.items():
        config = tiny("model.architecture.n_stacks=3", *name, *changes, *memory)
        run = Gradients(prepare(config, tmp_path / how))
        run.train()
        gradients[how] = run.found
    assert np.allclose(losses(tmp_path / "resident"), losses(tmp_path / "streamed"), rtol=1e-6)
    for a, b in zip(gradients["resident"], gradients["streamed"], strict=True):
        assert a.keys() == b.keys() and any(np.abs(x).max(initial=0) > 1e-4 for x in a.values())
        for where, x in a.items():
            assert np.linalg.norm(x - b[where]) <= 1e-6 * np.linalg.norm(x), where
    resident, streamed = leaves(saved(tmp_path / "resident")), leaves(saved(tmp_path / "streamed"))
    assert resident.keys() == streamed.keys()
    for where, x in resident.items():
        assert np.linalg.norm(x - streamed[where]) <= 1e-6 * np.linalg.norm(x), where


# Plans that are the same training.


@pytest.mark.parametrize(
    "plan", [["prepend", "curriculum.stacks_per_stage=[2]"], ["grow", "curriculum.stacks_per_stage=[2]"], ["joint"]]
)
def test_a_plan_of_one_stage_is_rackwise(plan, tmp_path):
    name, *changes = plan
    train(tiny(f"curriculum.plan={name}", *changes), tmp_path / "plan")
    train(tiny("curriculum.plan=rackwise"), tmp_path / "rackwise")
    assert rows(tmp_path / "plan") == rows(tmp_path / "rackwise")
    assert same_bits(saved(tmp_path / "plan"), saved(tmp_path / "rackwise"))


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon", "adafactor"])
def test_cycling_over_one_stack_is_rackwise(optimizer, tmp_path):
    """Two turns of three steps are one phase of six: weights, optimizer state and data all go on."""
    common = ["model.architecture.n_stacks=1", "optimizer.schedule=constant", "optimizer.warmup=0"]
    common += [f"optimizer.name={optimizer}"]
    train(tiny("curriculum.plan=cycle", "curriculum.rounds=2", *common), tmp_path / "cycle")
    train(tiny("curriculum.plan=rackwise", "curriculum.steps=6", *common), tmp_path / "rackwise")
    assert losses(tmp_path / "cycle") == losses(tmp_path / "rackwise")
    assert same_bits(saved(tmp_path / "cycle"), saved(tmp_path / "rackwise"))


def test_without_its_optimizer_state_a_second_turn_is_another_training(tmp_path):
    common = ["model.architecture.n_stacks=1", "optimizer.schedule=constant", "optimizer.warmup=0"]
    for state in ("keep", "reset"):
        plan = ["curriculum.plan=cycle", "curriculum.rounds=2", f"curriculum.optimizer_state={state}"]
        train(tiny(*plan, *common), tmp_path / state)
    assert losses(tmp_path / "keep")[:4] == losses(tmp_path / "reset")[:4]
    assert losses(tmp_path / "keep")[4:] != losses(tmp_path / "reset")[4:]


# Growing.


def carried(phase, executor) -> dict:
    """The optimizer state of each item that learns."""
    return jax.device_get({item: executor.carried(item) for item in learning_items(phase)})


def test_optimizer_state_survives_growth_and_a_turn_away(tmp_path):
    """grow: the first stack's moments go on; cycle: they wait while others learn."""
    seen = []

    class Spy(Run):
        def _loop(self, work, executor, start):
            seen.append((work.phase, carried(work.phase, executor)))
            learned = super()._loop(work, executor, start)
            seen.append((work.phase, carried(work.phase, executor)))
            return learned

    for plan in ("grow", "cycle"):
        seen.clear()
        changes = [f"curriculum.plan={plan}", "model.architecture.n_stacks=3", "curriculum.rounds=2"]
        changes = changes if plan == "cycle" else changes[:2]
        Spy(prepare(tiny(*changes), tmp_path / plan)).train()
        last: dict = {}
        kept = 0
        for moment, (phase, state) in enumerate(seen):
            if moment % 2:
                last |= state
                continue
            for item, leaves_of in state.items():
                if item in last:
                    own = {n: x for n, x in leaves_of.items() if "count" not in n}
                    assert same_bits(own, {n: last[item][n] for n in own}), (plan, phase.name, item)
                    kept += 1
                else:
                    assert not any(np.any(x) for n, x in leaves_of.items() if "count" not in n)
        assert kept >= 3


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor", "sgd"])
def test_optimizer_state_is_cut_into_items_and_put_together_again(name):
    parts = step_parts(tiny("curriculum.plan=rackwise", "model.architecture.n_stacks=3", f"optimizer.name={name}"))
    state = parts.compiled()(parts.state(), parts.frozen, parts.data, parts.constants)[0]
    layout = parts.window.layout
    split = lambda opt: {item: item_state(opt, layout, item) for item in learning_items(parts.phase)}
    items = split(state.opt)
    assert len(items) == 5 and all(items.values())
    fresh = parts.state().opt
    joined = join_state(fresh, layout, items)
    assert same_bits(joined, state.opt)
    without = {item: leaves_of for item, leaves_of in items.items() if item != stack_item(1)}
    again = split(join_state(fresh, layout, without))
    assert same_bits(again[stack_item(0)], items[stack_item(0)])
    begun = {n: x for n, x in split(fresh)[stack_item(1)].items() if "blocks" in n}
    assert begun or name == "adafactor"
    assert same_bits({n: again[stack_item(1)][n] for n in begun}, begun)


def at_start(run_dir, phase: int) -> dict:
    """The items as they were when the phase began (before its first step), from a run that keeps every version."""
    store = Store(run_dir / "checkpoints", keep=100)
    records = [store.read(number) for number in store.records()]
    return next(record for record in records if record.phase == phase and record.step == 0).versions


@pytest.mark.parametrize("init", ["random", "copy", "zero"])
def test_new_stacks_begin_as_asked(init, tmp_path):
    begun = {}

    class Spy(Run):
        def _loop(self, work, executor, start):
            loss = self._held_out(work, *executor.evaluated())["loss"]
            begun[work.phase.path] = jax.device_get(executor.learned()), loss
            return super()._loop(work, executor, start)

    changes = ["curriculum.plan=grow", "model.architecture.n_stacks=3", "curriculum.stacks_per_stage=[1, 2]"]
    Spy(prepare(tiny(*changes, f"curriculum.init={init}"), tmp_path / "run")).train()
    trees, loss = begun[0, 1, 2]
    before = summary(tmp_path / "run")["phases"][0]["held_out_loss"]
    old, new = leaves(trees[stack_item(0)]), [leaves(trees[stack_item(i)]) for i in (1, 2)]
    if init == "copy":
        assert all(same_bits(trees[stack_item(i)], trees[stack_item(0)]) for i in (1, 2))
    else:
        assert not same_bits(new[0], new[1])
    for path in old:
        written = "'o'" in path or "'down'" in path
        assert all((not tree[path].any()) == (init == "zero" and written) for tree in new), path
    # Identity at birth: the loss goes on where it was.
    assert (loss == pytest.approx(before, abs=1e-6)) == (init == "zero")


def test_prepend_copies_the_stack_behind_it(tmp_path):
    begun = {}

    class Spy(Run):
        def _loop(self, work, executor, start):
            begun[work.phase.path] = jax.device_get(executor.learned())
            return super()._loop(work, executor, start)

    Spy(prepare(tiny("curriculum.plan=prepend", "curriculum.init=copy"), tmp_path / "run")).train()
    source = saved(tmp_path / "run", at_start(tmp_path / "run", 1))[stack_item(1)]
    assert same_bits(begun[0, 1][stack_item(0)], source)


# Consistency.


def test_consistency_pulls_the_new_stack_to_what_the_suffix_knows(tmp_path):
    distances = {}
    for weight in (1e-6, 10.0):
        changes = ["curriculum.plan=prepend", f"curriculum.consistency={weight}", "curriculum.steps=12"]
        train(tiny(*changes, "optimizer.weight_decay=0"), tmp_path / str(weight))
        found = [row["consistency"] for row in metrics(tmp_path / str(weight)) if "consistency" in row]
        assert len(found) == 12  # in the second phase only: the first has no suffix
        distances[weight] = found
    assert distances[1e-6][0] == distances[10.0][0] > 0
    assert distances[10.0][-1] < 0.5 * distances[1e-6][-1]


def test_the_distance_counts_real_tokens():
    x_BTD = jax.random.normal(jax.random.key(0), (2, 4, 8))
    segments_BT = np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert consistency_distance(x_BTD, x_BTD, segments_BT) == 0
    assert consistency_distance(2 * x_BTD, x_BTD, segments_BT) == pytest.approx(6.0, rel=1e-5)


def test_microbatches_give_the_same_consistency_gradient():
    parts = step_parts(tiny("curriculum.plan=prepend", "curriculum.consistency=0.5"), index=1)
    found = {}
    for n in (1, 2):
        spec = dataclasses.replace(parts.spec, microbatches=n)
        from stackwise_jax.engine.step import batch_gradients

        batch = parts.batch()
        call = lambda a, b, c, spec=spec: batch_gradients(spec, a, b, c, None, None, c)
        found[n] = jax.jit(call)(parts.learning, parts.frozen, batch)
    assert found[1][0]["distance"] > 0
    np.testing.assert_allclose(found[1][0]["distance"], found[2][0]["distance"], rtol=1e-5)
    for name, full in leaves(found[1][1]).items():
        np.testing.assert_allclose(leaves(found[2][1])[name], full, rtol=2e-5, atol=1e-5 * np.abs(full).max())


def test_the_gradient_flows_through_a_frozen_suffix_and_does_not_change_it(tmp_path):
    train(tiny("curriculum.plan=prepend", "model.architecture.n_stacks=3"), tmp_path / "run")
    first, last = (saved(tmp_path / "run", at_start(tmp_path / "run", phase)) for phase in (1, 2))
    end = saved(tmp_path / "run")
    assert same_bits(first[stack_item(2)], end[stack_item(2)])
    assert same_bits(last[stack_item(1)], end[stack_item(1)])
    assert not same_bits(first[EMBED], end[EMBED]) and not same_bits(first[HEAD], end[HEAD])
    parts = step_parts(tiny("curriculum.plan=prepend"), index=1)
    grad = jax.grad(lambda tree: window_loss(parts.spec, tree, parts.frozen, parts.batch(), None, None)[0])
    moved = leaves(grad(parts.learning)["stacks"][0])
    assert moved and all(np.abs(values).max() > 0 for values in moved.values())


# Compositions, settings of single stages.


def test_plans_run_one_after_another_on_the_same_stacks(tmp_path):
    plans = "[{plan: append, share: 0.8}, {plan: joint, share: 0.2}]"
    config = tiny("curriculum.steps=200", f"curriculum.plans={plans}", "curriculum.budget=20 steps")
    train(config, tmp_path / "run")
    phases = summary(tmp_path / "run")["phases"]
    assert [round(phase["tokens"] / 64) for phase in phases] == [8, 8, 4]
    before, end = saved(tmp_path / "run", at_start(tmp_path / "run", 2)), saved(tmp_path / "run")
    assert not any(same_bits(before[item], end[item]) for item in (EMBED, HEAD, stack_item(0), stack_item(1)))


def test_stages_have_their_own_optimizer_objective_and_format(tmp_path):
    stages = "[{objective: {kind: mlm}}, {optimizer: {name: lion, lr: 1e-4}, frozen: bf16, objective: {kind: clm}}]"
    run = train(tiny(f"curriculum.stages={stages}"), tmp_path / "run")
    first, second = run.phases
    assert (first.objective.kind, second.objective.kind) == ("mlm", "clm")
    assert (first.optimizer.name, second.optimizer.name) == ("adamw", "lion")
    assert run.weights.formats[stack_item(0)] == "bf16"
    table = ["curriculum.plan=append", "model.architecture.n_stacks=3", "curriculum.frozen_stacks=[bf16, fp32, fp32]"]
    run = train(tiny(*table), tmp_path / "table")
    assert [run.weights.formats[stack_item(i)] for i in range(3)] == ["bf16", "fp32", "fp32"]


def test_a_budget_of_flops_is_what_two_plans_spend(tmp_path):
    spent = {}
    for plan in ("rackwise", "append", "prepend", "grow"):
        config = tiny(f"curriculum.plan={plan}", "curriculum.budget=4e8 flops", "cache.kind=recompute")
        train(config, tmp_path / plan)
        spent[plan] = summary(tmp_path / plan)["flops"]
    step = spent["rackwise"] / round(summary(tmp_path / "rackwise")["tokens"] / 64)
    assert all(abs(flops - 4e8) <= step for flops in spent.values()), spent


# Independent stacks.


def test_independent_stacks_keep_their_own_ends_and_add_up_to_one_bound(tmp_path):
    config = tiny("curriculum.plan=independent", *DIFFUSION, "model.architecture.n_stacks=3", "run.eval_batches=0")
    train(config, tmp_path / "run")
    experts = load_experts(tmp_path / "run")
    assert [expert.path for expert in experts] == [(0,), (1,), (2,)]
    heads = [expert.params["head"]["kernel"] for expert in experts]
    assert not same_bits(heads[0], heads[1]) and not same_bits(heads[1], heads[2])
    text = held_out_text(experts[0])
    whole = evaluate_experts(experts, text, draws=2)
    phases = summary(tmp_path / "run")["phases"]
    parts = sum(phase["bits_per_byte"] for phase in phases)
    assert whole["bits_per_byte"] == pytest.approx(parts, rel=0.05)
    assert whole["standard_error"] > 0
    assert load_rack(tmp_path / "run").path == (2,)


def test_the_bound_does_not_depend_on_the_order_of_batches(tmp_path, monkeypatch):
    from stackwise_jax.evaluation import held_out as module

    train(tiny("curriculum.plan=rackwise", *DIFFUSION), tmp_path / "run")
    loaded = load_rack(tmp_path / "run")
    text = held_out_text(loaded)
    straight = evaluate_run(loaded, text, limit=12, draws=3)
    batches = module.held_out_batches
    monkeypatch.setattr(module, "held_out_batches", lambda *args: iter(list(batches(*args))[::-1]))
    backward = evaluate_run(loaded, text, limit=12, draws=3)
    assert backward["bits_per_byte"] == pytest.approx(straight["bits_per_byte"], rel=1e-12)
    assert straight["standard_error"] > 0


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["curriculum.plan=grow", "curriculum.init=copy"], ["stack 1", "copy of stack 0", "another shape"]),
    ],
)
def test_a_copy_of_another_shape_is_refused(changes, words, tmp_path):
    from stackwise_jax.model import create_block_spec, create_rack_from_specs

    block = lambda d_ff: create_block_spec(32, d_ff, 2)
    specs = [{"n_blocks": 1, "block_spec": block(48)}, {"n_blocks": 1, "block_spec": block(64)}]
    rack = create_rack_from_specs(384, 32, specs, tie_embeddings=False)
    with pytest.raises(UsageError) as error:
        prepare(tiny(*changes), tmp_path, rack)
    assert all(word in str(error.value) for word in words), str(error.value)
