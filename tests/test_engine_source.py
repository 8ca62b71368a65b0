"""Runs that start from another run: init_from at any depth and with any stacks, switching task, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import same_bits, saved, summary, tiny, train

from stackwise_jax.engine import Run, load_experts, load_rack, prepare
from stackwise_jax.engine.source import Source, origin_for
from stackwise_jax.engine.weights import EMBED, HEAD, stack_item
from stackwise_jax.errors import UsageError
from stackwise_jax.evaluation import evaluate_run, held_out_text, task_of


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("origin") / "run"
    train(tiny("curriculum.plan=append", "model.architecture.n_stacks=3"), run_dir)
    return run_dir


def begun(config, run_dir: Path) -> dict:
    """The trees with which the first phase of a run begins, by item, and its held-out loss then."""
    found = {}

    class Spy(Run):
        def _loop(self, work, executor, start):
            if work.index == 0:
                found["loss"] = self._held_out(work, *executor.evaluated())["loss"]
                found.update(jax.device_get(executor.learned()))
            return super()._loop(work, executor, start)

    Spy(prepare(config, run_dir)).train()
    return found


def test_a_run_goes_on_from_the_weights_of_another(origin, tmp_path):
    items = saved(origin)
    start = begun(
        tiny("curriculum.plan=joint", "model.architecture.n_stacks=3", f"run.init_from={origin}"), tmp_path / "r"
    )
    for item in (EMBED, HEAD, *map(stack_item, range(3))):
        assert same_bits(start[item], items[item]), item
    assert start["loss"] == pytest.approx(summary(origin)["held_out_loss"], rel=1e-6)


def test_any_depth_and_any_stacks_can_be_taken(origin, tmp_path):
    first = ["curriculum.plan=joint", f"run.init_from={origin}", "run.init_depth=2"]
    start = begun(tiny(*first), tmp_path / "depth")
    assert start["loss"] == pytest.approx(summary(origin)["phases"][1]["held_out_loss"], rel=1e-6)

    items = saved(origin)
    chosen = ["curriculum.plan=joint", f"run.init_from={origin}", "run.init_stacks=[2, 0]"]
    start = begun(tiny(*chosen), tmp_path / "stacks")
    assert same_bits(start[stack_item(0)], items[stack_item(2)])
    assert same_bits(start[stack_item(1)], items[stack_item(0)])


def test_a_rack_grows_on_top_of_another_run(origin, tmp_path):
    items = saved(origin)
    phases = "[{path: [0, 1, 2, 3], train: [3]}]"
    depth = ["model.architecture.n_stacks=4", f"run.init_from={origin}"]
    train(tiny("curriculum.plan=custom", f"curriculum.phases={phases}", *depth), tmp_path / "run")
    end = saved(tmp_path / "run")
    assert all(same_bits(end[stack_item(i)], items[stack_item(i)]) for i in range(3))


@pytest.mark.parametrize("kind", ["mlm", "diffusion"])
def test_a_causal_rack_is_evaluated_and_tuned_as_a_bidirectional_one(origin, kind, tmp_path):
    loaded = load_rack(origin)
    text = held_out_text(loaded)
    task = task_of(loaded, kind)
    assert task.attention_mode == "bidirectional"
    before = evaluate_run(loaded, text, task=task, limit=8, draws=2)["loss"]
    tune = [
        "curriculum.plan=joint",
        "model.architecture.n_stacks=3",
        f"run.init_from={origin}",
        f"objective.kind={kind}",
    ]
    train(tiny(*tune, "curriculum.steps=40"), tmp_path / "run")
    tuned = load_rack(tmp_path / "run")
    after = evaluate_run(tuned, text, task=task_of(tuned, kind), limit=8, draws=2)["loss"]
    assert after < before
    back = evaluate_run(tuned, text, task=task_of(tuned, "clm"), limit=8)
    assert np.isfinite(back["loss"]) and back["noise"] == "none"


def test_clm_cannot_be_evaluated_with_bidirectional_attention(origin):
    with pytest.raises(UsageError, match="attention_mode causal"):
        task_of(load_rack(origin), "clm", "bidirectional")


def test_adapters_of_the_other_run_are_merged_into_what_is_taken(tmp_path):
    phases = "[{train: [0, 1], train_embed: true}, {adapt: [0, 1], train_head: false}]"
    train(tiny("curriculum.plan=custom", f"curriculum.phases={phases}", "curriculum.adapters.lr=0.1"), tmp_path / "a")
    start = begun(tiny("curriculum.plan=joint", f"run.init_from={tmp_path / 'a'}"), tmp_path / "b")
    assert start["loss"] == pytest.approx(summary(tmp_path / "a")["held_out_loss"], rel=1e-5)
    assert not same_bits(start[stack_item(0)], saved(tmp_path / "a")[stack_item(0)])


def test_a_resumed_run_needs_the_other_run_no_more(origin, tmp_path):
    class Stops(Run):
        def _on_metrics(self, work, step, metrics, seconds):
            super()._on_metrics(work, step, metrics, seconds)
            if step == 1:
                raise InterruptedError

    config = lambda path: tiny("curriculum.plan=joint", "model.architecture.n_stacks=3", f"run.init_from={path}")
    train(config(origin), tmp_path / "whole")
    moved = tmp_path / "origin"
    shutil.copytree(origin, moved)
    run = Stops(prepare(config(moved), tmp_path / "cut"))
    with pytest.raises(InterruptedError):
        run.train()
    run.recorder.close()
    shutil.rmtree(moved)
    train(config(moved), tmp_path / "cut")
    assert same_bits(saved(tmp_path / "cut"), saved(tmp_path / "whole"))


def test_a_causal_run_goes_on_with_time_as_input_and_back(origin, tmp_path):
    """A time embedding that the other run does not have begins at zero; one that is not wanted is left behind."""
    shape = ["curriculum.plan=joint", "model.architecture.n_stacks=3"]
    timed = ["objective.kind=diffusion", "objective.time=input"]
    train(tiny(*shape, *timed, f"run.init_from={origin}"), tmp_path / "timed")
    items = saved(tmp_path / "timed")
    assert "time" in items[EMBED]
    start = begun(tiny(*shape, f"run.init_from={tmp_path / 'timed'}"), tmp_path / "back")
    assert same_bits(start[EMBED], {"embedding": items[EMBED]["embedding"]})


def test_only_denoisers_of_falling_noise_are_models_side_by_side(tmp_path):
    """Two causal models that share no stack are no pair of experts: the last one is the run's."""
    phases = "[{path: [0], train: [0], train_embed: true}, {path: [1], train: [1], train_embed: true}]"
    train(tiny("curriculum.plan=custom", f"curriculum.phases={phases}"), tmp_path / "run")
    assert [loaded.path for loaded in load_experts(tmp_path / "run")] == [(1,)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.d_model=64"], ["run.init_from", "d_model is 32 and here it is 64", "model.d_model"]),
        (["model.n_heads=4"], ["n_heads", "model.n_heads 2"]),
        (["model.architecture.blocks_per_stack=2"], ["1 blocks", "has 2", "blocks_per_stack 1"]),
        (["model.architecture.n_stacks=1"], ["gives 3 stacks", "init_stacks"]),
        (["run.init_stacks=[5]"], ["init_stacks", "5", "[0, 1, 2]"]),
        (["run.init_depth=9"], ["init_depth", "1 to 3"]),
        (["model.tie_embeddings=true", "curriculum.plan=rackwise"], ["tie_embeddings"]),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(origin, changes, words, tmp_path):
    common = ["curriculum.plan=joint", "model.architecture.n_stacks=3", f"run.init_from={origin}"]
    with pytest.raises(UsageError) as error:
        prepare(tiny(*common, *changes), tmp_path / "run")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(origin, tmp_path):
    config = tiny("model.architecture.n_stacks=3", f"run.init_from={origin}")
    with pytest.raises(UsageError, match=r"another tokenizer; write .* tokenizer.kind file"):
        origin_for(config, load_rack(origin).rack, SimpleNamespace(fingerprint="another"), {})


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"run.init_from.*no run directory"):
        prepare(tiny(f"run.init_from={tmp_path}"), tmp_path / "run")


def test_experts_are_the_phases_whose_paths_no_later_phase_shares(origin):
    assert Source(origin).experts == [2]
