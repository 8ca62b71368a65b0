"""Plans: their phases field by field, what cannot be run, and the shipped configurations."""

import json
from pathlib import Path

import pytest

from stackwise_jax.config import load_config, validate
from stackwise_jax.curriculum import PLANS, Noise, Plan, RackShape, format_phase_table, make_plan, phase_table
from stackwise_jax.errors import UsageError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
SHAPE = RackShape((2, 2, 2))


def plan_of(line: str = "", shape: RackShape = SHAPE) -> Plan:
    return make_plan(load_config(None, line.split()), shape)


def custom(phases: str, shape: RackShape = SHAPE, line: str = "") -> Plan:
    overrides = ["--curriculum.plan=custom", f"--curriculum.phases={phases}", *line.split()]
    return make_plan(load_config(None, overrides), shape)


def refused(call, *arguments) -> str:
    with pytest.raises(UsageError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


CUSTOM = """[
  {path: [0], train: [0], train_embed: true, name: first},
  {path: [0, 2], train: [2], steps: 5, lr: 5e-4, frozen: bf16},
  {path: [0, 1, 2], train: [0, 2], train_head: false, objective: {kind: diffusion, noise: elbo}},
  {train: [0, 1, 2], train_embed: true, objective: {kind: mlm, mask_fraction: 0.3, attention_mode: model}},
  {name: head}]"""

CUSTOM_TABLE = """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name     path  prefix  grow  learns          objective              attention      frozen  steps  lr
0      first    0     -       -     embed 0 head    clm                    causal         fp32    200    0.001
1      phase 1  0,2   0       -     2 head          clm                    causal         bf16    5      0.0005
2      phase 2  0-2   -       -     0,2             diffusion elbo linear  bidirectional  fp32    200    0.001
3      phase 3  0-2   -       -     embed 0-2 head  mlm 0.3                model          fp32    200    0.001
4      head     0-2   0-2     -     head            clm                    causal         fp32    200    0.001
"""


def test_phase_table_of_custom_phases():
    assert format_phase_table(custom(CUSTOM)) + "\n" == CUSTOM_TABLE


def test_what_exists_at_the_start():
    task = "--objective.kind=diffusion"  # independent needs it
    for name in set(PLANS) - {"custom"}:
        plan = plan_of(f"--curriculum.plan={name} {task}")
        everything = frozenset(range(len(plan.stack_sizes)))
        assert plan.start == (frozenset() if name in ("append", "prepend", "grow", "keep_last") else everything)
    assert custom("[{}]").start == {0, 1, 2}


def test_the_table_is_json_and_says_what_the_phases_say():
    plan = custom(CUSTOM, line="--run.seed=5 --optimizer.name=lion")
    rows = json.loads(json.dumps(phase_table(plan)))
    for row, phase in zip(rows, plan.phases, strict=True):
        assert (row["name"], row["path"], row["train"]) == (phase.name, list(phase.path), sorted(phase.train))
        assert (row["prefix"], row["window"]) == (list(phase.prefix), list(phase.window))
        assert row["steps"] == phase.steps and row["seed"] == phase.seed == 5
        assert row["optimizer"]["name"] == "lion" and row["optimizer"]["lr"] == phase.optimizer.lr
    assert rows[1]["blocks"] == [2, 2] and rows[3]["noise"]["low"] == 0.3 and rows[3]["attention_mode"] is None


@pytest.mark.parametrize(
    ("line", "noise", "mode"),
    [
        ("", Noise(), "causal"),
        ("--objective.attention_mode=model", Noise(), None),
        ("--objective.kind=mlm", Noise(kind="fixed", low=0.15, high=0.15), "bidirectional"),
        ("--objective.kind=mlm --objective.attention_mode=causal", Noise(kind="fixed", low=0.15, high=0.15), "causal"),
        ("--objective.kind=diffusion", Noise(kind="range", low=0.15, high=0.9), "bidirectional"),
        (
            "--objective.kind=diffusion --objective.noise=elbo --objective.schedule=exponential",
            Noise(kind="elbo", low=0.0, high=1.0, schedule="exponential"),
            "bidirectional",
        ),
    ],
)
def test_objective_noise_and_attention(line, noise, mode):
    for phase in plan_of(line).phases:
        assert (phase.noise, phase.attention_mode) == (noise, mode)


def test_corruption_belongs_to_objectives_that_corrupt():
    assert plan_of("--objective.corruption=fixed").phases[0].corruption == "auto"
    assert plan_of("--objective.corruption=fixed --objective.kind=mlm").phases[0].corruption == "fixed"


def test_frozen_stacks_are_passed_but_never_trained():
    shape = RackShape((2, 2, 2), frozen=frozenset({0, 1}))
    (last,) = plan_of("", shape).phases
    assert last.path == (0, 1, 2) and last.train == {2} and last.train_embed and last.train_head
    assert plan_of("--curriculum.plan=rackwise", shape).phases[0].train == {2}
    middle = plan_of("", RackShape((2, 2, 2), frozen=frozenset({1}))).phases
    assert [phase.name for phase in middle] == ["stack 0", "stack 2"] and middle[1].prefix == (0, 1)
    nothing = RackShape((2,), frozen=frozenset({0}))
    assert plan_of("--curriculum.plan=rackwise", nothing).phases[0].train == frozenset()
    assert refused(plan_of, "", nothing).endswith("use curriculum.plan rackwise")


def test_regrouping_keeps_frozen_blocks_apart():
    shape = RackShape((2, 2, 4), frozen=frozenset({1}))
    plan = plan_of("--curriculum.plan=layerwise", shape)
    assert plan.stack_sizes == (1,) * 8
    assert [min(phase.train) for phase in plan.phases] == [0, 1, 4, 5, 6, 7]
    plan = plan_of("--curriculum.plan=blockwise --curriculum.block_size=2", shape)
    assert plan.stack_sizes == (2, 2, 2, 2) and [min(phase.train) for phase in plan.phases] == [0, 2, 3]
    text = refused(plan_of, "--curriculum.plan=blockwise --curriculum.block_size=4", shape)
    assert text.startswith("curriculum.block_size 4 does not divide 2 neighbouring blocks")


def test_block_size_divides_the_rack():
    text = refused(plan_of, "--curriculum.plan=blockwise --curriculum.block_size=4")
    assert text == "curriculum.block_size 4 does not divide the rack's 6 blocks; write a divisor of 6"


@pytest.mark.parametrize("name", ["stackwise", "append", "layerwise", "blockwise"])
def test_a_tied_head_cannot_learn_over_a_fixed_embedding(name):
    line = f"--curriculum.plan={name} --model.tie_embeddings=true"
    assert "model.tie_embeddings false" in refused(make_plan, load_config(None, line.split()))
    assert make_plan(load_config(None, ["--model.tie_embeddings=true", "--curriculum.plan=rackwise"]))
    one = RackShape((2,), tied=True)
    assert len(plan_of("", one).phases) == 1


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ("[]", "curriculum.plan is custom and curriculum.phases is empty"),
        ("[{path: [0, 3], train: [0]}]", "curriculum.phases[0]: stacks [3] do not exist; the rack has the stacks 0-2"),
        ("[{}, {train: [7]}]", "curriculum.phases[1]: stacks [7] do not exist"),
        ("[{path: [0], train: [1]}]", "curriculum.phases[0]: stacks [1] have freeze_blocks and cannot learn"),
        (
            "[{path: [0], train: [2]}]",
            "curriculum.phases[0]: phase 'phase 0': stacks [2] learn but are not on",
        ),
        ("[{path: [0, 0], train: [0]}]", "curriculum.phases[0]: phase 'phase 0': path [0, 0] names a stack twice"),
        ("[{train_head: false}]", "curriculum.phases[0]: phase 'phase 0': nothing learns"),
        ("[{steps: 0}]", "curriculum.phases[0]: phase 'phase 0': steps is 0; write at least 1"),
        ("[{name: a}, {name: a}]", "curriculum.phases[1].name is 'a' as in an earlier phase; write another name"),
        (
            "[{objective: {kind: clm, attention_mode: bidirectional}}]",
            "curriculum.phases[0]: phase 'phase 0': objective clm sees its own targets",
        ),
        ("[{objective: {kind: mlm, mask_fraction: 1}}]", "curriculum.phases[0]: objective.mask_fraction 1.0"),
    ],
)
def test_impossible_phases_are_refused(phases, expected):
    shape = RackShape((2, 2, 2), frozen=frozenset({1}))
    assert refused(custom, phases, shape).startswith(expected)


def test_a_custom_phase_cannot_train_a_tied_head_alone():
    shape = RackShape((2, 2), tied=True)
    text = refused(custom, "[{train: [0, 1], train_embed: true}, {train: [1]}]", shape)
    assert text.startswith("curriculum.phases[1]: the head learns and the embedding, which is tied to it, does not;")
    assert len(custom("[{train: [0, 1], train_embed: true}, {train: [1], train_head: false}]", shape).phases) == 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_makes_its_plan(path):
    config = load_config(path)
    if config.data.source == "text":  # of the user, who names it
        config = load_config(path, [f"--data.path={__file__}"])
    validate(config)
    plan = make_plan(config)
    assert sum(plan.stack_sizes) == config.model.architecture.n_stacks * config.model.architecture.blocks_per_stack
    assert format_phase_table(plan)


def test_each_plan_and_objective_is_shipped():
    configs = [load_config(path) for path in CONFIGS]
    plans = {entry.plan for config in configs for entry in (config.curriculum.plans or [config.curriculum])}
    assert plans == set(PLANS)
    assert {config.objective.time for config in configs} == {"none", "depth", "input"}
    assert {config.objective.kind for config in configs} == {"clm", "mlm", "diffusion"}
