"""What a run does to the weights, to its programs and to its directory.

Legend: B batch, T sequence.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import leaves, losses, metrics, same_bits, saved, step_parts, summary, tiny, train

from stackwise_jax.engine import NullReporter, Run, StopFlag, load_rack, prepare, recorder
from stackwise_jax.engine.dryrun import abstract_step
from stackwise_jax.engine.heldout import HELD_OUT_SEED, held_out, held_out_batches
from stackwise_jax.engine.loop import run_phase
from stackwise_jax.engine.resident import step_spec
from stackwise_jax.engine.step import batch_gradients, train_step
from stackwise_jax.engine.weights import Weights, learning_items, stack_item
from stackwise_jax.engine.window import Window
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.evaluation import evaluate_run, held_out_text
from stackwise_jax.model import create_block_spec, create_rack_from_specs, init_rack

# What learns and what does not.

PHASES = """[
  {name: bottom, path: [0], train: [0], train_embed: true},
  {name: over a prefix, path: [0, 1], train: [1]},
  {name: under a suffix, path: [0, 1, 2], train: [0], train_head: false},
  {name: head alone, path: [0, 1, 2]},
  {name: two of three, path: [0, 1, 2], train: [0, 2], train_embed: true, train_head: false},
]"""


@pytest.fixture(scope="module")
def phases(tmp_path_factory) -> list[SimpleNamespace]:
    """A run whose phases train different parts: per phase the versions and weights in memory at its end."""
    run_dir = tmp_path_factory.mktemp("parts") / "run"
    ends = []

    class Snapshots(NullReporter):
        def phase_end(self, result):
            in_memory = {item: jax.device_get(tree) for item, tree in run.weights.trees.items()}
            ends.append(SimpleNamespace(versions=dict(run.weights.versions), in_memory=in_memory))

    # Without weight decay nothing moves that no gradient reaches.
    config = tiny(
        "curriculum.plan=custom", f"curriculum.phases={PHASES}", "model.architecture.n_stacks=3",
        "optimizer.weight_decay=0", "curriculum.steps=2", "run.keep=20",
    )  # fmt: skip
    run = Run(prepare(config, run_dir), Snapshots())
    run.train()
    start = {item: 1 for item in ends[-1].versions}
    ends.insert(0, SimpleNamespace(versions=start, in_memory={}))
    for end, phase in zip(ends, (None, *run.phases), strict=True):
        end.phase, end.items = phase, saved(run_dir, end.versions)
    return ends


@pytest.mark.parametrize("index", range(1, 6))
def test_a_phase_changes_all_that_learns_and_nothing_else(phases, index):
    before, after = phases[index - 1], phases[index]
    learns = learning_items(after.phase)
    assert learns
    for item, tree in after.items.items():
        if item not in learns:
            assert after.versions[item] == before.versions[item], item
            continue
        assert after.versions[item] > before.versions[item]
        old = leaves(before.items[item])
        for path, values in leaves(tree).items():
            fixed = "'up'" in path
            assert (values.tobytes() == old[path].tobytes()) == fixed, f"{item} {path}"
    assert same_bits(after.in_memory, {item: after.items[item] for item in after.in_memory})
    assert {stack_item(i) for i in after.phase.path} <= after.in_memory.keys()


@pytest.mark.parametrize("tied", [True, False])
def test_a_gradient_reaches_every_leaf_that_learns(tied):
    changes = [f"model.tie_embeddings={str(tied).lower()}", "curriculum.plan=rackwise"]
    parts = step_parts(tiny("model.architecture.n_stacks=1", *changes))
    assert ("kernel" in parts.learning["head"]) != tied
    assert parts.learning.keys() == {"embed", "stacks", "head"}
    assert len(jax.tree.leaves(parts.frozen)) == 1  # the fixed up-projection
    gradients = jax.jit(lambda *trees: batch_gradients(parts.spec, *trees, None, None)[1])
    grads = leaves(gradients(parts.learning, parts.frozen, parts.batch()))
    assert grads.keys() == leaves(parts.learning).keys()
    for path, grad in grads.items():
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-7, path
    tokens = np.unique(parts.data.examples.tokens_BT[:, :-1])  # the last of a row predicts nothing
    rows = np.flatnonzero(np.abs(grads["['embed']['embedding']"]).sum(axis=1))
    # Tied, the embedding is also the head, whose softmax reaches every token of the vocabulary and no padding.
    assert rows.tolist() == (list(range(parts.spec.task.vocab.size)) if tied else tokens.tolist())


# Programs.


class Compilations:
    """Counts what XLA compiles between `with` and its end."""

    def __enter__(self):
        self.count, self.active = 0, True
        jax.clear_caches()
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def _listen(self, event: str, duration: float, **kwargs) -> None:
        self.count += self.active and event == "/jax/core/compile/backend_compile_duration"

    def __exit__(self, *error):
        self.active = False


def test_stacks_of_equal_shape_share_every_program(tmp_path):
    counts = {}
    for n in (3, 5):
        with Compilations() as compilations:
            run = train(tiny(f"model.architecture.n_stacks={n}", "cache.kind=host"), tmp_path / f"{n}")
        assert run.programs.compilations == 2  # with the embedding, and without
        counts[n] = compilations.count
    assert counts[3] == counts[5] > 2


def equations(jaxpr) -> int:
    """Equations of a jaxpr and of all jaxprs within it."""
    inner = [
        getattr(value, "jaxpr", value)
        for equation in jaxpr.eqns
        for parameter in equation.params.values()
        for value in (parameter if isinstance(parameter, tuple | list) else (parameter,))
    ]
    return len(jaxpr.eqns) + sum(equations(value) for value in inner if hasattr(value, "eqns"))


def test_the_step_of_a_rack_does_not_grow_with_its_depth():
    sizes = {}
    for n in (2, 8):
        setup = prepare(tiny("curriculum.plan=rackwise", f"model.architecture.n_stacks={n}"), Path("no run"))
        phase = setup.plan.phases[0]
        window = Window(setup.rack, phase)
        spec = step_spec(setup.task(phase), phase, window)
        assert [len(stack.blocks) for stack in spec.groups] == [n]
        weights = Weights(setup.rack, setup.placement, None, jax.random.key(0))
        arguments = abstract_step(setup, weights, spec, phase, window)
        sizes[n] = equations(jax.make_jaxpr(lambda *a, spec=spec: train_step(spec, *a))(*arguments).jaxpr)
    assert sizes[2] == sizes[8] > 100


def test_the_loop_moves_nothing_between_host_and_device_unasked():
    parts = step_parts(tiny("model.architecture.n_stacks=1"))
    step, seen = parts.compiled(), []

    def loop(data) -> None:
        state = parts.state()
        calls = {"before_step": lambda *_: None, "on_metrics": lambda step, *_: seen.append(step)}
        run_phase(lambda data: step(state, parts.frozen, data, parts.constants)[1], iter([data]), range(1), **calls)

    loop(parts.data)
    assert seen == [0]
    with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device transfer"):
        loop(parts.data._replace(lr=np.float32(1e-3)))
    assert seen == [0]


# Steps that are not finite.


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    parts = step_parts(tiny("model.architecture.n_stacks=1"))
    step = parts.compiled()
    state, first = step(parts.state(), parts.frozen, parts.data, parts.constants)
    assert (float(first["finite"]), int(state.bad_steps)) == (1, 0)
    good_up = parts.frozen["stacks"][0]["blocks"]["mlp"]["up"]["kernel"]
    bad = {"stacks": ({"blocks": {"mlp": {"up": {"kernel": good_up * jnp.inf}}}},)}
    before = jax.device_get((state.learning, state.opt))
    for count in (1, 2):
        state, bad_metrics = step(state, bad, parts.data, parts.constants)
        assert (float(bad_metrics["finite"]), int(bad_metrics["bad_steps"]), int(state.step)) == (0, count, 1 + count)
        assert same_bits((state.learning, state.opt), before)
    state, good = step(state, parts.frozen, parts.data, parts.constants)
    assert (float(good["finite"]), int(state.bad_steps)) == (1, 0)
    assert not same_bits(state.learning, before[0])
    assert good["loss"] < first["loss"]


def test_a_run_stops_after_many_bad_steps_and_keeps_the_weights(tmp_path):
    config = tiny(
        "optimizer.lr=1e38", "optimizer.schedule=constant", "optimizer.warmup=0", "run.max_bad_steps=3",
        "run.save_every=1", "curriculum.steps=20",
    )  # fmt: skip
    run = Run(prepare(config, tmp_path / "run"))
    with pytest.raises(RunError, match=r"not finite 3 steps in a row.*optimizer\.lr"):
        run.train()
    rows = metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 1, 2, 3]
    # Checkpoints before steps 1, 2 and 3: the first step moved, the next two were skipped.
    versions = {n: dict.fromkeys(("embed", "head", "stacks/000", "optimizer"), n) for n in (1, 2, 3, 4)}
    del versions[1]["optimizer"]
    at = {n: saved(tmp_path / "run", versions[n]) for n in versions}
    assert not same_bits(at[1]["head"], at[2]["head"])
    assert same_bits(at[2], at[3]) and same_bits(at[3], at[4])
    with pytest.raises(RunError, match="not finite 3 steps in a row"):  # the count goes on after a restart
        Run(prepare(config, tmp_path / "run")).train()
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3]


# Dropout.


def test_dropout_acts_in_training_only(tmp_path):
    for name, changes in (("without", []), ("with", ["model.dropout=0.5"])):
        train(tiny(*changes), tmp_path / name)
    without, dropped = losses(tmp_path / "without"), losses(tmp_path / "with")
    assert all(a != b for a, b in zip(without, dropped, strict=True))
    phases = summary(tmp_path / "with")["phases"]
    for depth in (1, 2):
        loaded = load_rack(tmp_path / "with", depth=depth)
        evaluations = [evaluate_run(loaded, held_out_text(loaded), limit=2) for _ in range(2)]
        assert evaluations[0] == evaluations[1]
        assert evaluations[0]["loss"] == pytest.approx(phases[depth - 1]["held_out_loss"], rel=1e-6)


def test_dropout_is_drawn_anew_each_step_and_only_in_what_learns():
    def first_losses(*changes: str, train: str = "[0]") -> list[float]:
        phases = f"curriculum.phases=[{{train: {train}, train_embed: true}}]"
        parts = step_parts(tiny("curriculum.plan=custom", phases, *changes))
        step, state, found = parts.compiled(), parts.state(), []
        data = parts.data._replace(lr=parts.data.lr * 0)
        for _ in range(2):
            state, metrics = step(state, parts.frozen, data, parts.constants)
            found.append(float(metrics["loss"]))
        return found

    plain, dropped = first_losses(), first_losses("model.dropout=0.5")
    assert plain[0] == plain[1]
    assert len({plain[0], *dropped}) == 3
    assert first_losses("model.dropout=0.5", train="[]") == plain


# Racks built by hand.


def rack_by_hand(vocab_size: int = 384):
    """An encoder, a frozen stack, and a decoder of another shape."""
    encoder = create_block_spec(32, 48, 2, attention_preset="bert_style")
    decoder = create_block_spec(32, 64, 4, 1, attention_preset="gpt_style", freeze_up_proj=False)
    stacks = [
        {"n_blocks": 2, "block_spec": encoder},
        {"n_blocks": 1, "block_spec": encoder, "freeze_blocks": True},
        {"n_blocks": 1, "block_spec": decoder},
    ]
    return create_rack_from_specs(vocab_size, 32, stacks, tie_embeddings=False)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["stackwise", "rackwise"])
def test_a_rack_built_by_hand_trains_and_loads(plan, tmp_path):
    config = tiny(f"curriculum.plan={plan}", "objective.kind=mlm", "objective.attention_mode=model")
    rack, run_dir = rack_by_hand(), tmp_path / "run"
    run = train(config, run_dir, rack=rack)
    learned = [sorted(phase.train) for phase in run.phases]
    assert learned == ([[0], [2]] if plan == "stackwise" else [[0, 2]])
    initial = jax.jit(rack.init_params)(jax.random.key(0))
    loaded = load_rack(run_dir)
    changed = [not same_bits(tree, initial["stacks"][name]) for name, tree in loaded.params["stacks"].items()]
    assert changed == [True, False, True]
    assert loaded.params["stacks"]["002"]["blocks"]["mlp"]["up"]["kernel"].shape == (1, 32, 64)
    result = evaluate_run(loaded, held_out_text(loaded), limit=2)
    assert result["loss"] == pytest.approx(summary(run_dir)["held_out_loss"], rel=1e-6)


def test_a_rack_with_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"model\.vocab_size|vocabulary"):
        prepare(tiny(), tmp_path, rack_by_hand(vocab_size=128))


# Plans and objectives.

PLANS = {
    "stackwise": [(0,), (0, 1)],
    "append": [(0,), (0, 1)],
    "layerwise": [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)],
    "blockwise": [(0,), (0, 1)],
    "rackwise": [(0, 1)],
    "custom": [(0, 1), (0, 1)],
}
FIELDS = {
    "name", "held_out_loss", "bits_per_byte", "trainable_params", "frozen_params", "tokens", "flops", "seconds",
    "peak_device_bytes", "peak_host_bytes",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clm", "mlm", "diffusion"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_runs_every_objective(plan, objective, tmp_path):
    custom = ["curriculum.phases=[{name: a, train: [0], train_embed: true}, {name: b, train: [1], frozen: bf16}]"]
    config = tiny(
        f"curriculum.plan={plan}", f"objective.kind={objective}", "model.architecture.blocks_per_stack=2",
        *(custom if plan == "custom" else []),
    )  # fmt: skip
    run_dir = tmp_path / "run"
    run = train(config, run_dir)
    assert [phase.path for phase in run.phases] == PLANS[plan]
    report = summary(run_dir)
    rack_params = run.setup.rack.parameter_count()
    for phase, result in zip(run.phases, report["phases"], strict=True):
        assert result.keys() >= FIELDS
        assert all(np.isfinite(result[name]) and result[name] > 0 for name in FIELDS - {"name", "frozen_params"})
        assert result["held_out_loss"] < 6.2  # uniform over the vocabulary and a bit
        assert result["tokens"] == 3 * 4 * 16
        if len(phase.path) == len(run.setup.rack.stacks):
            assert result["trainable_params"] + result["frozen_params"] == rack_params
    assert len(losses(run_dir)) == 3 * len(run.phases)
    assert load_rack(run_dir).progress.finished
    phases = json.loads((run_dir / "phases.json").read_text())
    grown = [row["grow"] for row in phases]
    assert grown == ([[0], [1]] if plan == "append" else [[]] * len(phases))

    def state() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(run_dir.rglob("*")) if p.is_file()}

    notes, before = [], state()
    listener = NullReporter()
    listener.note = notes.append
    again = train(config, run_dir, reporter=listener)
    assert state() == before
    assert again.programs.compilations == 0
    assert any("finished" in note for note in notes)


# Held-out figures.


def test_the_bound_of_mask_diffusion_is_reproducible(tmp_path):
    train(tiny("objective.kind=diffusion", "curriculum.plan=rackwise"), tmp_path / "run")
    loaded = load_rack(tmp_path / "run")
    text = held_out_text(loaded)
    first, second = (evaluate_run(loaded, text, limit=2, draws=2) for _ in range(2))
    assert first == second
    assert first["noise"] == "elbo" and first["standard_error"] > 0
    assert evaluate_run(loaded, text, limit=2)["loss"] != first["loss"]


@pytest.mark.parametrize("objective", ["mlm", "diffusion"])
def test_a_copy_of_the_input_scores_nothing(objective):
    tied = tiny(f"objective.kind={objective}", "model.tie_embeddings=true", "curriculum.plan=rackwise")
    setup = prepare(tied, Path("no run"))
    placement, rack, task = setup.placement, setup.rack, setup.task(setup.plan.phases[0])
    params = init_rack(rack, jax.random.key(0))
    # Blocks that add nothing, between an embedding and its transpose: the model says what it sees.
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 if {"'o'", "'down'"} & {f"'{p.key}'" for p in path} else x, params["stacks"]
    )
    params = placement.put(params | {"stacks": silent}, placement.replicated)
    visible = setup.valid.tokens_NT[:8]
    logits_BTV = jax.jit(rack.apply)({"params": params}, visible)
    assert (logits_BTV[..., : task.vocab.size].argmax(-1) == visible).mean() > 0.99
    batches = list(held_out_batches(setup.valid, 4, setup.tokenizer.pad_id, 4))
    stacks = list(zip(rack.stacks, params["stacks"].values(), strict=True))
    table = placement.put(jnp.asarray(setup.tokenizer.token_bytes, jnp.float32), placement.replicated)
    result = held_out(task, stacks, params["embed"], params["head"], iter(batches), table)
    # Of the tokens that mlm chooses it keeps some; of those of diffusion none is to be seen.
    key = jax.random.key(HELD_OUT_SEED)
    shown = [task.batch(batch, key, jnp.int32(0)) for batch in batches]
    chosen = sum(float((batch.weights_BT > 0).sum()) for batch in shown)
    kept = sum(float(((batch.weights_BT > 0) & (batch.inputs_BT == batch.targets_BT)).sum()) for batch in shown)
    assert result["accuracy"] == pytest.approx(kept / chosen, abs=1e-6)
    assert kept == 0 if objective == "diffusion" else 0 < kept < 0.35 * chosen
    n_tokens = sum(int((batch.segment_ids_BT > 0).sum()) for batch in batches)
    assert 0 < result["tokens"] < 0.9 * n_tokens


@pytest.mark.parametrize("part_bytes", [recorder.PART_BYTES, 1000])  # optimizer state in one item, or in many
def test_stopping_leaves_a_run_that_goes_on_to_the_same_end(part_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "PART_BYTES", part_bytes)
    stop = StopFlag()

    class StopAt(NullReporter):
        def step(self, row):
            if row["global_step"] == 4:
                stop.set()

    config = tiny("run.save_every=0")
    with pytest.raises(RunError, match="the same command continues"):
        train(config, tmp_path / "stopped", reporter=StopAt(), stop=stop)
    assert not (tmp_path / "stopped" / "summary.json").exists()
    assert (tmp_path / "stopped/checkpoints/optimizer/part1").exists() is (part_bytes == 1000)
    train(config, tmp_path / "stopped")
    train(config, tmp_path / "whole")
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    stopped, whole = saved(tmp_path / "stopped"), saved(tmp_path / "whole")
    assert same_bits(stopped, whole)
