"""Adapters of plans: who has which, who learns, ranks by depth, merging at borders."""

import pytest

from stackwise_jax.config import load_config
from stackwise_jax.config.schema import AdapterRow, AdaptersConfig
from stackwise_jax.curriculum import Plan, RackShape, make_plan, phase_table
from stackwise_jax.curriculum.adapter_ranks import adapter_spec, adapters_of
from stackwise_jax.errors import UsageError

SHAPE = RackShape((1, 1, 1))
ADAPT = "--curriculum.trunk=adapt"


def plan_of(*line: str, shape: RackShape = SHAPE) -> Plan:
    return make_plan(load_config(None, list(line)), shape)


def named(plan: Plan) -> list[list[tuple[int, str]]]:
    return [[(adapter.stack, adapter.name) for adapter in phase.adapters] for phase in plan.phases]


def both(*stacks: int) -> list[tuple[int, str]]:
    return [(stack, name) for stack in stacks for name in ("stack", "trunk")]


def test_a_stack_that_stops_learning_gets_both_adapters():
    plan = plan_of("--curriculum.plan=append", ADAPT, "--curriculum.adapters.lr=0.01")
    assert [phase.adapt for phase in plan.phases] == [set(), {0}, {0, 1}]
    assert named(plan) == [[], both(0), both(0, 1)]
    assert [phase.adapter_lr for phase in plan.phases] == [None, 0.01, 0.01]
    assert [phase.prefix for phase in plan.phases] == [(), (), ()]
    assert [phase.keep_optimizer for phase in plan.phases] == [False, False, True]  # adapters of stack 0 go on
    specs = {adapter.name: adapter.spec for adapter in plan.phases[2].adapters if adapter.stack == 0}
    assert (specs["stack"].rank, specs["stack"].alpha) == (8, 16.0)
    assert (specs["trunk"].rank, specs["trunk"].alpha) == (4, 8.0)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("stackwise", [set(), {0}, {0, 1}]),
        ("prepend", [set(), {2}, {1, 2}]),
        ("keep_last", [set(), {0}]),
        ("fusion", [{0, 1}]),
        ("joint", [{0, 1, 2}]),
    ],
)
def test_what_does_not_learn_adapts(plan, expected):
    assert [phase.adapt for phase in plan_of(f"--curriculum.plan={plan}", ADAPT).phases] == expected


def test_a_last_stack_that_stops_learning_adapts():
    plan = plan_of("--curriculum.plan=keep_last", "--curriculum.last_learns=false", ADAPT)
    assert [phase.adapt for phase in plan.phases] == [set(), {0, 2}]


def test_overlap_holds_adapters_back():
    plan = plan_of("--curriculum.plan=append", "--curriculum.overlap=1", ADAPT)
    assert named(plan) == [[], [], both(0)]


def test_trunk_adapters_come_with_new_stacks():
    assert named(plan_of("--curriculum.plan=joint", ADAPT)) == [[(0, "stack"), (1, "stack"), (2, "stack")]]
    line = [ADAPT, "--curriculum.adapters.rank=0"]
    assert named(plan_of("--curriculum.plan=joint", *line)) == [[(0, "trunk"), (1, "trunk"), (2, "trunk")]]
    assert named(plan_of("--curriculum.plan=append", *line))[2] == [(0, "trunk"), (1, "trunk")]
    with pytest.raises(UsageError, match=r"curriculum.trunk is adapt and no stack has an adapter"):
        plan_of("--curriculum.plan=append", *line, "--curriculum.adapters.trunk_rank=0")


def test_joint_with_adapters_trains_no_weights():
    (phase,) = plan_of("--curriculum.plan=joint", ADAPT, "--curriculum.train_head=never").phases
    assert (phase.train, phase.adapt, phase.train_embed, phase.train_head) == (set(), {0, 1, 2}, False, False)


def test_adapters_outlive_their_entry():
    entries = "[{plan: append, trunk: adapt}, {plan: joint}, {plan: joint, trunk: adapt, adapters: {rank: 2}}]"
    plan = plan_of(f"--curriculum.plans={entries}")
    everything, adapted = plan.phases[3:]
    assert everything.train == {0, 1, 2} and not everything.adapt
    assert [(a.stack, a.name) for a in everything.adapters] == both(0, 1)
    ranks = {(a.stack, a.name): a.spec.rank for a in adapted.adapters}
    assert ranks == dict.fromkeys([(0, "stack"), (1, "stack")], 8) | {(0, "trunk"): 4, (1, "trunk"): 4, (2, "stack"): 2}


def test_merging_happens_at_borders_where_adapters_exist():
    line = ["--curriculum.plan=append", ADAPT, "--curriculum.adapters.merge=true"]
    plan = plan_of(*line)
    assert [phase.merge_adapters for phase in plan.phases] == [False, False, True]
    assert [phase.keep_optimizer for phase in plan.phases] == [False] * 3  # they begin anew
    assert not any(phase.merge_adapters for phase in plan_of(*line[:2]).phases)
    entries = "[{plan: append, trunk: adapt}, {plan: joint, trunk: adapt, adapters: {merge: true}}]"
    assert [phase.merge_adapters for phase in plan_of(f"--curriculum.plans={entries}").phases] == [False] * 3 + [True]


def test_custom_phases_adapt():
    phases = """[{path: [0], train: [0], train_embed: true}, {path: [0, 1], train: [1], adapt: [0]},
        {adapt: [0, 2], train_head: false, merge_adapters: true, keep_optimizer: true}]"""
    plan = plan_of("--curriculum.plan=custom", f"--curriculum.phases={phases}", "--curriculum.adapters.dropout=0.1")
    assert [phase.adapt for phase in plan.phases] == [set(), {0}, {0, 2}]
    assert named(plan) == [[], both(0), both(0, 2)]
    assert [phase.merge_adapters for phase in plan.phases] == [False, False, True]
    row = phase_table(plan)[2]
    assert row["adapt"] == [0, 2] and row["adapters"][0]["spec"]["dropout"] == 0.1 and row["keep_optimizer"]
    frozen = RackShape((1, 1, 1), frozen=frozenset({0}))
    with pytest.raises(UsageError, match=r"curriculum.phases\[0\]: stacks \[0\] have freeze_blocks .* out of adapt"):
        plan_of("--curriculum.plan=custom", "--curriculum.phases=[{adapt: [0]}]", shape=frozen)


@pytest.mark.parametrize(
    ("pattern", "ranks", "alphas"),
    [
        ("constant", [6, 6, 6, 6], [3, 3, 3, 3]),
        ("increasing", [6, 12, 24, 48], [3, 6, 12, 24]),
        ("decreasing", [6, 3, 1, 1], [3, 1.5, 1, 1]),
        ("linear", [6, 12, 18, 24], [3, 6, 9, 12]),
    ],
)
def test_ranks_by_depth(pattern, ranks, alphas):
    adapters = AdaptersConfig(rank=6, alpha=3.0, strategy="progressive", rank_pattern=pattern, alpha_pattern=pattern)
    specs = [adapter_spec(adapters, "stack", stack, 4) for stack in range(4)]
    assert [spec.rank for spec in specs if spec] == ranks and [spec.alpha for spec in specs if spec] == alphas
    trunk = adapter_spec(adapters, "trunk", 1, 4)
    assert trunk and trunk.rank == {"constant": 4, "increasing": 8, "decreasing": 2, "linear": 8}[pattern]
    simple = adapter_spec(AdaptersConfig(rank=6, rank_pattern=pattern), "stack", 3, 4)
    assert simple and simple.rank == 6  # patterns are of strategy progressive


def test_a_table_gives_each_stack_its_rank():
    table = [AdapterRow(rank=4, alpha=1.0), AdapterRow(rank=0), AdapterRow(rank=2, alpha=9.0)]
    adapters = AdaptersConfig(strategy="variable", table=table, targets=["q", "v"])
    made = adapters_of(adapters, [2, 0, 1], 3, arrival=False)
    assert [(a.stack, a.name, a.spec.rank, a.spec.alpha) for a in made] == [
        (0, "stack", 4, 1.0),
        (1, "trunk", 4, 8.0),
        (2, "stack", 2, 9.0),
    ]
    assert made[0].spec.targets == ("q", "v")
    with pytest.raises(UsageError, match=r"curriculum.adapters.table has 3 rows and the rack 4 stacks"):
        adapters_of(adapters, [0], 4, arrival=True)
