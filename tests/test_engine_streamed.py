"""The streamed executor against the resident one, and what it keeps on the device.

That every plan trains alike in both is in test_engine_plans.py, that they are continued bitwise in test_kill_resume.py.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import leaves, losses, metrics, saved, tiny, train

from stackwise_jax.engine import Interrupted, Run, holdings, prepare
from stackwise_jax.engine.events import NullReporter, StopFlag
from stackwise_jax.engine.pieces import close_step
from stackwise_jax.engine.planner import plan_run
from stackwise_jax.engine.programs import StepPrograms, compiled_bytes
from stackwise_jax.engine.resident import join_states
from stackwise_jax.engine.streamed import Streamed
from stackwise_jax.engine.streamed_bytes import piece_bytes
from stackwise_jax.engine.weights import Weights
from stackwise_jax.memory import Conveyor
from stackwise_jax.memory.devices import machine_of
from stackwise_jax.memory.offload import is_mapped

MACHINE = machine_of("1TB", "1TB", "1TB", Path())
DEPTH_TIME = ["objective.kind=diffusion", "objective.time=depth", "curriculum.plan=prepend"]
CASES = {
    "tied, microbatches, dropout": [
        "curriculum.plan=rackwise",
        "model.tie_embeddings=true",
        "optimizer.microbatches=2",
        "model.dropout=0.3",
        "model.freeze_up_proj=true",
        "memory.offload=all",
    ],
    "consistency, frozen suffix on disk": [
        *DEPTH_TIME,
        "curriculum.consistency=0.5",
        "optimizer.microbatches=2",
        "memory.offload=trunk",
        "memory.offload_to=disk",
    ],
    "adamw, stack norms, all on disk": [
        "curriculum.plan=rackwise",
        "optimizer.clip=stack",
        "optimizer.grad_clip=0.1",
        "memory.offload=all",
        "memory.offload_to=disk",
        "memory.stack_inputs=host",
    ],
    "quantized trunk with adapters": [
        "curriculum.plan=append",
        "curriculum.trunk=adapt",
        "curriculum.frozen=nf4",
        "curriculum.adapters.dropout=0.2",
        "memory.offload=trunk+optimizer",
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_streamed_training_is_resident_training(case, tmp_path):
    resident = [change for change in CASES[case] if not change.startswith("memory.")]
    sgd = [] if case.startswith("adamw") else ["optimizer.name=sgd"]
    train(tiny("run.seed=3", *sgd, *resident), tmp_path / "resident")
    train(tiny("run.seed=3", *sgd, *CASES[case]), tmp_path / "streamed")
    assert np.allclose(losses(tmp_path / "resident"), losses(tmp_path / "streamed"), rtol=1e-6)
    norms = [
        [row["grad_norm"] for row in metrics(tmp_path / name) if "grad_norm" in row]
        for name in ("resident", "streamed")
    ]
    assert np.allclose(*norms, rtol=1e-6 if sgd else 1e-5)
    a, b = leaves(saved(tmp_path / "resident")), leaves(saved(tmp_path / "streamed"))
    assert a.keys() == b.keys()
    for where, x in a.items():
        assert np.abs(x - b[where]).max(initial=0) <= (2e-6 if sgd else 1e-4) * max(np.abs(x).max(initial=0), 1e-3), (
            where
        )


class Watch:
    """The most device bytes while a piece runs: all arrays that are alive, and what the piece makes beside them."""

    def __init__(self, monkeypatch):
        self.most = 0
        call = StepPrograms.call

        def alive() -> int:
            return sum(x.nbytes for x in jax.live_arrays() if x.sharding.memory_kind == "device")

        def watched(programs, function, static, *args, donate=(), **how):
            piece = compiled_bytes(programs.program(function, static, *args, donate=donate))
            self.most = max(self.most, alive() - self.other + piece["outputs"] + piece["temporaries"])
            made = call(programs, function, static, *args, donate=donate, **how)
            jax.block_until_ready(made)
            return made

        monkeypatch.setattr(StepPrograms, "call", watched)
        begin = Conveyor._begin

        def arrived(belt) -> None:  # the worst moment: what is on its way is there
            begin(belt)
            if belt._coming is not None:
                belt._coming.result()

        monkeypatch.setattr(Conveyor, "_begin", arrived)
        monkeypatch.setattr(holdings, "ThreadPoolExecutor", Dawdling)  # and what leaves is there until it is waited for
        self.other = alive()


class Dawdling:
    """An executor that begins when the result is asked for."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *args) -> SimpleNamespace:
        return SimpleNamespace(result=functools.cache(lambda: function(*args)))


FROZEN_SUFFIX = "curriculum.phases=[{train: [0]}]"


@pytest.mark.parametrize(
    "how", [["optimizer.clip=stack"], ["optimizer.clip=global"], ["curriculum.plan=custom", FROZEN_SUFFIX]]
)
def test_neither_device_bytes_nor_programs_grow_with_depth(how, tmp_path, monkeypatch):
    found = {}
    for n in (3, 9):
        with monkeypatch.context() as patch:
            watch = Watch(patch)
            changes = [
                f"model.architecture.n_stacks={n}",
                "model.d_model=64",
                "model.d_ff=256",
                "curriculum.plan=rackwise",
            ]
            changes += ["memory.offload=all", "memory.stack_inputs=host", "curriculum.steps=2"]
            run = train(tiny(*changes, *how), tmp_path / f"run{n}")
            (planned,) = plan_run(run.setup, MACHINE, compiled=True).phases
            found[n] = (watch.most, run.programs.compilations, planned.step_bytes)
    assert found[3][1] == found[9][1]
    assert found[9][0] < found[3][0] * 1.02 and found[9][2] < found[3][2] * 1.02
    for measured, _, predicted in found.values():
        assert 0.98 < predicted / measured < 1.25
    stack = run.setup.rack.stacks[0].parameter_count() * 4
    assert found[9][0] < 18 * stack  # the learning state of nine stacks, without activations, would be 36 of them


@pytest.mark.parametrize("clip", ["global", "stack"])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(clip, tmp_path):
    changes = ["curriculum.plan=rackwise", "memory.offload=all", f"optimizer.clip={clip}", "optimizer.lr=1e30"]
    changes += ["optimizer.schedule=constant", "optimizer.warmup=0", "optimizer.name=sgd", "optimizer.weight_decay=0"]
    skipped = {}
    for steps in (3, 6):
        train(tiny(*changes, f"curriculum.steps={steps}"), tmp_path / f"{steps}")
        skipped[steps] = [row["skipped"] for row in metrics(tmp_path / f"{steps}") if "loss" in row]
    assert skipped[6][2:] == [*range(skipped[3][2], skipped[3][2] + 4)] and skipped[3][2] > 0
    after = [leaves(saved(tmp_path / f"{steps}")) for steps in (3, 6)]
    assert after[0].keys() == after[1].keys()
    assert all(x.tobytes() == after[1][name].tobytes() and np.isfinite(x).all() for name, x in after[0].items())


def test_what_rests_on_disk_is_mapped_also_after_a_resume(tmp_path):
    changes = ["curriculum.plan=rackwise", "memory.offload=all", "memory.offload_to=disk", "curriculum.steps=4"]
    config = tiny(*changes, "curriculum.plan=custom", FROZEN_SUFFIX, "run.save_every=2")
    stop, seen = StopFlag(), []

    class Stopper(NullReporter):
        def step(self, row):
            if row["step"] == 1:
                stop.set()

    def look(executor):
        trees = [*executor.held.learning.values(), *executor.held.opt.values(), *executor._frozen]
        seen.append([is_mapped(leaf) for leaf in jax.tree.leaves(trees)])

    with pytest.MonkeyPatch.context() as patch:
        real = Streamed.step
        patch.setattr(Streamed, "step", lambda self, data: look(self) or real(self, data))
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run", reporter=Stopper(), stop=stop)
        train(config, tmp_path / "run")
    assert len(seen) == 4 and all(map(all, seen))


@pytest.mark.parametrize("plan", ["grow", "cycle"])
def test_optimizer_state_goes_over_a_border_one_part_at_a_time(plan, tmp_path):
    changes = [f"curriculum.plan={plan}", "model.architecture.n_stacks=3", "curriculum.optimizer_state=keep"]
    changes += ["curriculum.steps=2", "curriculum.rounds=2"] if plan == "cycle" else ["curriculum.steps=2"]
    compiled = join_states._cache_size()
    train(tiny(*changes, "memory.offload=all"), tmp_path / "streamed")
    assert join_states._cache_size() - compiled <= 7  # stack, embedding and head; each alone and with the counts
    train(tiny(*changes), tmp_path / "resident")
    assert np.allclose(losses(tmp_path / "resident"), losses(tmp_path / "streamed"), rtol=2e-5)


def test_the_pieces_that_are_planned_are_those_that_run(tmp_path):
    changes = ["memory.offload=all", "optimizer.microbatches=2", "curriculum.consistency=0.5", "model.dropout=0.1"]
    setup = prepare(tiny(*DEPTH_TIME, *changes), tmp_path / "run")
    programs = StepPrograms(setup.placement)
    key = setup.placement.put(jax.random.key(0), setup.placement.replicated)
    for phase in setup.plan.phases:
        planned = piece_bytes(setup, Weights(setup.rack, setup.placement, None, key), phase, programs)
        assert all(entry["total"] > 0 for entry in planned.values())
    run = Run(setup)
    run.train()
    ran = {key for key in run.programs._compiled if key[0] is not close_step}  # it handles a few numbers
    assert ran == set(programs._compiled)
