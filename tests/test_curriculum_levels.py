"""Noise by depth: the levels of stacks, the cuts of the plan independent, and which phases see which."""

import jax.numpy as jnp
import pytest

from stackwise_jax.config import load_config
from stackwise_jax.config.schema import ObjectiveConfig
from stackwise_jax.curriculum import Noise, Plan, RackShape, make_plan, noise_cut, stack_levels
from stackwise_jax.curriculum.levels import schedule_share
from stackwise_jax.objectives.schedules import SCHEDULES

SHAPE = RackShape((1, 1, 1, 1))
LEVELS = (0.9, 0.65, 0.4, 0.15)


def plan_of(*line: str, shape: RackShape = SHAPE) -> Plan:
    return make_plan(load_config(None, ["--objective.kind=diffusion", *line]), shape)


def fixed(level: float) -> Noise:
    return Noise(kind="fixed", low=level, high=level)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_those_of_the_objectives(schedule):
    for i in range(17):
        expected = float(SCHEDULES[schedule].share(jnp.float32(i / 16)))
        assert schedule_share(schedule, i / 16) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_fall_from_the_highest_to_the_lowest(schedule):
    levels = stack_levels(ObjectiveConfig(kind="diffusion", schedule=schedule), 5)
    assert (levels[0], levels[-1]) == (0.9, 0.15) and list(levels) == sorted(levels, reverse=True)
    assert levels[2] == pytest.approx(0.15 + 0.75 * schedule_share(schedule, 0.5))
    assert stack_levels(ObjectiveConfig(schedule=schedule), 1) == (0.9,)


def test_levels_may_be_listed():
    assert stack_levels(ObjectiveConfig(levels=[0.8, 0.8, 0.1]), 3) == (0.8, 0.8, 0.1)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("stackwise", LEVELS),
        ("append", LEVELS),
        ("prepend", LEVELS[::-1]),
        ("keep_last", LEVELS[:3]),
    ],
)
def test_a_stage_works_at_the_level_of_its_new_stacks(plan, expected):
    for overlap in (0, 1):
        line = ["--objective.time=depth", f"--curriculum.plan={plan}", f"--curriculum.overlap={overlap}"]
        assert [phase.noise.kind for phase in plan_of(*line).phases] == ["fixed"] * len(expected)
        assert [phase.noise.low for phase in plan_of(*line).phases] == pytest.approx(expected)


def test_the_leftmost_of_several_new_stacks_counts():
    line = ["--objective.time=depth", "--curriculum.stacks_per_stage=[2]"]
    for plan, expected in (("append", [0.9, 0.4]), ("prepend", [0.4, 0.9])):
        phases = plan_of(*line, f"--curriculum.plan={plan}").phases
        assert [phase.noise.low for phase in phases] == pytest.approx(expected)
    frozen = RackShape((1, 1, 1, 1), frozen=frozenset({0}))
    assert plan_of("--objective.time=depth", shape=frozen).phases[0].noise == fixed(LEVELS[1])


@pytest.mark.parametrize("plan", ["rackwise", "joint", "grow", "cycle", "fusion"])
def test_where_the_whole_depth_works_all_levels_are_seen(plan):
    line = ["--objective.time=depth", "--objective.schedule=cosine", f"--curriculum.plan={plan}"]
    expected = Noise(kind="range", low=0.15, high=0.9, schedule="cosine")
    assert {phase.noise for phase in plan_of(*line).phases} == {expected}
    listed = plan_of(*line, "--objective.levels=[0.7,0.6,0.3,0.2]").phases[-1].noise
    assert (listed.kind, listed.low, listed.high) == ("range", 0.2, 0.7)
    assert plan_of(*line, "--objective.levels=[0.5,0.5,0.5,0.5]").phases[-1].noise == fixed(0.5)
    assert plan_of(*line, "--objective.noise=elbo").phases[-1].noise.kind == "elbo"


@pytest.mark.parametrize("plan", ["append", "independent", "joint"])
def test_a_stage_may_say_its_level(plan):
    stages = "--curriculum.stages=[{level: 0.33}]"
    assert plan_of(f"--curriculum.plan={plan}", stages).phases[0].noise == fixed(0.33)
    if plan != "independent":
        assert plan_of(f"--curriculum.plan={plan}", "--objective.time=depth", stages).phases[0].noise == fixed(0.33)


def test_custom_phases_have_levels():
    phases = "--curriculum.phases=[{level: 1}, {name: b}]"
    first, second = plan_of("--curriculum.plan=custom", "--objective.time=depth", phases).phases
    assert first.noise == fixed(1.0) and (second.noise.low, second.noise.high) == (0.15, 0.9)


@pytest.mark.parametrize(("noise", "low", "high"), [("elbo", 0.0, 1.0), ("range", 0.15, 0.9)])
@pytest.mark.parametrize("n", [1, 3, 7, 10])
def test_cuts_cover_the_noise_without_gaps(noise, low, high, n):
    objective = ObjectiveConfig(kind="diffusion", noise=noise, schedule="cosine")
    cuts = [noise_cut(objective, stack, n) for stack in range(n)]
    assert (cuts[0].high, cuts[-1].low) == (high, low)
    assert [cut.low for cut in cuts[:-1]] == [cut.high for cut in cuts[1:]]  # exactly, so that bounds add up
    assert [cut.high - cut.low for cut in cuts] == pytest.approx([(high - low) / n] * n)
    assert {(cut.kind, cut.schedule) for cut in cuts} == {(noise, "cosine")}


def test_cuts_reach_into_their_neighbours_and_not_beyond_the_ends():
    objective = ObjectiveConfig(kind="diffusion", noise="elbo", interval_overlap=0.5)
    cuts = [(cut.low, cut.high) for cut in (noise_cut(objective, stack, 4) for stack in range(4))]
    assert cuts == [(0.625, 1.0), (0.375, 0.875), (0.125, 0.625), (0.0, 0.375)]


def test_independent_trains_each_stack_alone_on_its_cut():
    plan = plan_of("--curriculum.plan=independent", "--objective.noise=elbo", "--objective.time=input")
    objective = ObjectiveConfig(kind="diffusion", noise="elbo")
    for stack, phase in enumerate(plan.phases):
        assert phase.path == (stack,) and phase.train == {stack} and phase.train_embed and phase.train_head
        assert phase.noise == noise_cut(objective, stack, 4)
    own = "--curriculum.stages=[{objective: {kind: diffusion, noise: range}}]"
    first = plan_of("--curriculum.plan=independent", "--objective.noise=elbo", own).phases[0]
    assert first.noise == noise_cut(ObjectiveConfig(kind="diffusion"), 0, 4)
