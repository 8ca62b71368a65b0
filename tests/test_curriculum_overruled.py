"""What the user wrote and something else wins over: a line each, and that such a key really changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from key_observers import cache_choice, paths, phases, rates, steps, text, tokenizer
from test_dead_keys import TINY, configure

from stackwise_jax.config import load_config, load_written, resolved_yaml, validate
from stackwise_jax.curriculum import overruled
from stackwise_jax.train import main as train


def lines(line: str, **how) -> list[str]:
    config, written = load_written(None, [f"--{part}" for part in line.split()])
    validate(config, files=False)
    return overruled(config, written, **how)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("objective.mask_fraction=0.3", "objective.mask_fraction has no effect under objective.kind clm"),
        ("objective.kind=diffusion objective.mask_fraction=0.3", "objective.mask_fraction has no effect under"),
        (
            "objective.kind=mlm objective.min_fraction=0.1",
            "objective.min_fraction has no effect under objective.kind mlm",
        ),
        ("objective.schedule=cosine", "objective.schedule has no effect under objective.kind clm"),
        ("objective.corruption=fixed", "objective.corruption has no effect under objective.kind clm"),
        (
            "objective.kind=diffusion objective.noise=elbo objective.max_fraction=0.8",
            "objective.max_fraction has no effect under objective.noise elbo",
        ),
        (
            "objective.kind=diffusion objective.time=depth objective.levels=[1,1,1,1] objective.max_fraction=0.8",
            "objective.max_fraction has no effect under objective.levels [1.0, 1.0, 1.0, 1.0]",
        ),
        ("run.dir=x run.name=y", "run.name has no effect under run.dir x"),
        ("run.sample_tokens=0 run.sample_prompt=A", "run.sample_prompt has no effect under run.sample_tokens 0"),
        ("data.text_key=body", "data.text_key has no effect under data.source python-docs"),
        ("data.valid_path=. data.valid_fraction=0.1", "data.valid_fraction has no effect under data.valid_path ."),
        ("data.synthetic_tokens=5000", "data.synthetic_tokens has no effect under data.source python-docs"),
        ("tokenizer.vocab_size=300", "tokenizer.vocab_size has no effect under tokenizer.kind bytes"),
        ("tokenizer.path=x.model", "tokenizer.path has no effect under tokenizer.kind bytes"),
        (
            "model.vocab_size=300 model.vocab_multiple=64",
            "model.vocab_multiple has no effect under model.vocab_size 300",
        ),
        ("model.use_rope=false model.rope_theta=5", "model.rope_theta has no effect under model.use_rope false"),
        ("model.time_embedding=learned", "model.time_embedding has no effect under objective.time none"),
        ("model.kernel.features=128", "model.kernel.features has no effect without model.kernel.type"),
        ("model.quantized_matmul=native", "model.quantized_matmul has no effect without a format int8 or fp8"),
        (
            "optimizer.schedule=cosine optimizer.decay=0.1",
            "optimizer.decay has no effect under optimizer.schedule cosine",
        ),
        (
            "optimizer.schedule=constant optimizer.final_lr=0.1",
            "optimizer.final_lr has no effect under optimizer.schedule",
        ),
        ("optimizer.name=sgd optimizer.b2=0.9", "optimizer.b2 has no effect under optimizer.name sgd"),
        ("optimizer.name=lion optimizer.eps=1e-6", "optimizer.eps has no effect under optimizer.name lion"),
        ("optimizer.name=adafactor optimizer.b1=0.8", "optimizer.b1 has no effect under optimizer.name adafactor"),
        ("optimizer.grad_clip=0 optimizer.clip=stack", "optimizer.clip has no effect under optimizer.grad_clip 0.0"),
        ("cache.kind=recompute cache.read_ahead=3", "cache.read_ahead has no effect under cache.kind recompute"),
        ("cache.kind=disk cache.host_budget=1GB", "cache.host_budget has no effect under cache.kind disk"),
        ("curriculum.plan=rackwise cache.kind=disk", "cache.kind has no effect under curriculum.plan rackwise"),
        (
            "curriculum.plan=rackwise curriculum.frozen=nf4",
            "curriculum.frozen has no effect under curriculum.plan rackwise",
        ),
        ("memory.offload_to=disk", "memory.offload_to has no effect under memory.offload none"),
        ("memory.stack_inputs=host", "memory.stack_inputs has no effect under memory.offload none"),
        ("mesh.coordinator=localhost:1", "mesh.coordinator has no effect under mesh.num_processes 1"),
        (
            "curriculum.budget=60steps curriculum.steps=7",
            "curriculum.steps has no effect under curriculum.budget 60steps",
        ),
        ("curriculum.rounds=1", "curriculum.rounds has no effect under curriculum.plan stackwise"),
        ("curriculum.phases=[]", "curriculum.phases has no effect under curriculum.plan stackwise"),
        (
            "curriculum.plan=cycle curriculum.adapters.rank=8",
            "curriculum.adapters.rank has no effect under curriculum.plan",
        ),
        ("curriculum.adapters.rank=8", "curriculum.adapters.rank has no effect under curriculum.trunk frozen"),
        (
            "curriculum.trunk=adapt curriculum.adapters.rank_pattern=linear",
            "curriculum.adapters.rank_pattern has no effect under curriculum.adapters.strategy simplified",
        ),
        ("curriculum.plans=[{}] curriculum.steps=200", "curriculum.steps has no effect beside curriculum.plans"),
        (
            'curriculum.plans=[{"rounds":1}]',
            "curriculum.plans[0].rounds has no effect under curriculum.plans[0].plan stackwise",
        ),
        (
            'curriculum.stages=[{"lr":0.1,"optimizer":{"lr":0.2}}]',
            "curriculum.stages[0].optimizer.lr has no effect under curriculum.stages[0].lr 0.1",
        ),
        (
            'curriculum.stages=[{"level":0.5,"objective":{"kind":"diffusion","noise":"elbo"}}]',
            "curriculum.stages[0].objective.noise has no effect under curriculum.stages[0].level 0.5",
        ),
        (
            'curriculum.plan=custom curriculum.steps=9 curriculum.phases=[{"steps":3}]',
            "curriculum.steps has no effect beside the steps of each entry of phases",
        ),
        (
            "data.source=jsonl data.path=README.txt",
            'data.source has no effect on data.path "README.txt", whose name ends in .txt',
        ),
        (
            "data.source=text data.path=a.jsonl",
            'data.source has no effect on data.path "a.jsonl", whose name ends in .jsonl',
        ),
        (
            "curriculum.frozen=nf4 curriculum.frozen_stacks=[nf4,nf4,nf4,nf4]",
            "curriculum.frozen has no effect on stacks under curriculum.frozen_stacks, only on embedding and head",
        ),
        (
            "curriculum.plan=grow curriculum.frozen_stacks=[nf4,nf4,nf4,nf4]",
            "curriculum.frozen_stacks has no effect under curriculum.plan grow, in which everything learns",
        ),
        (
            "curriculum.plan=rackwise curriculum.frozen_stacks=[nf4,nf4,nf4,nf4]",
            "curriculum.frozen_stacks has no effect under curriculum.plan rackwise, in which everything learns",
        ),
        (
            'curriculum.plan=fusion curriculum.frozen=nf4 curriculum.stages=[{"frozen":"int8"}]',
            "curriculum.frozen has no effect beside the frozen of each entry of stages",
        ),
        (
            "objective.kind=diffusion objective.time=depth objective.noise=elbo",
            "objective.noise has no effect under objective.time depth, where each phase has the level of its stacks",
        ),
        (
            "objective.kind=diffusion objective.time=depth objective.levels=[1,.7,.5,.2] objective.schedule=cosine",
            "objective.schedule has no effect under objective.levels [1.0, 0.7, 0.5, 0.2]",
        ),
        (
            'curriculum.steps=9 curriculum.stages=[{"steps":1},{"steps":2},{"steps":3},{"steps":4}]',
            "curriculum.steps has no effect beside the steps of each entry of stages",
        ),
        (
            'curriculum.steps_growth=2 curriculum.stages=[{"steps":1},{"steps":2},{"steps":3},{"steps":4}]',
            "curriculum.steps_growth has no effect beside the steps of each entry of stages",
        ),
        (
            'optimizer.lr=0.1 curriculum.stages=[{"lr":1},{"lr":2},{"lr":3},{"optimizer":{"lr":4}}]',
            "optimizer.lr has no effect beside the lr or optimizer of each entry of stages or phases",
        ),
        ("data.source=text data.path=a.txt data.text_key=x", "data.text_key has no effect without a file of jsonl"),
        ("memory.check=off memory.host=8GB", "memory.host has no effect under memory.check off"),
        ("run.seed=1 run.seed=2", 'run.seed is written more than once on the command line; the last one, "2", counts'),
        ("model.attention_preset=bert_style", "model.attention_preset bert_style means bidirectional attention, and"),
        ("model.attention_mode=bidirectional", "model.attention_mode bidirectional means bidirectional attention, and"),
        ("objective.kind=mlm model.attention_mode=causal", "trains with bidirectional attention"),
    ],
)
def test_what_is_written_and_does_nothing_gets_a_line(line, expected):
    found = lines(line)
    assert len(found) == 1 and expected in found[0], found


@pytest.mark.parametrize(
    "line",
    [
        "run.seed=3",
        "run.seed=3 run.seed=3",
        "model.attention_preset=gpt_style",
        "objective.kind=mlm model.attention_preset=bert_style objective.mask_fraction=0.2",
        "objective.kind=mlm objective.attention_mode=model model.attention_mode=causal",
        "objective.kind=diffusion objective.time=depth objective.noise=elbo objective.min_fraction=0.2 "
        "curriculum.plan=rackwise",
        "objective.kind=diffusion objective.time=depth objective.levels=[1,.7,.5,.2] objective.schedule=cosine "
        "curriculum.plan=grow",
        "objective.kind=diffusion objective.time=depth objective.noise=elbo curriculum.stacks_per_stage=[4]",
        'curriculum.steps=9 curriculum.stages=[{"steps":1},{"steps":2},{"steps":3}]',
        'optimizer.lr=0.1 curriculum.stages=[{"lr":1},{"lr":2},{"lr":3}]',
        "data.source=text data.path=README.md",
        "curriculum.frozen=int8 model.quantized_matmul=native",
        "model.n_kv_heads=null tokenizer.path=null",
        "optimizer.name=muon optimizer.b2=0.9 optimizer.eps=1e-6",
        "curriculum.plan=cycle cache.read_ahead=4 curriculum.rounds=1",
        "curriculum.trunk=adapt curriculum.adapters.rank=4",
    ],
)
def test_what_has_an_effect_gets_none(line):
    assert lines(line) == []


def test_what_wins_over_a_file_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(
        "run: {seed: 1, keep: 4}\nmodel: {d_model: 64, d_ff: 96}\ncurriculum: {stages: [{steps: 3}]}\n"
    )
    Path("b.yaml").write_text("model: {d_model: 32, d_ff: 96}\n")
    Path("c.yaml").write_text("curriculum: {stages: [{steps: 3}, {steps: 4}]}\n")
    assert overruled(*load_written(["a.yaml", "b.yaml"])) == ["model.d_model 32 of b.yaml counts, not 64 of a.yaml"]
    assert overruled(*load_written("a.yaml", ["--run.seed=2", "--run.seed=1", "--run.keep=4"]))[1:] == []
    assert overruled(*load_written("a.yaml", ["--run.seed=2", "--run.keep=3", "--model.n_heads=2"])) == [
        "run.keep 3 and run.seed 2 of the command line count, not 4 and 1 of a.yaml"
    ]
    assert overruled(*load_written(["a.yaml", "b.yaml", "c.yaml"], ["--model.d_model=16"])) == [
        "model.d_model 32 of b.yaml counts, not 64 of a.yaml",
        "curriculum.stages with 2 entries of c.yaml counts, not with 1 entry of a.yaml",
        "model.d_model 16 of the command line counts, not 32 of b.yaml",
    ]


def test_a_default_in_a_resolved_file_wins_over_an_earlier_file_and_is_nobodys_to_lose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("run: {seed: 1}")
    Path("all.yaml").write_text(resolved_yaml(load_config()))
    assert overruled(*load_written(["a.yaml", "all.yaml"])) == ["run.seed 0 of all.yaml counts, not 1 of a.yaml"]
    assert overruled(*load_written(["all.yaml", "a.yaml"])) == []


def test_a_plan_looks_at_the_machine_that_is_named():
    assert lines("memory.check=off memory.device=t4", alone=True) == []


def test_a_plan_says_that_it_looks_at_one_process():
    group = "mesh.num_processes=2 mesh.coordinator=localhost:1"
    assert lines(group) == []
    assert lines(group, alone=True) == [
        "mesh.num_processes has no effect here: a plan looks at the devices of one process"
    ]


BASE = {"objective.kind": "clm"}
DEPTH = {"objective.kind": "diffusion", "objective.time": "depth"}
DEAD = [
    ({}, "objective.mask_fraction", 0.3, steps),
    ({}, "objective.schedule", "cosine", steps),
    ({}, "data.synthetic_tokens", 800, None),
    ({"model.use_rope": False}, "model.rope_theta", 5.0, steps),
    ({"curriculum.plan": "rackwise"}, "curriculum.frozen", "nf4", steps),
    ({"curriculum.plan": "grow"}, "curriculum.frozen", "nf4", steps),
    ({"optimizer.name": "sgd"}, "optimizer.b2", 0.5, steps),
    ({"optimizer.name": "adafactor"}, "optimizer.b1", 0.5, steps),
    ({"optimizer.name": "adafactor"}, "optimizer.eps", 1e-3, steps),
    ({"optimizer.name": "lion"}, "optimizer.eps", 1e-3, steps),
    ({"optimizer.grad_clip": 0}, "optimizer.clip", "stack", steps),
    ({"optimizer.schedule": "linear"}, "optimizer.decay", 0.5, rates),
    ({"optimizer.schedule": "constant"}, "optimizer.final_lr", 0.5, rates),
    ({"curriculum.budget": "60 steps"}, "curriculum.steps", 7, rates),
    ({"curriculum.plan": "rackwise"}, "curriculum.frozen_stacks", ["nf4", "nf4"], steps),
    ({"curriculum.stages": [{"steps": 2}, {"steps": 3}]}, "curriculum.steps_growth", 2.0, phases),
    ({"curriculum.stages": [{"lr": 0.1}, {"lr": 0.2}]}, "optimizer.lr", 0.5, rates),
    (DEPTH, "objective.noise", "elbo", phases),
    (DEPTH | {"objective.levels": [0.9, 0.2]}, "objective.schedule", "cosine", phases),
    ({"curriculum.plan": "rackwise"}, "cache.kind", "recompute", cache_choice),
    ({"curriculum.plan": "prepend"}, "cache.kind", "recompute", cache_choice),
    ({"curriculum.plan": "joint"}, "cache.kind", "recompute", cache_choice),
    ({"model.vocab_size": 300}, "model.vocab_multiple", 64, steps),
    ({}, "tokenizer.vocab_size", 300, tokenizer),
    ({}, "data.text_key", "body", text),
    ({"model.quantized_matmul": "dequantize"}, "model.quantized_matmul", "native", steps),
    ({"curriculum.trunk": "adapt"}, "curriculum.adapters.alpha_pattern", "linear", phases),
    ({"objective.kind": "diffusion", "objective.noise": "elbo"}, "objective.max_fraction", 0.5, phases),
    ({"model.attention_preset": "bert_style"}, "model.attention_mode", "causal", paths),
]


@pytest.mark.parametrize(("settings", "key", "value", "observe"), [case for case in DEAD if case[3]])
def test_a_key_that_is_said_to_have_no_effect_has_none(settings, key, value, observe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, after = TINY | BASE | settings, TINY | BASE | settings | {key: value}
    assert observe(configure(before)) == observe(configure(after))


def test_the_commands_say_so_first(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("objective: {mask_fraction: 0.3}\n")
    (tmp_path / "b.yaml").write_text("run: {seed: 2}\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert train([*files, "--print_config"]) == 0
    out, err = capsys.readouterr()
    assert err == "note: objective.mask_fraction has no effect under objective.kind clm\n"
    (tmp_path / "out.yaml").write_text(out)
    config = load_config(tmp_path / "out.yaml")
    assert (config.objective.mask_fraction, config.run.seed) == (0.3, 2)
    assert train(["--mesh.process_id", "5", "--print_config"]) == 2
    assert "mesh.process_id is 5; write a number from 0 to 0" in capsys.readouterr().err
