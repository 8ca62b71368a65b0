"""Plans beside each other: which phases are equal, what stages and keys change, and how entries follow one another."""

import dataclasses
from itertools import pairwise

import pytest

from stackwise_jax.config import load_config
from stackwise_jax.curriculum import Noise, Phase, Plan, RackShape, make_plan, phase_table
from stackwise_jax.errors import UsageError

SHAPE = RackShape((2, 2, 2, 2))
DIFFUSION = "--objective.kind=diffusion"
DEPTH = f"{DIFFUSION} --objective.time=depth"


def plan_of(plan: str, line: str = "", shape: RackShape = SHAPE) -> Plan:
    return make_plan(load_config(None, [f"--curriculum.plan={plan}", *line.split()]), shape)


def plans_of(entries: str, line: str = "", shape: RackShape = SHAPE) -> Plan:
    return make_plan(load_config(None, [f"--curriculum.plans={entries}", *line.split()]), shape)


def refused(call, *arguments) -> str:
    with pytest.raises(UsageError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def unnamed(phase: Phase) -> Phase:
    return dataclasses.replace(phase, name="")


@pytest.mark.parametrize("task", ["", DIFFUSION, f"{DEPTH} --objective.schedule=cosine"])
@pytest.mark.parametrize("shape", [SHAPE, RackShape((2,)), RackShape((1, 2, 1), frozen=frozenset({0, 2}))])
def test_plans_that_train_everything_at_once_are_rackwise(shape, task):
    (rackwise,) = plan_of("rackwise", task, shape).phases
    n = len(shape.block_counts)
    everything = f"{task} --curriculum.stacks_per_stage=[{n}]"
    for plan in (plan_of("prepend", everything, shape), plan_of("cycle", everything, shape)):
        (phase,) = plan.phases
        assert unnamed(phase) == unnamed(rackwise)
    (joint,) = plan_of("joint", task, shape).phases
    assert unnamed(joint) == unnamed(rackwise)


@pytest.mark.parametrize("plan", ["stackwise", "append", "prepend", "grow", "keep_last", "cycle", "fusion", "joint"])
@pytest.mark.parametrize("task", ["", DEPTH])
def test_every_plan_over_one_stack_is_rackwise(plan, task):
    shape = RackShape((2,))
    (phase,) = plan_of(plan, task, shape).phases
    assert unnamed(phase) == unnamed(plan_of("rackwise", task, shape).phases[0])


@pytest.mark.parametrize("plan", ["append", "prepend", "grow", "keep_last", "cycle", "independent", "fusion", "joint"])
def test_stacks_with_freeze_blocks_never_learn(plan):
    shape = RackShape((2, 2, 2, 2), frozen=frozenset({0, 2}))
    adapt = "" if plan in ("grow", "cycle", "independent") else "--curriculum.trunk=adapt"
    phases = plan_of(plan, f"{DIFFUSION} {adapt}", shape).phases
    learning = [phase.learning for phase in phases]
    assert frozenset().union(*learning) == {1, 3} and all(learning)
    assert phases[0].train_embed or plan in ("fusion", "joint")


def test_prepend_ends_with_the_whole_rack():
    shape = RackShape((2, 2, 2), frozen=frozenset({0}))
    assert [phase.path for phase in plan_of("prepend", "", shape).phases] == [(2,), (0, 1, 2)]


@pytest.mark.parametrize(
    ("sizes", "expected"), [("[1]", [1, 1, 1, 1]), ("[3]", [3, 1]), ("[1,3]", [1, 3]), ("[2,1]", [2, 1, 1])]
)
@pytest.mark.parametrize("plan", ["stackwise", "append", "prepend", "cycle"])
def test_stacks_per_stage(plan, sizes, expected):
    phases = plan_of(plan, f"--curriculum.stacks_per_stage={sizes}").phases
    assert [len(phase.train) for phase in phases] == expected


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("append", [{0}, {0, 1}, {0, 1, 2}, {1, 2, 3}]),
        ("blockwise", [{0}, {0, 1}, {0, 1, 2}, {1, 2, 3}]),
        ("prepend", [{3}, {2, 3}, {1, 2, 3}, {0, 1, 2}]),
        ("keep_last", [{0, 3}, {0, 1, 3}, {0, 1, 2, 3}]),
    ],
)
def test_overlap_keeps_neighbours_learning(plan, expected):
    phases = plan_of(plan, "--curriculum.overlap=2").phases
    assert [phase.train for phase in phases] == expected
    embed = [True] * 4 if plan == "prepend" else [0 in stacks for stacks in expected]
    assert [phase.train_embed for phase in phases] == embed[: len(phases)]
    assert [phase.keep_optimizer for phase in phases] == [False] + [True] * (len(phases) - 1)


@pytest.mark.parametrize(
    ("plan", "auto"),
    [
        ("stackwise", [False] * 4),
        ("append", [False] * 4),
        ("prepend", [False] * 4),
        ("grow", [False, True, True, True]),
        ("keep_last", [False, True, True]),
        ("keep_last --curriculum.last_learns=false", [False, False, False]),
        ("cycle --curriculum.rounds=2", [False] + [True] * 7),
        ("independent", [False] * 4),
        ("rackwise", [False]),
    ],
)
def test_optimizer_state_at_borders(plan, auto):
    def kept(state: str) -> list[bool]:
        name, *line = plan.split()
        line = " ".join([DIFFUSION, f"--curriculum.optimizer_state={state}", *line])
        return [phase.keep_optimizer for phase in plan_of(name, line).phases]

    assert kept("auto") == auto
    assert kept("keep") == [False] + [True] * (len(auto) - 1)  # the head goes on
    assert kept("reset") == [False] * len(auto)


@pytest.mark.parametrize("key", ["train_embed", "train_head"])
def test_when_embedding_and_head_learn(key):
    def when(value: str) -> list[bool]:
        return [getattr(phase, key) for phase in plan_of("append", f"--curriculum.{key}={value}").phases]

    assert when("always") == [True] * 4 and when("never") == [False] * 4
    assert when("first") == [True, False, False, False] and when("last") == [False, False, False, True]
    assert when("auto") == ([True, False, False, False] if key == "train_embed" else [True] * 4)


def test_a_tied_head_may_learn_where_the_embedding_always_does():
    shape = dataclasses.replace(SHAPE, tied=True)
    assert len(plan_of("append", "--curriculum.train_embed=always", shape).phases) == 4
    assert len(plan_of("prepend", "", shape).phases) == 4


def test_the_rate_decays_in_the_last_phase_only():
    schedules = [phase.optimizer.schedule for phase in plan_of("append", "--curriculum.decay=last").phases]
    assert schedules == ["constant", "constant", "constant", "wsd"]
    entries = plans_of("[{plan: append, decay: last}, {plan: joint}]").phases
    assert [phase.optimizer.schedule for phase in entries] == [*schedules, "wsd"]
    own = "[{optimizer: {schedule: linear}}]"
    config = load_config(None, ["--curriculum.plan=append", "--curriculum.decay=last", f"--curriculum.stages={own}"])
    first, second, *_ = make_plan(config, SHAPE).phases
    assert (first.optimizer.schedule, second.optimizer.schedule) == ("linear", "constant")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_rate_decays_in_the_last_of_the_phases_that_are_spelled_out(n):
    phases = ", ".join(["{train: [0]}"] * n)
    config = load_config(
        None, ["--curriculum.plan=custom", "--curriculum.decay=last", f"--curriculum.phases=[{phases}]"]
    )
    schedules = [phase.optimizer.schedule for phase in make_plan(config, SHAPE).phases]
    assert schedules == ["constant"] * (n - 1) + ["wsd"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("append --curriculum.stages=[{name:a},{name:a}]", "curriculum.stages[1].name is 'a' as in an earlier phase"),
        ("custom --curriculum.phases=[{train:[0],name:a},{train:[1],name:a}]", "curriculum.phases[1].name is 'a'"),
        (
            "append --curriculum.trunk=adapt --curriculum.adapters.rank=0 --curriculum.adapters.trunk_rank=0",
            "curriculum.trunk is adapt and no stack has an adapter; write curriculum.adapters.rank or trunk_rank",
        ),
        (
            "append --curriculum.trunk=adapt --curriculum.adapters.merge=true --curriculum.stacks_per_stage=[2]",
            "curriculum.adapters.merge does nothing, since no phase begins with adapters that were there before",
        ),
        (
            "custom --curriculum.phases=[{train:[0]}] --curriculum.adapters.rank=3",
            "curriculum.adapters does nothing, since no phase has adapters; adapt stacks or leave it out",
        ),
    ],
)
def test_an_error_names_the_entry_or_the_key_that_is_wrong(line, expected):
    plan, *rest = line.replace(":", ": ").split(" --")
    config = [f"--curriculum.plan={plan}", *(f"--{part}" for part in rest)]
    assert refused(lambda: make_plan(load_config(None, config), SHAPE)).startswith(expected)


def test_a_phase_is_named_by_its_entry_if_it_has_one():
    tied = dataclasses.replace(SHAPE, tied=True)
    config = lambda entries: load_config(None, ["--curriculum.plan=append", f"--curriculum.stages={entries}"])
    assert refused(make_plan, config("[]"), tied).startswith("phase 'stack 1': the head learns")
    assert refused(make_plan, config("[{lr: 1}]"), tied).startswith("phase 'stack 1': the head learns")
    assert refused(make_plan, config("[{lr: 1}, {lr: 1}]"), tied).startswith("curriculum.stages[1]: the head learns")
    wrong = config("[{objective: {kind: mlm, mask_fraction: 7}}]")
    assert refused(make_plan, wrong, SHAPE).count("curriculum.stages[0]: ") == 1
    wrong = config("[{objective: {attention_mode: bidirectional}}]")
    assert refused(make_plan, wrong, SHAPE).startswith("curriculum.stages[0]: phase 'stack 0': objective clm")


def test_stages_have_settings_of_their_own():
    stages = """[{name: a, steps: 7, lr: 0.1}, {frozen: bf16, optimizer: {name: sgd, lr: 0.2}},
        {objective: {kind: diffusion, noise: elbo, attention_mode: model, corruption: fresh}}]"""
    line = [f"--curriculum.stages={stages}", "--curriculum.steps_growth=2", "--curriculum.steps=10"]
    config = load_config(None, [*line, "--curriculum.plan=append", "--curriculum.frozen_stacks=[fp16,fp16,fp16,fp16]"])
    a, b, c, d = make_plan(config, SHAPE).phases
    assert (a.name, b.name) == ("a", "stack 1")
    assert [phase.steps for phase in (a, b, c, d)] == [7, 20, 40, 80]
    assert (a.optimizer.name, a.optimizer.lr) == ("adamw", 0.1) and (b.optimizer.name, b.optimizer.lr) == ("sgd", 0.2)
    assert [phase.format_of(0) for phase in (a, b, c, d)] == ["fp16", "bf16", "fp16", "fp16"]
    assert (c.objective.kind, c.noise.kind, c.attention_mode, c.corruption) == ("diffusion", "elbo", None, "fresh")
    assert (d.objective.kind, d.noise, d.attention_mode, d.corruption) == ("clm", Noise(), "causal", "auto")


def test_new_stacks_begin_as_asked_and_only_where_they_join_others():
    for init in ("copy", "zero"):
        phases = plan_of("append", f"--curriculum.init={init}").phases
        assert [phase.init for phase in phases] == ["random", init, init, init]
    started = plan_of("grow", "--curriculum.init=copy --curriculum.stacks_per_stage=[4] --run.init_from=runs/shallow")
    assert [phase.init for phase in started.phases] == ["copy"]  # of the stacks that the other run gives
    later = plans_of("[{plan: keep_last}, {plan: append, init: copy}]").phases
    assert {phase.init for phase in later} == {"random"}  # all stacks are there


def test_custom_phases_grow_where_one_says_how():
    phases = "[{path: [0], train: [0]}, {path: [0, 1], train: [1], init: copy}, {train: [2], keep_optimizer: true}]"
    config = load_config(None, ["--curriculum.plan=custom", f"--curriculum.phases={phases}"])
    plan = make_plan(config, RackShape((1, 1, 1)))
    assert plan.start == frozenset() and [row["grow"] for row in phase_table(plan)] == [[0], [1], [2]]
    assert [phase.init for phase in plan.phases] == ["random", "copy", "random"]
    assert [phase.keep_optimizer for phase in plan.phases] == [False, False, True]


def test_consistency_holds_new_stacks_to_the_input_that_the_suffix_had():
    phases = plan_of("prepend", f"{DEPTH} --curriculum.consistency=0.5").phases
    assert phases[0].consistency is None
    for before, phase in pairwise(phases):
        assert phase.consistency and phase.consistency.weight == 0.5
        assert phase.consistency.noise == before.noise and phase.suffix == before.path
    for line in ("--curriculum.overlap=1", "--curriculum.trunk=adapt", "--curriculum.stacks_per_stage=[4]"):
        text = refused(plan_of, "prepend", f"--curriculum.consistency=1 {line}")
        assert text.startswith("curriculum.consistency does nothing")


def test_fusion_learns_what_is_named():
    assert plan_of("fusion").phases[0].train == {3}
    phase = plan_of("fusion", "--curriculum.learn=[1,2]").phases[0]
    assert (phase.prefix, phase.train, phase.suffix, phase.train_embed) == ((0,), {1, 2}, (3,), False)
    assert refused(plan_of, "fusion", "--curriculum.learn=[1,4]").startswith("curriculum.learn names the stacks [4]")


def test_entries_know_what_is_there_and_has_learned():
    plan = plans_of("[{plan: append}, {plan: cycle}, {plan: joint, stages: [{lr: 0.5}]}]")
    assert plan.start == frozenset() and [row["grow"] for row in phase_table(plan)] == [[0], [1], [2], [3]] + [[]] * 5
    assert [phase.keep_optimizer for phase in plan.phases] == [False] * 4 + [True] * 5
    assert [phase.name for phase in plan.phases[3:]] == ["stack 3", *(f"1 stack {i}" for i in range(4)), "joint"]
    assert plan.phases[-1].optimizer.lr == 0.5
    assert plans_of("[{plan: cycle}, {plan: append}]").start == {0, 1, 2, 3}
    assert plans_of("[{plan: layerwise}, {plan: layerwise}]").stack_sizes == (1,) * 8


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("[{plan: append}, {plan: layerwise}]", "curriculum.plans[1] cuts the rack into stacks of 1 + 1"),
        ("[{plan: append}, {plan: joint, overlap: 1}]", "curriculum.plans[1].overlap does nothing under"),
        ("[{plan: custom, phases: [{train: [9]}]}]", "curriculum.plans[0]: curriculum.phases[0]: stacks [9] do not"),
        ("[{adapters: {load_from: a}, trunk: adapt}]", "curriculum.plans[0].adapters.load_from is for the whole run"),
    ],
)
def test_impossible_entries_are_refused(entries, expected):
    assert refused(plans_of, entries).startswith(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rackwise --curriculum.overlap=2", "curriculum.overlap does nothing under curriculum.plan rackwise; leave it"),
        ("grow --curriculum.trunk=adapt", "curriculum.trunk does nothing under curriculum.plan grow; leave it out or"),
        ("stackwise --curriculum.init=copy", "curriculum.init does nothing under curriculum.plan stackwise"),
        ("append --curriculum.phases=[{}]", "curriculum.phases does nothing under curriculum.plan append"),
        ("append --curriculum.adapters.rank=2", "curriculum.adapters.rank does nothing under curriculum.trunk frozen"),
        ("append --curriculum.stages=[{},{},{},{},{}]", "curriculum.stages has 5 entries and the plan 4 phases"),
        ("append --curriculum.stages=[{name: a},{name: a}]", "curriculum.stages[1].name is 'a' as in an earlier phase"),
        (
            "append --curriculum.stages=[{},{level: 0.5}]",
            "curriculum.stages[1]: level is 0.5, which objective.kind clm",
        ),
        ("append --curriculum.stacks_per_stage=[2,2,1]", "curriculum.stacks_per_stage has 3 entries, and the first 2"),
        ("append --curriculum.frozen_stacks=[bf16]", "curriculum.frozen_stacks has 1 entries and the rack 4 stacks"),
        (
            "append --objective.interval_overlap=1",
            "objective.interval_overlap does nothing outside plan independent",
        ),
        ("independent", "curriculum.plan independent gives each stack its cut of the noise and does not go with"),
        (f"independent {DEPTH}", "curriculum.plan independent gives each stack its cut of the noise and does not"),
        (f"append {DEPTH} --objective.levels=[0.5]", "objective.levels has 1 entries and the rack 4 stacks"),
        ("custom --curriculum.phases=[{merge_adapters: true}]", "curriculum.phases[0].merge_adapters is true, and no"),
        ("custom --curriculum.phases=[{init: zero}]", "curriculum.phases[0].init is zero, and no stack joins others"),
        ("custom --curriculum.phases=[{adapt: [9]}]", "curriculum.phases[0]: stacks [9] do not exist"),
        ("custom --curriculum.phases=[{level: 0.5}]", "curriculum.phases[0]: level is 0.5, which objective.kind clm"),
    ],
)
def test_impossible_plans_are_refused(line, expected):
    name, *rest = line.split(" --")
    call = lambda: make_plan(load_config(None, [f"--curriculum.plan={name}", *(f"--{word}" for word in rest)]), SHAPE)
    assert refused(call).startswith(expected)


def test_a_key_that_does_nothing_names_the_plans_that_use_it():
    text = refused(plan_of, "append", "--curriculum.rounds=2")
    assert text.endswith("leave it out or use a plan that heeds it: cycle")
    text = refused(plans_of, "[{plan: append}]", "--curriculum.steps=5")
    assert text.startswith("curriculum.steps does nothing beside curriculum.plans; write it into the entries")
