"""Values that no type catches: each is refused in one sentence that names its key, and good ones pass."""

import pytest

from stackwise_jax.config import StackWiseConfig, load_config, parse_bytes, validate
from stackwise_jax.errors import UsageError

DEPTH = "--objective.kind=diffusion --objective.time=depth"
BAD = [
    ("--run.seed=-1", "run.seed is -1"),
    ("--run.seed=4294967296", "run.seed is 4294967296"),
    ("--run.keep=0", "run.keep is 0"),
    ("--run.log_every=0", "run.log_every is 0"),
    ("--run.save_every=-1", "run.save_every is -1"),
    ("--run.eval_every=-1", "run.eval_every is -1"),
    ("--run.eval_batches=-1", "run.eval_batches is -1"),
    ("--run.max_bad_steps=0", "run.max_bad_steps is 0"),
    ("--run.sample_tokens=-1", "run.sample_tokens is -1"),
    ("--run.name=a/b", "run.name is"),
    ("--run.name=..", "run.name is"),
    ("--run.name=", "run.name is"),
    ("--run.dir=", "run.dir is"),
    ("--data.seq_len=1", "data.seq_len is 1"),
    ("--data.batch_size=0", "data.batch_size is 0"),
    ("--data.valid_fraction=0", "data.valid_fraction is 0.0"),
    ("--data.valid_fraction=1", "data.valid_fraction is 1.0"),
    ("--data.source=text", "data.path is null"),
    ("--data.source=jsonl", "data.path is null"),
    ("--data.source=text --data.path=/no/such/file", 'data.path is "/no/such/file"'),
    ("--data.source=text --data.path=. --data.valid_path=/no/such", 'data.valid_path is "/no/such"'),
    ("--data.source=jsonl --data.path=. --data.text_key=", "data.text_key is"),
    ("--data.source=synthetic --data.synthetic_tokens=10", "data.synthetic_tokens is 10"),
    ("--tokenizer.kind=file", "tokenizer.path is null"),
    ("--tokenizer.kind=file --tokenizer.path=/no/such.model", "tokenizer.path is"),
    ("--tokenizer.kind=sentencepiece --tokenizer.vocab_size=200", "tokenizer.vocab_size is 200"),
    ("--model.d_model=0", "model.d_model is 0"),
    ("--model.d_ff=0", "model.d_ff is 0"),
    ("--model.n_heads=0", "model.n_heads is 0"),
    ("--model.n_heads=3", "model.n_heads is 3"),
    ("--model.n_kv_heads=0", "model.n_kv_heads is 0"),
    ("--model.n_kv_heads=3", "model.n_kv_heads is 3"),
    ("--model.d_model=12 --model.n_heads=4", "model.n_heads is 4"),
    ("--model.vocab_size=0", "model.vocab_size is 0"),
    ("--model.vocab_multiple=0", "model.vocab_multiple is 0"),
    ("--model.dropout=1", "model.dropout is 1.0"),
    ("--model.dropout=-0.1", "model.dropout is -0.1"),
    ("--model.norm_eps=0", "model.norm_eps is 0.0"),
    ("--model.init_std=0", "model.init_std is 0.0"),
    ("--model.rope_theta=0", "model.rope_theta is 0.0"),
    ("--model.attention_preset=custom", "model.attention_mode is null"),
    ("--model.architecture.n_stacks=0", "model.architecture.n_stacks is 0"),
    ("--model.architecture.blocks_per_stack=0", "model.architecture.blocks_per_stack is 0"),
    ("--objective.attention_mode=bidirectional", 'objective.attention_mode is "bidirectional"'),
    ("--objective.attention_mode=model --model.attention_preset=bert_style", 'objective.attention_mode is "model"'),
    ("--objective.attention_mode=model --model.attention_mode=bidirectional", 'objective.attention_mode is "model"'),
    ("--objective.kind=mlm --objective.mask_fraction=0", "objective.mask_fraction is 0.0"),
    ("--objective.kind=mlm --objective.mask_fraction=1", "objective.mask_fraction is 1.0"),
    ("--objective.kind=diffusion --objective.min_fraction=-0.1", "objective.min_fraction is -0.1"),
    ("--objective.kind=diffusion --objective.max_fraction=0.1", "objective.max_fraction is 0.1"),
    ("--objective.kind=diffusion --objective.max_fraction=1.1", "objective.max_fraction is 1.1"),
    ("--objective.kind=mlm --objective.corruption=fresh --cache.kind=host", 'cache.kind is "host"'),
    ("--objective.kind=diffusion --objective.corruption=fresh --cache.kind=disk", 'cache.kind is "disk"'),
    ("--curriculum.steps=0", "curriculum.steps is 0"),
    ("--curriculum.plan=blockwise --curriculum.block_size=0", "curriculum.block_size is 0"),
    ("--optimizer.lr=0", "optimizer.lr is 0.0"),
    ("--optimizer.lr=.nan", "optimizer.lr is NaN"),
    ("--optimizer.lr=.inf", "optimizer.lr is Infinity"),
    ("--optimizer.eps=0", "optimizer.eps is 0.0"),
    ("--optimizer.warmup=1.5", "optimizer.warmup is 1.5"),
    ("--optimizer.warmup=0.8", "optimizer.decay is 0.3"),
    ("--optimizer.decay=-1", "optimizer.decay is -1.0"),
    ("--optimizer.final_lr=2", "optimizer.final_lr is 2.0"),
    ("--optimizer.b1=1", "optimizer.b1 is 1.0"),
    ("--optimizer.b2=-0.1", "optimizer.b2 is -0.1"),
    ("--optimizer.weight_decay=-1", "optimizer.weight_decay is -1.0"),
    ("--optimizer.grad_clip=-1", "optimizer.grad_clip is -1.0"),
    ("--optimizer.microbatches=0", "optimizer.microbatches is 0"),
    ("--optimizer.microbatches=3", "data.batch_size is 16"),
    ("--cache.host_budget=much", 'cache.host_budget is "much"'),
    ("--cache.disk_budget=4XB", 'cache.disk_budget is "4XB"'),
    ("--cache.read_ahead=0", "cache.read_ahead is 0"),
    ("--mesh.data=0", "mesh.data is 0"),
    ("--mesh.data=-2", "mesh.data is -2"),
    ("--mesh.fsdp=0", "mesh.fsdp is 0"),
    ("--mesh.data=3", "data.batch_size is 16"),
    ("--mesh.num_processes=0", "mesh.num_processes is 0"),
    ("--mesh.num_processes=2", "mesh.coordinator is null"),
    ("--mesh.num_processes=2 --mesh.coordinator=localhost", 'mesh.coordinator is "localhost"'),
    ("--mesh.num_processes=2 --mesh.coordinator=localhost:0", 'mesh.coordinator is "localhost:0"'),
    ("--mesh.num_processes=2 --mesh.coordinator=localhost:65536", 'mesh.coordinator is "localhost:65536"'),
    ("--mesh.num_processes=2 --mesh.coordinator=http://h:1", 'mesh.coordinator is "http://h:1"'),
    ("--mesh.num_processes=2 --mesh.coordinator=localhost:9 --mesh.process_id=2", "mesh.process_id is 2"),
    ("--run.init_from=", "run.init_from is"),
    ("--run.init_depth=2", "run.init_depth is 2"),
    ("--run.init_from=a --run.init_depth=0", "run.init_depth is 0"),
    ("--run.init_stacks=[0]", "run.init_stacks is [0]"),
    ("--run.init_from=a --run.init_stacks=[0,0]", "run.init_stacks is [0, 0]"),
    ("--run.init_from=a --run.init_stacks=[-1]", "run.init_stacks is [-1]"),
    ("--model.residual_gain=0", "model.residual_gain is 0.0"),
    ("--model.spectral_norm=-1", "model.spectral_norm is -1.0"),
    ("--objective.time=depth", 'objective.time is "depth"; write none under clm'),
    ("--objective.kind=mlm --objective.time=input", 'objective.time is "input"; write none under mlm'),
    ("--objective.levels=[0.5]", "objective.levels is [0.5]"),
    (f"{DEPTH} --objective.levels=[0.5,0]", "objective.levels is [0.5, 0.0]"),
    (f"{DEPTH} --objective.levels=[1.5,0.5]", "objective.levels is [1.5, 0.5]"),
    (f"{DEPTH} --objective.levels=[0.5,0.6]", "objective.levels is [0.5, 0.6]"),
    (f"{DEPTH} --objective.levels=[.nan]", "objective.levels[0] is NaN"),
    (f"{DEPTH} --objective.min_fraction=0", "objective.min_fraction is 0.0"),
    ("--objective.interval_overlap=-1", "objective.interval_overlap is -1.0"),
    ("--curriculum.steps_growth=0", "curriculum.steps_growth is 0.0"),
    ("--curriculum.stacks_per_stage=[]", "curriculum.stacks_per_stage is []"),
    ("--curriculum.stacks_per_stage=[1,0]", "curriculum.stacks_per_stage is [1, 0]"),
    ("--curriculum.overlap=-1", "curriculum.overlap is -1"),
    ("--curriculum.rounds=0", "curriculum.rounds is 0"),
    ("--curriculum.learn=[1,1]", "curriculum.learn is [1, 1]"),
    ("--curriculum.consistency=-1", "curriculum.consistency is -1.0"),
    ("--curriculum.budget=much", 'curriculum.budget is "much"'),
    ("--curriculum.adapters.rank=-1", "curriculum.adapters.rank is -1"),
    ("--curriculum.adapters.trunk_rank=-1", "curriculum.adapters.trunk_rank is -1"),
    ("--curriculum.adapters.alpha=0", "curriculum.adapters.alpha is 0.0"),
    ("--curriculum.adapters.trunk_alpha=0", "curriculum.adapters.trunk_alpha is 0.0"),
    ("--curriculum.adapters.dropout=1", "curriculum.adapters.dropout is 1.0"),
    ("--curriculum.adapters.targets=[]", "curriculum.adapters.targets is []"),
    ("--curriculum.adapters.targets=[q,q]", 'curriculum.adapters.targets is ["q", "q"]'),
    ("--curriculum.adapters.lr=0", "curriculum.adapters.lr is 0.0"),
    ("--curriculum.adapters.load_from=", "curriculum.adapters.load_from is"),
]


def refused(overrides: list[str]) -> str:
    with pytest.raises(UsageError) as error:
        validate(load_config(None, overrides))
    text = str(error.value)
    assert "; write " in text and "\n" not in text
    return text


@pytest.mark.parametrize(("line", "expected"), BAD)
def test_bad_value(line, expected):
    assert refused(line.split(" ")).startswith(expected)


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("{steps: 0}", "curriculum.phases[1].steps is 0; write at least 1"),
        ("{lr: 0}", "curriculum.phases[1].lr is 0.0; write a number above 0"),
        ("{lr: .nan}", "curriculum.phases[1].lr is NaN; write a finite number"),
        ("{level: 0}", "curriculum.phases[1].level is 0.0; write a share above 0"),
        ("{level: 1.5}", "curriculum.phases[1].level is 1.5; write a share above 0"),
        ("{optimizer: {lr: 0}}", "curriculum.phases[1].optimizer.lr is 0.0; write a number above 0"),
        ("{optimizer: {warmup: 0.9}}", "curriculum.phases[1].optimizer.decay is 0.3; write at most 1 minus"),
        (
            "{optimizer: {microbatches: 3}}",
            "data.batch_size is 16; write a multiple of curriculum.phases[1].optimizer.",
        ),
        ("{objective: {time: depth}}", 'curriculum.phases[1].objective.time is "depth"; write none under clm'),
        (
            "{objective: {kind: diffusion, time: input}}",
            'curriculum.phases[1].objective.time is "input"; write none, or objective.time input',
        ),
        ("{objective: {kind: mlm, mask_fraction: 2}}", "curriculum.phases[1].objective.mask_fraction is 2.0; write "),
        (
            "{objective: {kind: clm, attention_mode: bidirectional}}",
            'curriculum.phases[1].objective.attention_mode is "bidirectional"; write ',
        ),
    ],
)
def test_bad_phase_value(phase, expected):
    overrides = ["--curriculum.plan=custom", f"--curriculum.phases=[{{}}, {phase}]"]
    assert refused(overrides).startswith(expected)
    stages = expected.replace("curriculum.phases", "curriculum.stages")
    assert refused([f"--curriculum.stages=[{{}}, {phase}]"]).startswith(stages)
    entries = f"--curriculum.plans=[{{}}, {{stages: [{{}}, {phase}]}}]"
    assert refused([entries]).startswith(stages.replace("curriculum.", "curriculum.plans[1]."))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{steps: 0}", "curriculum.plans[1].steps is 0; write at least 1"),
        ("{share: 0}", "curriculum.plans[1].share is 0.0; write a number above 0"),
        ("{plan: blockwise, block_size: 0}", "curriculum.plans[1].block_size is 0; write at least 1"),
        ("{adapters: {table: [{rank: -1}]}}", "curriculum.plans[1].adapters.table[0].rank is -1; write at least 0"),
        ("{adapters: {table: [{alpha: 0}]}}", "curriculum.plans[1].adapters.table[0].alpha is 0.0; write a number"),
    ],
)
def test_bad_value_in_an_entry_of_plans(entry, expected):
    assert refused([f"--curriculum.plans=[{{}}, {entry}]"]).startswith(expected)


@pytest.mark.parametrize(
    "line",
    [
        "--run.seed=0",
        "--objective.kind=mlm --objective.corruption=fresh --cache.kind=recompute",
        "--objective.corruption=fresh --cache.kind=host",  # clm: nothing is corrupted
        "--objective.attention_mode=model",
        "--objective.attention_mode=model --model.attention_preset=bert_style --model.attention_mode=causal",
        "--objective.kind=mlm --objective.attention_mode=causal",
        "--objective.mask_fraction=7",  # of mlm only
        "--model.n_kv_heads=1",
        "--model.d_model=12 --model.n_heads=4 --model.use_rope=false",
        "--optimizer.schedule=cosine --optimizer.warmup=0.9",  # decay belongs to wsd
        "--optimizer.microbatches=4 --mesh.data=2 --mesh.fsdp=2",
        "--mesh.num_processes=2 --mesh.coordinator=127.0.0.1:1234 --mesh.process_id=1",
        "--data.source=text --data.path=.",
        "--data.path=/no/such/file",  # python-docs reads none
        "--curriculum.block_size=0",
        "--run.init_from=a --run.init_depth=2 --run.init_stacks=[1,0]",
        f"{DEPTH} --objective.levels=[1,0.5,0.5]",
        "--objective.kind=diffusion --objective.time=input --objective.min_fraction=0",
        "--curriculum.budget=2e15flops",
    ],
)
def test_good_value(line):
    validate(load_config(None, line.split(" ")))


def test_the_defaults_are_good():
    validate(StackWiseConfig())


@pytest.mark.parametrize(
    ("text", "n"),
    [("4096", 4096), ("4KiB", 4096), ("4 kb", 4000), ("1.5GiB", 3 * 2**29), ("64GiB", 64 * 2**30), ("2TB", 2 * 10**12)],
)
def test_sizes(text, n):
    assert parse_bytes(text, "cache.host_budget") == n
