"""A plan that was written down is read back to an equal plan, and to nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from stackwise_jax.config import load_config
from stackwise_jax.curriculum import (
    PLANS,
    Phase,
    RackShape,
    check_rows,
    first_difference,
    make_plan,
    plan_from_json,
    plan_to_json,
)
from stackwise_jax.errors import UsageError

SHAPE = RackShape((2, 1, 1))
MORE = {
    "custom": [
        "--curriculum.phases=[{name: a, path: [1, 0], train: [1], steps: 7, lr: 0.1}, {adapt: [2], frozen: nf4}]"
    ],
    "prepend": ["--objective.kind=diffusion", "--objective.time=depth", "--curriculum.consistency=0.3"],
    "independent": ["--objective.kind=diffusion", "--objective.noise=elbo"],
    "append": ["--curriculum.trunk=adapt", "--curriculum.adapters.merge=true", "--curriculum.adapters.lr=0.3"],
    "stackwise": ["--curriculum.frozen_stacks=[nf4, bf16, int8]", "--objective.kind=mlm", "--curriculum.decay=last"],
    "grow": ["--curriculum.init=copy", "--optimizer.name=muon", "--optimizer.grad_clip=0"],
}
UNLIKE = ("layerwise", "blockwise")  # they cut the rack anew


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_comes_back_equal(name):
    shape = RackShape((4,)) if name in UNLIKE else SHAPE
    plan = make_plan(load_config(None, [f"--curriculum.plan={name}", *MORE.get(name, [])]), shape)
    again = plan_from_json(json.loads(json.dumps(plan_to_json(plan))))
    assert again == plan and [type(p.path) for p in again.phases] == [tuple] * len(plan.phases)


def rows() -> list[dict]:
    return plan_to_json(make_plan(load_config(None, ["--curriculum.plan=append", *MORE["append"]]), SHAPE))


FIELDS = [field.name for field in dataclasses.fields(Phase)] + ["stack_sizes", "existing"]
REQUIRED = ["name", "path", "stack_sizes", "existing"]


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_wrong_is_named(name):
    given = rows()
    given[0][name] = {"no": "such"}
    with pytest.raises(UsageError, match=name):
        plan_from_json(given)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_field_without_a_default_that_is_missing_is_named(name):
    given = rows()
    del given[0][name]
    with pytest.raises(UsageError, match=name):
        plan_from_json(given)


def test_fields_that_are_newer_than_a_plan_have_their_defaults():
    given, plan = rows(), plan_from_json(rows())
    for row in given:
        for name in ("corruption", "keep_optimizer", "frozen_stacks", "blocks"):
            del row[name]
        del row["optimizer"]["b2"], row["noise"]["schedule"]
        for adapter in row["adapters"]:
            del adapter["spec"]["dropout"]
    assert plan_from_json(given) == plan
    assert plan.phases[1].steps != Phase(name="a", path=(0,), train_head=True).steps
    del given[1]["steps"]
    assert plan_from_json(given).phases[1].steps == 1  # the default, and not what the configuration says


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r[1].update(prefix=[1]), "prefix"),  # it follows from others
        (lambda r: r[1].update(stack_sizes=[9, 9, 9]), "stack_sizes"),
        (lambda r: r[1].update(train=[2.0]), "train"),
        (lambda r: r[1].update(steps=True), "steps"),
        (lambda r: r[1].update(noise=r[1]["noise"] | {"low": "0"}), "low"),
        (lambda r: r[1]["optimizer"].update(name="adamw9"), "name"),
        (lambda r: r[1]["optimizer"].update(b9=1), "b9"),
        (lambda r: r[1]["adapters"][0].pop("spec"), "spec"),
        (lambda r: r[1].update(what=1), "what"),
        (lambda r: r[1].update(path=[7]), "stack"),
        (lambda r: r[1].update(steps=0), "steps is 0"),
        (lambda r: r[0].update(stack_sizes=[]), "stack_sizes"),
    ],
)
def test_what_is_no_plan_is_refused_by_name(change, words):
    given = rows()
    change(given)
    with pytest.raises(UsageError, match=words):
        plan_from_json(given)


@pytest.mark.parametrize("given", [None, [], {}, [1], "text"])
def test_what_is_no_list_of_phases_is_refused(given):
    with pytest.raises(UsageError, match="no list of phases"):
        check_rows(given)


def test_the_first_difference_names_phase_and_field():
    ours, theirs = rows(), rows()
    assert first_difference(ours, theirs) is None
    theirs[2]["optimizer"]["lr"] = 0.5
    assert first_difference(ours, theirs) == ("stack 2", "optimizer.lr", "0.001", "0.5")
    assert first_difference(ours, theirs[:2]) == ("stack 2", "the number of phases", "3", "2")
    less = copy.deepcopy(ours)
    del less[1]["existing"]
    assert first_difference(less, ours) is not None and first_difference(less, ours, partial=True) is None
