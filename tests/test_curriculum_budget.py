"""Budgets: steps scaled to a number of steps, tokens or FLOPs."""

import dataclasses
import random

import pytest

from stackwise_jax.config import load_config
from stackwise_jax.config.checks import parse_budget
from stackwise_jax.curriculum import Phase, Plan, RackShape, make_plan
from stackwise_jax.curriculum.budget import scale_steps
from stackwise_jax.errors import UsageError

APPEND_JOINT = "--curriculum.plans=[{plan: append, share: 0.8}, {plan: joint, share: 0.2}]"


def step_flops(sizes: tuple[int, ...], phase: Phase) -> int:
    return 1000 * sum(sizes[stack] * (3 if stack in phase.train else 1) for stack in phase.path)


SHAPE = RackShape((2, 2, 2), step_flops=step_flops)


def plan_of(budget: str, *line: str, shape: RackShape = SHAPE) -> Plan:
    return make_plan(load_config(None, [f"--curriculum.budget={budget}", *line]), shape)


def flops(plan: Plan) -> int:
    return sum(phase.steps * step_flops(plan.stack_sizes, phase) for phase in plan.phases)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3000 steps", (3000, "steps")),
        ("1 step", (1, "steps")),
        ("5M tokens", (5_000_000, "tokens")),
        ("1.5B tokens", (1_500_000_000, "tokens")),
        ("1.5 G Tokens", (1_500_000_000, "tokens")),
        ("2k steps", (2000, "steps")),
        ("2e15 flops", (2 * 10**15, "flops")),
        ("2.5E+15FLOPs", (25 * 10**14, "flops")),
        ("3T flops", (3 * 10**12, "flops")),
        ("0.1P flops", (10**14, "flops")),
    ],
)
def test_amounts(text, expected):
    assert parse_budget(text) == expected


@pytest.mark.parametrize(
    "text", ["", "3000", "steps", "0 steps", "-1 steps", "5X tokens", "2e-3 flops", "5M bytes", "1e999 steps"]
)
def test_what_is_no_amount(text):
    with pytest.raises(UsageError, match=r"curriculum.budget is .*; write an amount such as"):
        parse_budget(text)


@pytest.mark.parametrize("line", ["", "--curriculum.steps_growth=1.7", "--curriculum.stages=[{steps: 1}]"])
@pytest.mark.parametrize("plan", ["append", "prepend", "grow", "cycle", "rackwise"])
def test_the_budget_is_met_and_not_exceeded(plan, line):
    lines = [f"--curriculum.plan={plan}", *([line] if line and (plan, "growth" in line) != ("rackwise", True) else [])]
    plain = make_plan(load_config(None, lines), SHAPE)
    assert sum(phase.steps for phase in plan_of("1234 steps", *lines).phases) == 1234
    tokens = plan_of("1M tokens", *lines)
    assert sum(phase.steps for phase in tokens.phases) == 10**6 // (16 * 256)
    by_flops = plan_of("1e8 flops", *lines)
    cheapest = min(step_flops(by_flops.stack_sizes, phase) for phase in by_flops.phases)
    assert 0 <= 10**8 - flops(by_flops) < cheapest
    # in proportion, but for rounding; all else is as it was
    scale = sum(phase.steps for phase in by_flops.phases) / sum(phase.steps for phase in plain.phases)
    for before, after in zip(plain.phases, by_flops.phases, strict=True):
        assert abs(after.steps - max(scale * before.steps, 1)) <= 4
        assert dataclasses.replace(after, steps=before.steps) == before


def test_entries_get_their_shares():
    plan = plan_of("1000 steps", APPEND_JOINT)
    assert [phase.steps for phase in plan.phases] == [267, 267, 266, 200]
    by_flops = plan_of("1e9 flops", APPEND_JOINT)
    joint = by_flops.phases[-1]
    assert joint.steps * step_flops((2, 2, 2), joint) == pytest.approx(2e8, rel=1e-3)
    assert 0 <= 10**9 - flops(by_flops) < step_flops((2, 2, 2), joint)


def test_every_phase_gets_a_step():
    stages = "--curriculum.stages=[{steps: 1}, {steps: 100000}, {steps: 1}]"
    assert [phase.steps for phase in plan_of("10 steps", stages).phases] == [1, 8, 1]
    assert [phase.steps for phase in plan_of("3 steps", stages).phases] == [1, 1, 1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["2 steps"], "curriculum.budget comes to 2, less than one step for each of the 3 phases (3); write a larger"),
        (["4000 tokens"], "curriculum.budget comes to 4000, less than one step for each of the 3 phases (12288)"),
        (["1e3 flops"], "curriculum.budget comes to 1000, less than one step"),
        (["3 steps", APPEND_JOINT], "curriculum.budget comes to 3, and the share of curriculum.plans[0] is 2.4, less"),
    ],
)
def test_an_impossible_budget_is_refused(line, expected):
    with pytest.raises(UsageError) as error:
        plan_of(*line)
    assert str(error.value).startswith(expected)


def test_flops_need_the_shape_of_the_rack():
    with pytest.raises(UsageError, match="the FLOPs of a step are not known here; write a budget in steps or tokens"):
        plan_of("1e9 flops", shape=RackShape((2, 2)))


def test_scaling_is_exact_for_any_costs():
    draw = random.Random(0)
    for _ in range(200):
        entries = [
            [(draw.randint(1, 500), draw.randint(1, 10**12)) for _ in range(draw.randint(1, 5))]
            for _ in range(draw.randint(1, 3))
        ]
        shares = [draw.uniform(0.5, 2.0) for _ in entries]
        budget = draw.randint(10**14, 10**16)
        scaled = scale_steps(entries, shares, budget)
        assert all(steps >= 1 for entry in scaled for steps in entry)
        cost = sum(
            n * c for steps, entry in zip(scaled, entries, strict=True) for n, (_, c) in zip(steps, entry, strict=True)
        )
        assert 0 <= budget - cost < min(c for _, c in entries[-1])
