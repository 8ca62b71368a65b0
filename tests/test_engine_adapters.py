"""Adapters in a run: what learns, what stays, merging, and where they can be taken from and put."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import leaves, losses, metrics, same_bits, saved, step_parts, summary, tiny, train

from stackwise_jax.checkpoint import Store
from stackwise_jax.engine import Run, load_rack, prepare
from stackwise_jax.engine.source import Source
from stackwise_jax.engine.step import window_loss
from stackwise_jax.engine.weights import EMBED, HEAD, learning_items, stack_item
from stackwise_jax.errors import UsageError

QLORA = ["curriculum.plan=append", "curriculum.trunk=adapt", "model.architecture.n_stacks=3"]
CUSTOM = """[
  {name: base, path: [0, 1], train: [0, 1], train_embed: true},
  {name: adapt, path: [0, 1], adapt: [0, 1], train_head: false},
]"""


def at_start(run_dir: Path, phase: int) -> dict[str, int]:
    store = Store(run_dir / "checkpoints", keep=100)
    records = [store.read(number) for number in store.records()]
    return next(record for record in records if record.phase == phase and record.step == 0).versions


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    """A run of two phases: everything learns, then only adapters do."""
    run_dir = tmp_path_factory.mktemp("adapted") / "run"
    train(tiny("curriculum.plan=custom", f"curriculum.phases={CUSTOM}", "optimizer.weight_decay=0"), run_dir)
    return run_dir


def test_only_the_adapters_of_an_adapted_stack_learn(adapted):
    before, end = saved(adapted, at_start(adapted, 1)), saved(adapted)
    items = [item for item in end if item.startswith("adapters/")]
    assert len(items) >= 2
    for item in (EMBED, HEAD, stack_item(0), stack_item(1)):
        assert same_bits(before[item], end[item]), item
    for item in items:
        for path, values in leaves(end[item]).items():
            if "'b'" in path:
                assert np.abs(values).max() > 0, path


def test_adapters_at_zero_change_nothing(adapted, tmp_path):
    """The loss of the first adapted step is, to the bit, that of the same step without adapters."""
    plain = CUSTOM.replace("adapt: [0, 1], train_head: false", "train: [0], train_head: false")
    train(tiny("curriculum.plan=custom", f"curriculum.phases={plain}", "optimizer.weight_decay=0"), tmp_path / "plain")
    assert losses(adapted)[:4] == losses(tmp_path / "plain")[:4]
    assert losses(adapted)[4:] != losses(tmp_path / "plain")[4:]


def test_the_trunk_learns_through_adapters_while_stacks_are_appended(tmp_path):
    run = train(tiny(*QLORA, "curriculum.frozen=bf16"), tmp_path / "run")
    last = run.phases[-1]
    assert last.adapt == {0, 1} and last.train == {2} and not last.prefix
    items = saved(tmp_path / "run")
    adapters = {item for item in items if item.startswith("adapters/")}
    assert adapters == {"adapters/000/stack", "adapters/000/trunk", "adapters/001/stack", "adapters/001/trunk"}
    assert adapters <= set(learning_items(last))
    for item in adapters:
        assert any(np.abs(x).max() > 0 for path, x in leaves(items[item]).items() if "'b'" in path), item
    base = saved(tmp_path / "run", at_start(tmp_path / "run", 1))[stack_item(0)]
    assert same_bits(base, items[stack_item(0)])
    assert run.weights.formats[stack_item(0)] == "bf16"
    rank = {item: leaves(items[item])["['blocks']['attn']['q']['adapters']['" + item[-5:] + "']['a']"].shape[-1]
            for item in adapters}  # fmt: skip
    assert rank == {item: 8 if item.endswith("stack") else 4 for item in adapters}


def test_adapters_have_their_own_learning_rate(tmp_path):
    moved = {}
    for rate in ("1e-9", "1e-2"):
        train(tiny(*QLORA, f"curriculum.adapters.lr={rate}"), tmp_path / rate)
        moved[rate] = max(
            np.abs(values).max()
            for item, tree in saved(tmp_path / rate).items()
            if item.startswith("adapters/")
            for path, values in leaves(tree).items()
            if "'b'" in path
        )
    assert moved["1e-9"] < 1e-6 < 1e-3 < moved["1e-2"]


def test_adapter_dropout_drops_and_only_in_training(tmp_path):
    found = {}
    for share in (0.0, 0.5):
        phases = f"curriculum.phases={CUSTOM}"
        drop = f"curriculum.adapters.dropout={share}"
        train(tiny("curriculum.plan=custom", phases, drop, "curriculum.steps=4"), tmp_path / str(share))
        found[share] = losses(tmp_path / str(share))
    assert found[0.0][:5] == found[0.5][:5]  # in the first adapted step b is zero and dropping does nothing yet
    assert found[0.0][5:] != found[0.5][5:]
    loaded = load_rack(tmp_path / "0.5")
    tokens = np.arange(32).reshape(2, 16)
    assert same_bits(
        loaded.rack.apply({"params": loaded.params}, tokens), loaded.rack.apply({"params": loaded.params}, tokens)
    )


# Merging.


def test_merged_adapters_compute_what_unmerged_ones_do(adapted, tmp_path):
    from stackwise_jax.engine.convert import Changes, convert_run

    convert_run(Source(adapted), tmp_path / "merged", Changes(merge=True))
    apart, merged = load_rack(adapted), load_rack(tmp_path / "merged")
    tokens = np.arange(64).reshape(4, 16)
    a, b = (run.rack.apply({"params": run.params}, tokens) for run in (apart, merged))
    assert "adapters" in str(jax.tree.structure(apart.params)) and "adapters" not in str(
        jax.tree.structure(merged.params)
    )
    np.testing.assert_allclose(a, b, atol=1e-5)
    base = apart.rack.apply({"params": without_adapters(apart.params)}, tokens)
    assert np.abs(np.asarray(a - base)).max() > 1e-3


def without_adapters(tree):
    return {n: without_adapters(b) if isinstance(b, dict) else b for n, b in tree.items() if n != "adapters"}


def test_adapters_are_merged_and_made_anew_at_a_border(tmp_path):
    """ReLoRA: the base moves by what the adapters had learned, the loss goes on, and new adapters begin at zero."""
    started = {}

    class Spy(Run):
        def _loop(self, work, executor, start):
            loss = self._held_out(work, *executor.evaluated())["loss"]
            started[work.phase.name] = jax.device_get(executor.learned()), loss
            return super()._loop(work, executor, start)

    phases = CUSTOM[:-1] + "  {name: again, path: [0, 1], adapt: [0, 1], train_head: false, merge_adapters: true},\n]"
    Spy(prepare(tiny("curriculum.plan=custom", f"curriculum.phases={phases}"), tmp_path / "run")).train()
    before, end = saved(tmp_path / "run", at_start(tmp_path / "run", 2)), saved(tmp_path / "run")
    assert not same_bits(before[stack_item(0)], end[stack_item(0)])
    trees, loss = started["again"]
    previous = next(row for row in summary(tmp_path / "run")["phases"] if row["name"] == "adapt")["held_out_loss"]
    assert loss == pytest.approx(previous, abs=1e-5)
    for item, tree in trees.items():
        old = leaves(before[item])
        for path, values in leaves(tree).items():
            if "'b'" in path:
                assert not values.any()
            elif "'a'" in path:
                assert values.shape == old[path].shape and not np.array_equal(values, old[path])


def test_merging_at_a_border_is_not_done_twice_by_a_resumed_run(tmp_path):
    class Stop(Exception):
        pass

    class Stops(Run):
        def _on_metrics(self, work, step, metrics, seconds):
            super()._on_metrics(work, step, metrics, seconds)
            if work.phase.name == "again" and step == 2:
                raise Stop

    phases = CUSTOM[:-1] + "  {name: again, path: [0, 1], adapt: [0, 1], train_head: false, merge_adapters: true},\n]"
    config = tiny("curriculum.plan=custom", f"curriculum.phases={phases}", "run.save_every=2", "curriculum.steps=4")
    train(config, tmp_path / "whole")
    run = Stops(prepare(config, tmp_path / "cut"))
    with pytest.raises(Stop):
        run.train()
    run.recorder.close()
    train(config, tmp_path / "cut")
    assert same_bits(saved(tmp_path / "cut"), saved(tmp_path / "whole"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_what_a_merge_makes_does_not_depend_on_how_often_the_run_saves(tmp_path):
    phases = CUSTOM[:-1] + "  {name: again, path: [0, 1], adapt: [0, 1], train_head: false, merge_adapters: true},\n]"
    for every in (0, 1):
        config = tiny("curriculum.plan=custom", f"curriculum.phases={phases}", f"run.save_every={every}")
        train(config, tmp_path / str(every))
    assert losses(tmp_path / "0") == losses(tmp_path / "1")
    assert same_bits(saved(tmp_path / "0"), saved(tmp_path / "1"))


def test_merged_adapters_begin_without_the_optimizer_state_of_those_before(tmp_path):
    begun = {}

    class Spy(Run):
        def _loop(self, work, executor, start):
            if work.index == len(self.phases) - 1:
                begun.update({i: jax.device_get(executor.carried(i)) for i in learning_items(work.phase)})
            return super()._loop(work, executor, start)

    plan = [*QLORA, "curriculum.overlap=1", "curriculum.adapters.merge=true", "model.architecture.n_stacks=4"]
    Spy(prepare(tiny(*plan), tmp_path / "run")).train()
    moments = lambda item: [x for name, x in begun[item].items() if "adapters" in name or "blocks" in name]
    assert any(item.startswith("adapters/000") for item in begun)
    for item in begun:
        if item.startswith("adapters/"):
            assert not any(x.any() for x in moments(item)), item
    assert any(x.any() for x in moments(stack_item(2)))  # it goes on


def test_a_run_goes_on_with_its_adapters_apart(adapted, tmp_path):
    """init_from and load_from of one run: the weights as they are, the adapters beside them, nothing twice."""
    found = {}

    class Spy(Run):
        def _loop(self, work, executor, start):
            found["loss"] = self._held_out(work, *executor.evaluated())["loss"]
            found.update(jax.device_get(executor.learned()))
            return super()._loop(work, executor, start)

    both = [f"run.init_from={adapted}", f"curriculum.adapters.load_from={adapted}"]
    phases = "[{adapt: [0, 1], train_head: false}]"
    Spy(prepare(tiny("curriculum.plan=custom", f"curriculum.phases={phases}", *both), tmp_path / "run")).train()
    assert found["loss"] == pytest.approx(summary(adapted)["held_out_loss"], abs=1e-6)
    items = saved(adapted)
    assert same_bits(saved(tmp_path / "run")[stack_item(0)], items[stack_item(0)])
    assert same_bits(found["adapters/000/stack"], items["adapters/000/stack"])


# On another rack.


def test_adapters_are_put_on_another_rack_of_the_same_shape(adapted, tmp_path):
    started = {}

    class Spy(Run):
        def _loop(self, work, executor, start):
            started[work.phase.name] = jax.device_get(executor.learned())
            return super()._loop(work, executor, start)

    load = f"curriculum.adapters.load_from={adapted}"
    config = tiny("curriculum.plan=custom", f"curriculum.phases={CUSTOM}", load, "run.seed=7")
    Spy(prepare(config, tmp_path / "run")).train()
    theirs = saved(adapted)
    for item, tree in started["adapt"].items():
        assert same_bits(tree, theirs[item])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.d_model=64"], ["load_from", "d_model is 32 and here it is 64"]),
        (["model.d_ff=64"], ["load_from", "d_ff", "model.d_ff 48"]),
        (["curriculum.adapters.rank=3", "curriculum.adapters.trunk_rank=3"], ["rank 3", "adapters section"]),
        (["curriculum.adapters.alpha=64"], ["alpha 16", "alpha 64"]),
        (["curriculum.adapters.dropout=0.1"], ["dropout 0 on", "dropout 0.1 on"]),
        (["model.architecture.n_stacks=1", "curriculum.phases=[{adapt: [0]}]"], ["sits on", "load_from"]),
        (["curriculum.phases=[{train: [0, 1]}]"], ["no phase here has adapters"]),
        (["curriculum.phases=[{train: [1], adapt: [0]}]"], ["stack adapter of stack 1", "merge_adapters"]),
    ],
)
def test_adapters_for_another_rack_are_refused_before_anything_is_written(adapted, changes, words, tmp_path):
    load = f"curriculum.adapters.load_from={adapted}"
    plan = ["curriculum.plan=custom", f"curriculum.phases={CUSTOM}"]
    with pytest.raises(UsageError) as error:
        prepare(tiny(*plan, load, *changes), tmp_path / "run")
    text = str(error.value).replace("sit on", "sits on")
    assert all(word in text for word in words), text
    assert not (tmp_path / "run").exists()


def test_the_gradient_of_the_step_reaches_adapters_and_nothing_of_the_base():
    parts = step_parts(tiny("curriculum.plan=custom", f"curriculum.phases={CUSTOM}"), index=1)
    assert parts.spec.learns == ("adapters",)
    assert all("adapters" in path for path in leaves(parts.learning["stacks"]))
    assert not any(path.endswith("['a']") or path.endswith("['b']") for path in leaves(parts.frozen))
    grad = jax.grad(lambda tree: window_loss(parts.spec, tree, parts.frozen, parts.batch(), None, None)[0])
    grads = leaves(grad(parts.learning))
    assert all(np.abs(g).max() > 0 for path, g in grads.items() if path.endswith("['b']"))


def test_metrics_of_an_adapted_run_are_plain_json(adapted):
    assert json.loads(json.dumps(metrics(adapted)))
