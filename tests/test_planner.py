"""The planner against what is compiled and run: bytes, what fits, what would help, and that nothing is allocated."""

import dataclasses
import os
import time
from itertools import pairwise
from pathlib import Path

import jax
import pytest
from tiny import summary, tiny, train

from stackwise_jax.config import load_config
from stackwise_jax.config.checks import DEVICE_NAMES
from stackwise_jax.engine import planner, prepare
from stackwise_jax.engine.dryrun import advanced_stacks
from stackwise_jax.engine.plan_changes import advise, changed, too_large, what_helps
from stackwise_jax.engine.planner import plan_run
from stackwise_jax.engine.programs import StepPrograms
from stackwise_jax.engine.sketch import sketch
from stackwise_jax.engine.streamed_bytes import piece_bytes
from stackwise_jax.engine.weights import Weights
from stackwise_jax.errors import UsageError
from stackwise_jax.memory.budget import Demand, Part, shortfalls
from stackwise_jax.memory.devices import (
    DEVICES,
    EFFICIENCY,
    Device,
    Machine,
    available_host_bytes,
    claim_memory,
    machine_of,
)
from stackwise_jax.model import size_of

pytestmark = pytest.mark.optimized

CONFIGS = Path(__file__).parent.parent / "configs"
NOWHERE = Path("no run directory")
GB = 10**9
BIG = Machine(Device("big", 10**15), 10**15, 10**15)

SHAPE = ("model.d_model=64", "model.d_ff=176", "data.seq_len=64", "model.freeze_up_proj=false", "run.eval_batches=1")
PLANS = {
    "rackwise": ("curriculum.plan=rackwise",),
    "append, cached": ("curriculum.plan=append", "cache.kind=host"),
    "append, recomputed": ("curriculum.plan=append", "cache.kind=recompute"),
    "prepend": ("curriculum.plan=prepend",),
}


def h200(**sizes):
    return machine_of("h200", sizes.get("host", "100GiB"), sizes.get("disk", "60GB"), NOWHERE)


def setup_of(*changes):
    return sketch(tiny(*changes), NOWHERE)


def big(name, *changes):
    return sketch(load_config(CONFIGS / f"{name}.yaml", [f"--{change}" for change in changes]), NOWHERE)


@pytest.mark.parametrize("name", PLANS)
def test_the_prediction_is_within_10_percent_of_the_run(name, tmp_path):
    """Measured: arguments + outputs + temporaries - aliases of the step that the run compiled."""
    config = tiny(*SHAPE, *PLANS[name], "curriculum.steps=1")
    setup = prepare(config, tmp_path)
    compiled, formula = ([p.step_bytes for p in plan_run(setup, BIG, compiled=how).phases] for how in (True, False))
    train(config, tmp_path)
    measured = [phase["peak_device_bytes"] for phase in summary(tmp_path)["phases"]]
    assert compiled == pytest.approx(measured, rel=0.1)
    assert formula == pytest.approx(measured, rel=0.25)


FORMULAS = {
    "recomputed blocks": ("model.remat=true",),
    "microbatches": ("optimizer.microbatches=4",),
    "large vocabulary": ("model.vocab_size=4096",),
    "latent attention": ("model.attention_type=mla",),
    "random features": ("model.kernel.type=cauchy", "model.kernel.features=128"),
    "linear attention": ("model.kernel.type=uniform", "model.kernel.mode=linear", "data.seq_len=512"),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_formulas_are_within_25_percent_of_the_compiled_step(name):
    setup = setup_of(*SHAPE, "curriculum.plan=rackwise", "model.architecture.blocks_per_stack=2", *FORMULAS[name])
    (formula,), (compiled,) = (plan_run(setup, BIG, compiled=how).phases for how in (False, True))
    assert formula.step_bytes == pytest.approx(compiled.step_bytes, rel=0.25)
    assert {part.source for part in formula.demand.device.values()} <= {"shapes", "formula"}
    assert compiled.demand.device["activations"].source == "compiled"


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_formulas_know_what_the_streamed_executor_holds(blocks, tmp_path):
    """Its largest program is the backward pass of a stack; beside it wait the next stack and optimizer state."""
    changes = "curriculum.plan=rackwise", "memory.offload=all", f"model.architecture.blocks_per_stack={blocks}"
    config = tiny(*SHAPE, *changes, "data.batch_size=8", "optimizer.clip=stack", "curriculum.steps=1")
    plan = plan_run(prepare(config, tmp_path), BIG)
    (phase,) = plan.phases
    setup = prepare(config, tmp_path)
    weights = Weights(setup.rack, setup.placement, None, jax.eval_shape(lambda: jax.random.key(0)))
    entry = piece_bytes(setup, weights, phase.phase, StepPrograms(setup.placement))["backward"]
    assert phase.demand.device["activations"].bytes == pytest.approx(entry["temporaries"], rel=0.25)
    assert phase.step_bytes > 0.9 * entry["total"]


@pytest.mark.parametrize("name", ["llama_70b_h200", "llama_70b_h200_128k"])
def test_the_70b_model_fits_one_accelerator(name):
    before, begin = len(jax.live_arrays()), time.perf_counter()
    plan = plan_run(big(name), h200())
    assert time.perf_counter() - begin < 60
    assert len(jax.live_arrays()) == before
    assert plan.fits and len(plan.phases) == 80
    assert plan.peak("device") < 35 * GB
    assert plan.peak("host") < 100 * 2**30
    assert plan.peak("disk") < 60 * GB


@pytest.mark.parametrize("name, device", [("llama_7b_24gb", "rtx4090"), ("llama_1b_t4", "t4")])
def test_the_smaller_models_fit_their_devices(name, device):
    assert plan_run(big(name), machine_of(device, "64GiB", "200GB", NOWHERE)).fits


def test_equal_phases_are_looked_at_once(monkeypatch):
    calls = []
    real = planner.resident_parts
    monkeypatch.setattr(planner, "resident_parts", lambda *args: calls.append(args) or real(*args))
    plan = plan_run(setup_of("curriculum.plan=append", "model.architecture.n_stacks=30"), BIG)
    assert len(plan.phases) == 30 and len(calls) == 2  # the first also trains the embedding


def test_streaming_takes_device_memory_that_does_not_grow_with_depth():
    streamed = "curriculum.plan=rackwise", "memory.offload=all", "memory.stack_inputs=host", "optimizer.clip=stack"
    few, many = (setup_of(*streamed, f"model.architecture.n_stacks={n}") for n in (4, 40))
    few, many = (plan_run(setup, BIG) for setup in (few, many))
    assert {phase.executor for phase in (*few.phases, *many.phases)} == {"streamed"}
    assert many.peak("device") == pytest.approx(few.peak("device"), rel=0.02)
    assert many.peak("host") - few.peak("host") > 36 * 4 * 1000  # 36 stacks more wait there


def test_resident_memory_grows_with_depth():
    few, many = (setup_of("curriculum.plan=rackwise", f"model.architecture.n_stacks={n}") for n in (4, 40))
    assert plan_run(many, BIG).peak("device") > 4 * plan_run(few, BIG).peak("device")


def disk(*changes):
    return plan_run(setup_of("curriculum.plan=append", "model.d_model=64", *changes), BIG).peak("disk")


def test_versions_and_formats_decide_what_lies_on_disk():
    assert disk("run.keep=3", "run.save_every=1") > disk("run.keep=1", "run.save_every=1")
    trunk = "curriculum.frozen=bf16", "model.architecture.n_stacks=8"
    assert disk("memory.finished=frozen", *trunk) < disk(*trunk)


def test_the_cache_is_counted_where_it_lies():
    chunk = 4 * 16 * 32 * 4
    common = "curriculum.plan=append", "curriculum.steps=3", "cache.kind=host"
    host, spilled = (
        plan_run(setup_of(*common, f"cache.host_budget={n}"), BIG).phases[1].demand for n in (9 * chunk, chunk)
    )
    assert (host.host["cache"].bytes, host.disk["cache"].bytes) == (3 * chunk, 0)
    assert (spilled.host["cache"].bytes, spilled.disk["cache"].bytes) == (chunk, 2 * chunk)


def test_device_and_host_share_the_memory_of_a_cpu():
    demand = Demand({"weights": Part(60, "shapes")}, {"cache": Part(50, "shapes")}, {})
    assert not shortfalls(demand, Machine(Device("gpu", 60), host=50, disk=None))
    (short,) = shortfalls(demand, Machine(Device("cpu", None), host=100, disk=None, shared=True))
    assert (short.place, short.need, short.limit, short.largest, short.certain) == ("host", 110, 100, "weights", True)


def test_what_only_a_formula_says_is_not_certain():
    demand = Demand({"weights": Part(60, "shapes"), "activations": Part(50, "formula")}, {}, {})
    tight, small = (shortfalls(demand, Machine(Device("gpu", n), None, None))[0] for n in (100, 95))
    assert (tight.certain, small.certain) == (False, True)


def test_what_helps_is_tried_and_fits():
    setup = big("llama_7b_24gb", "memory.offload=none", "optimizer.name=adamw", "optimizer.rounding=nearest")
    machine = machine_of("rtx4090", "64GiB", "400GB", NOWHERE)
    plan = plan_run(setup, machine)
    assert not plan.fits
    helpful, fitting = what_helps(setup, machine, plan)
    assert fitting is not None and fitting.plan.fits and helpful
    again = plan_run(sketch(changed(setup.config, fitting.keys), NOWHERE), machine)
    assert again.peak("device") == fitting.plan.peak("device")
    assert all(change.plan.peak("device") < plan.peak("device") for change in helpful)


def test_advice_names_end_to_end_first_where_it_fits():
    setup = setup_of()
    names = [way.name for way in advise(setup, BIG) if way.change.plan.fits]
    assert names[0] == "end to end, resident"
    small = Machine(Device("small", 2 * 10**6, DEVICES["t4"].flops), 10**9, 10**9)
    deep = setup_of("model.architecture.n_stacks=40", "optimizer.microbatches=4")
    ways = advise(deep, dataclasses.replace(small, host=3 * GB + 10**9))
    assert not ways[0].change.plan.fits
    assert next(way.name for way in ways if way.change.plan.fits) == "end to end, streamed"
    assert ways[0].days is not None and ways[0].days > 0


def test_a_run_that_cannot_fit_is_refused_with_figures_and_a_remedy():
    text = "model.architecture.n_stacks=12", "curriculum.plan=rackwise", "data.seq_len=256", "data.batch_size=16"
    setup = prepare(tiny(*text, "memory.host=1GB"), NOWHERE)
    assert too_large(setup) is None
    sentence = too_large(prepare(tiny(*text, "memory.host=900MB", "model.d_model=128"), NOWHERE))
    assert sentence is not None
    assert "phase 'rack' needs" in sentence and "of host memory where there are 858.3 MiB" in sentence
    assert "write --" in sentence and "memory.check off" in sentence


def test_names_of_devices_are_those_of_the_configuration():
    assert {*DEVICES, "cpu"} == set(DEVICE_NAMES)
    assert machine_of("40GB", "1GiB", "2GB", NOWHERE) == Machine(Device("40GB", 40 * GB), 2**30, 2 * GB)
    with pytest.raises(UsageError, match=r"memory.device is \"h300\"; write one of h200, .*, cpu, or a size"):
        machine_of("h300", None, None, NOWHERE)
    here = machine_of(None, None, None, NOWHERE)
    assert here.shared and here.host is not None and here.disk is not None


def test_a_run_may_take_what_is_planned_for(monkeypatch):
    device, host = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
    monkeypatch.delenv(device, raising=False)
    monkeypatch.setenv(host, "7")
    claim_memory()
    assert float(os.environ[device]) * 141 * GB == pytest.approx(DEVICES["h200"].memory)
    assert os.environ[host] == "7"  # what the user says wins
    monkeypatch.delenv(host)
    claim_memory()
    assert int(os.environ[host]) == pytest.approx(available_host_bytes() / GB, abs=2)


def test_the_reserve_of_a_device_counts_once(tmp_path):
    setup = prepare(tiny(*SHAPE), tmp_path)
    bare = plan_run(setup, BIG).peak("device")
    gpu = lambda memory: Machine(Device("gpu", memory, reserve=1000), 10**15, 10**15)
    assert plan_run(setup, gpu(bare + 1000)).fits
    assert not plan_run(setup, gpu(bare + 999)).fits


BORDER = (
    "[{train: [0, 1], train_embed: true}, {adapt: [0, 1], train_head: false}, {adapt: [0, 1], train_head: false%s}]"
)


def at_rest(more):
    """Bytes of optimizer state on disk while the phase before the last runs."""
    setup = setup_of("curriculum.plan=custom", "run.save_every=0", f"curriculum.phases={BORDER % more}")
    return plan_run(setup, BIG).phases[1].demand.disk["optimizer"].bytes


def test_merged_adapters_hand_no_optimizer_state_on():
    kept, merged = at_rest(", keep_optimizer: true"), at_rest(", keep_optimizer: true, merge_adapters: true")
    assert kept > merged == at_rest("")


def test_what_is_saved_again_at_a_border_lies_beside_what_it_replaces():
    last = lambda *changes: (
        plan_run(setup_of("curriculum.plan=custom", *changes), BIG).phases[-1].demand.disk["weights"]
    )
    still = BORDER.replace("{adapt: [0, 1], train_head: false%s}", "{train_head: true%s}")
    stacks = sum(size_of(stack.init_params(jax.random.key(0))) for stack in setup_of().rack.stacks) * 4
    merged = last(f"curriculum.phases={still % ', merge_adapters: true'}").bytes
    assert merged >= last(f"curriculum.phases={still % ''}").bytes + stacks
    # Stacks that never learn again are saved in the format that they are frozen in when the first phase ends.
    phases = "curriculum.phases=[{train_embed: true, train_head: false}, {train_head: true}]", "curriculum.frozen=bf16"
    plain, frozen = (
        [phase.demand.disk["weights"].bytes for phase in plan_run(setup_of("curriculum.plan=custom", *how), BIG).phases]
        for how in (phases, (*phases, "memory.finished=frozen"))
    )
    assert frozen[0] == plain[0] + stacks / 2
    assert frozen[1] < plain[1] - stacks / 2


def test_models_of_their_own_stay_on_disk_whatever_depths_are_kept():
    apart = "curriculum.plan=independent", "objective.kind=diffusion", "model.architecture.n_stacks=4"
    on_disk = lambda *changes: plan_run(setup_of(*apart, *changes), BIG).peak("disk")
    assert on_disk("run.keep_depths=1") == on_disk()
    assert disk("run.keep_depths=1", "model.architecture.n_stacks=4") < disk("model.architecture.n_stacks=4")


def test_a_cache_is_filled_anew_where_adapters_of_the_prefix_are_merged_or_begin():
    """As the engine does, whose key holds the bytes of the weights and adapters."""
    phases = "[{adapt: [0], train: [1]}, {train: [1]}, {train: [1]}, {train: [1], merge_adapters: true}]"
    setup = setup_of("curriculum.plan=custom", f"curriculum.phases={phases}", "cache.kind=host")
    first, *cached = setup.plan.phases
    assert first.prefix == () and [phase.prefix for phase in cached] == [(0,)] * 3
    advanced = [advanced_stacks(*pair, setup.loader()) for pair in pairwise(cached)]
    assert advanced == [0, None]
    bare = dataclasses.replace(cached[0], adapters=())
    assert advanced_stacks(bare, cached[1], setup.loader()) is None


def test_a_run_counts_the_flops_that_were_planned(tmp_path):
    """A streamed step computes its stacks again on the way back."""
    config = tiny("curriculum.plan=rackwise", "memory.offload=all", "curriculum.steps=1", "run.eval_batches=1")
    planned = plan_run(prepare(config, tmp_path), BIG).phases[0].flops
    train(config, tmp_path)
    assert summary(tmp_path)["phases"][0]["flops"] == planned


def test_time_is_that_of_the_computation_or_of_the_link_whichever_is_more():
    """A slow link decides; what passes it in a step is known."""
    peak, link = 1e12, 1e3
    timed = lambda setup, **sizes: plan_run(setup, Machine(Device("d", 10**15, **sizes), 10**15, 10**15)).phases[-1]
    append = "curriculum.plan=append", "curriculum.frozen=fp32", "cache.host_budget=1GB"
    cached, recomputed, waiting = (
        setup_of(*append, *more)
        for more in (
            ("cache.kind=host",),
            ("cache.kind=recompute",),
            ("cache.kind=recompute", "memory.offload=trunk"),
        )
    )
    phase = timed(recomputed, flops=(("fp32", peak), ("bf16", 1.0)), link=link)
    assert phase.seconds == pytest.approx(phase.flops / (peak * EFFICIENCY))  # nothing passes the link
    assert timed(recomputed).seconds is None and timed(recomputed, flops=(("bf16", peak),)).seconds is None
    slow = {"flops": (("fp32", 1e18),), "link": link}
    assert timed(cached, **slow).seconds == pytest.approx(3 * 4 * 16 * 32 * 4 / link)
    stack = size_of(waiting.rack.stacks[0].init_params(jax.random.key(0))) * 4
    assert timed(waiting, **slow).seconds == pytest.approx(3 * stack / link)
    all_of_it = "curriculum.plan=rackwise", "memory.offload=all", "optimizer.grad_clip=0", "model.freeze_up_proj=false"
    streamed = setup_of(*all_of_it)
    phase = timed(streamed, **slow)
    learning, state = (phase.demand.host[part].bytes for part in ("learning weights", "optimizer"))
    assert phase.seconds == pytest.approx(3 * (3 * learning + 2 * state) / link)
