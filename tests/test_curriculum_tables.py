"""The phase table of every plan as a golden text."""

import pytest

from stackwise_jax.config import load_config
from stackwise_jax.curriculum import PLANS, RackShape, format_phase_table, make_plan

GOLDEN = {
    "rackwise": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name  path  prefix  grow  learns          objective  attention  frozen  steps  lr
0      rack  0-2   -       -     embed 0-2 head  clm        causal     fp32    200    0.001
""",
    "stackwise": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name     path  prefix  grow  learns        objective  attention  frozen  steps  lr
0      stack 0  0     -       -     embed 0 head  clm        causal     fp32    200    0.001
1      stack 1  0-1   0       -     1 head        clm        causal     fp32    200    0.001
2      stack 2  0-2   0-1     -     2 head        clm        causal     fp32    200    0.001
""",
    "append": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name     path  prefix  grow  learns        objective  attention  frozen  steps  lr
0      stack 0  0     -       0     embed 0 head  clm        causal     fp32    200    0.001
1      stack 1  0-1   0       1     1 head        clm        causal     fp32    200    0.001
2      stack 2  0-2   0-1     2     2 head        clm        causal     fp32    200    0.001
""",
    "layerwise": """\
6 stacks, 6 blocks (1 + 1 + 1 + 1 + 1 + 1)
phase  name     path  prefix  grow  learns        objective  attention  frozen  steps  lr
0      stack 0  0     -       -     embed 0 head  clm        causal     fp32    200    0.001
1      stack 1  0-1   0       -     1 head        clm        causal     fp32    200    0.001
2      stack 2  0-2   0-1     -     2 head        clm        causal     fp32    200    0.001
3      stack 3  0-3   0-2     -     3 head        clm        causal     fp32    200    0.001
4      stack 4  0-4   0-3     -     4 head        clm        causal     fp32    200    0.001
5      stack 5  0-5   0-4     -     5 head        clm        causal     fp32    200    0.001
""",
    "blockwise --curriculum.block_size=3": """\
2 stacks, 6 blocks (3 + 3)
phase  name     path  prefix  grow  learns        objective  attention  frozen  steps  lr
0      stack 0  0     -       -     embed 0 head  clm        causal     fp32    200    0.001
1      stack 1  0-1   0       -     1 head        clm        causal     fp32    200    0.001
""",
    "stackwise --objective.kind=mlm --curriculum.frozen=bf16": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name     path  prefix  grow  learns        objective  attention      frozen  steps  lr
0      stack 0  0     -       -     embed 0 head  mlm 0.15   bidirectional  bf16    200    0.001
1      stack 1  0-1   0       -     1 head        mlm 0.15   bidirectional  bf16    200    0.001
2      stack 2  0-2   0-1     -     2 head        mlm 0.15   bidirectional  bf16    200    0.001
""",
    "rackwise --objective.kind=diffusion --objective.corruption=fresh --objective.schedule=cosine": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name  path  prefix  grow  learns          objective                        attention      frozen  steps  lr
0      rack  0-2   -       -     embed 0-2 head  diffusion 0.15-0.9 cosine fresh  bidirectional  fp32    200    0.001
""",
    "append --curriculum.trunk=adapt --curriculum.init=copy": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name     path  prefix  grow    learns        objective  attention  frozen  steps  lr
0      stack 0  0     -       0       embed 0 head  clm        causal     fp32    200    0.001
1      stack 1  0-1   -       1 copy  ~0 1 head     clm        causal     fp32    200    0.001
2      stack 2  0-2   -       2 copy  ~0-1 2 head   clm        causal     fp32    200    0.001
""",
    "append --curriculum.stacks_per_stage=[2,1] --curriculum.overlap=1 --curriculum.init=zero": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name        path  prefix  grow    learns          objective  attention  frozen  steps  lr
0      stacks 0-1  0-1   -       0-1     embed 0-1 head  clm        causal     fp32    200    0.001
1      stack 2     0-2   0       2 zero  1-2 head        clm        causal     fp32    200    0.001
""",
    "prepend --curriculum.consistency=0.1": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name     path  prefix  grow  learns        objective            attention  frozen  steps  lr
0      stack 2  2     -       2     embed 2 head  clm                  causal     fp32    200    0.001
1      stack 1  1-2   -       1     embed 1 head  clm consistency 0.1  causal     fp32    200    0.001
2      stack 0  0-2   -       0     embed 0 head  clm consistency 0.1  causal     fp32    200    0.001
""",
    "prepend --curriculum.trunk=adapt --curriculum.stacks_per_stage=[1,2]": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name        path  prefix  grow  learns             objective  attention  frozen  steps  lr
0      stack 2     2     -       2     embed 2 head       clm        causal     fp32    200    0.001
1      stacks 0-1  0-2   -       0-1   embed 0-1 ~2 head  clm        causal     fp32    200    0.001
""",
    "prepend --objective.kind=diffusion --objective.time=depth": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name     path  prefix  grow  learns        objective        attention      frozen  steps  lr
0      stack 2  2     -       2     embed 2 head  diffusion 0.15   bidirectional  fp32    200    0.001
1      stack 1  1-2   -       1     embed 1 head  diffusion 0.525  bidirectional  fp32    200    0.001
2      stack 0  0-2   -       0     embed 0 head  diffusion 0.9    bidirectional  fp32    200    0.001
""",
    "grow --curriculum.init=copy --curriculum.steps_growth=1.5": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name     path  prefix  grow    learns          objective  attention  frozen  steps  lr
0      stack 0  0     -       0       embed 0 head    clm        causal     fp32    200    0.001
1      stack 1  0-1   -       1 copy  embed 0-1 head  clm        causal     fp32    300    0.001
2      stack 2  0-2   -       2 copy  embed 0-2 head  clm        causal     fp32    450    0.001
""",
    "keep_last": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name        path  prefix  grow  learns          objective  attention  frozen  steps  lr
0      stacks 0,2  0,2   -       0,2   embed 0,2 head  clm        causal     fp32    200    0.001
1      stack 1     0-2   0       1     1-2 head        clm        causal     fp32    200    0.001
""",
    "keep_last --curriculum.last_learns=false --curriculum.trunk=adapt": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name        path  prefix  grow  learns          objective  attention  frozen  steps  lr
0      stacks 0,2  0,2   -       0,2   embed 0,2 head  clm        causal     fp32    200    0.001
1      stack 1     0-2   -       1     ~0,2 1 head     clm        causal     fp32    200    0.001
""",
    "cycle --curriculum.stacks_per_stage=[2] --curriculum.rounds=2": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name                path  prefix  grow  learns          objective  attention  frozen  steps  lr
0      round 0 stacks 0-1  0-2   -       -     embed 0-1 head  clm        causal     fp32    200    0.001
1      round 0 stack 2     0-2   0-1     -     2 head          clm        causal     fp32    200    0.001
2      round 1 stacks 0-1  0-2   -       -     embed 0-1 head  clm        causal     fp32    200    0.001
3      round 1 stack 2     0-2   0-1     -     2 head          clm        causal     fp32    200    0.001
""",
    "independent --objective.kind=diffusion": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name     path  prefix  grow  learns        objective                  attention      frozen  steps  lr
0      stack 0  0     -       -     embed 0 head  diffusion 0.65-0.9 linear  bidirectional  fp32    200    0.001
1      stack 1  1     -       -     embed 1 head  diffusion 0.4-0.65 linear  bidirectional  fp32    200    0.001
2      stack 2  2     -       -     embed 2 head  diffusion 0.15-0.4 linear  bidirectional  fp32    200    0.001
""",
    "fusion": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name    path  prefix  grow  learns  objective  attention  frozen  steps  lr
0      fusion  0-2   0-1     -     2 head  clm        causal     fp32    200    0.001
""",
    "fusion --curriculum.learn=[0,2] --curriculum.trunk=adapt": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name    path  prefix  grow  learns             objective  attention  frozen  steps  lr
0      fusion  0-2   -       -     embed 0,2 ~1 head  clm        causal     fp32    200    0.001
""",
    "joint": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name   path  prefix  grow  learns          objective  attention  frozen  steps  lr
0      joint  0-2   -       -     embed 0-2 head  clm        causal     fp32    200    0.001
""",
    "joint --curriculum.trunk=adapt": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name   path  prefix  grow  learns     objective  attention  frozen  steps  lr
0      joint  0-2   -       -     ~0-2 head  clm        causal     fp32    200    0.001
""",
    "stackwise --curriculum.frozen_stacks=[bf16,fp16,bf16]": """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name     path  prefix  grow  learns        objective  attention  frozen         steps  lr
0      stack 0  0     -       -     embed 0 head  clm        causal     fp32           200    0.001
1      stack 1  0-1   0       -     1 head        clm        causal     bf16           200    0.001
2      stack 2  0-2   0-1     -     2 head        clm        causal     bf16 0 fp16 1  200    0.001
""",
}

PLANS_TABLE = """\
3 stacks, 6 blocks (2 + 2 + 2)
phase  name       path  prefix  grow  learns          objective  attention  frozen  steps  lr
0      stack 0    0     -       0     embed 0 head    clm        causal     fp32    1334   0.001
1      stack 1    0-1   0       1     1 head          clm        causal     fp32    1333   0.001
2      stack 2    0-2   0-1     2     2 head          clm        causal     fp32    1333   0.001
3      1 stack 0  0-2   -       -     embed 0 head    clm        causal     fp32    334    0.001
4      1 stack 1  0-2   0       -     1 head          clm        causal     fp32    333    0.001
5      1 stack 2  0-2   0-1     -     2 head          clm        causal     fp32    333    0.001
6      joint      0-2   -       -     embed 0-2 head  clm        causal     fp32    1000   0.001
"""


@pytest.mark.parametrize("line", GOLDEN)
def test_phase_table(line):
    plan = make_plan(load_config(None, f"--curriculum.plan={line}".split()), RackShape((2, 2, 2)))
    assert format_phase_table(plan) + "\n" == GOLDEN[line]


def test_phase_table_of_plans_one_after_another():
    entries = "--curriculum.plans=[{plan: append, share: 4}, {plan: cycle}, {plan: joint}]"
    plan = make_plan(load_config(None, [entries, "--curriculum.budget=6K steps"]), RackShape((2, 2, 2)))
    assert format_phase_table(plan) + "\n" == PLANS_TABLE


def test_every_plan_has_a_golden_table():
    assert {line.split()[0] for line in GOLDEN} | {"custom"} == set(PLANS)
