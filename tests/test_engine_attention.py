"""Every kind of attention through the engine: cached, streamed, frozen, adapted; and what it costs by formula.

Legend: B batch, T sequence, D d_model.
"""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
import pytest
from tiny import leaves, losses, same_bits, saved, step_parts, summary, tiny, train

from stackwise_jax.engine import load_rack, prepare
from stackwise_jax.engine.account import step_flops_of, trainable_and_frozen
from stackwise_jax.engine.directory import check_directory, create_directory
from stackwise_jax.engine.step import train_step
from stackwise_jax.errors import UsageError
from stackwise_jax.model import create_block_spec, create_rack_from_specs, size_of

TYPES = {
    "grouped": {},
    "mla": {"attention_type": "mla", "mla": {"rq": 12}},
    "low_rank": {"attention_type": "low_rank", "mla": {"rkv": 8}},
}
WAYS = {
    "products": None,
    "softmax": {"type": "laplacian", "features": 16},
    "linear": {"type": "gaussian", "mode": "linear", "features": 16},
}
KINDS = [*itertools.product(WAYS, (4, 2, 1))]  # how it weighs, key/value heads for 4 heads

PHASE = "curriculum.phases=[{path: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], train: [1, 2, 3, 4, 5, 6, 7, 8, 9]}]"
CHANGES = ["curriculum.plan=custom", PHASE, "curriculum.steps=2", "optimizer.name=sgd", "objective.kind=clm"]
STREAMED = ["cache.kind=recompute", "memory.offload=all", "memory.stack_inputs=host"]


def rack_of_all_kinds(kind: str):
    """A first stack, and one for every way to weigh and every number of key/value heads."""
    specs = [create_block_spec(32, 48, 4, attention_preset="gpt_style")]
    specs += [
        create_block_spec(32, 48, 4, n_kv_heads, attention_preset="gpt_style", kernel=WAYS[way], **TYPES[kind])
        for way, n_kv_heads in KINDS
    ]
    return create_rack_from_specs(
        384, 32, [{"n_blocks": 1, "block_spec": spec} for spec in specs], tie_embeddings=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_each_way_trains_over_a_cached_prefix_as_streamed_with_the_prefix_computed_again(kind, tmp_path):
    for name, changes in {"resident": ["cache.kind=host"], "streamed": STREAMED}.items():
        train(tiny(*CHANGES, *changes), tmp_path / name, rack=rack_of_all_kinds(kind))
    assert summary(tmp_path / "resident")["phases"][0]["cache_bytes"]["host"] > 0
    assert summary(tmp_path / "streamed")["phases"][0]["cache_bytes"]["host"] == 0
    assert np.allclose(losses(tmp_path / "resident"), losses(tmp_path / "streamed"), rtol=2e-6)
    trees = {name: saved(tmp_path / name) for name in ("resident", "streamed")}
    initial = jax.jit(rack_of_all_kinds(kind).init_params)(jax.random.key(0))["stacks"]
    resident, streamed = (leaves(tree) for tree in trees.values())
    assert resident.keys() == streamed.keys()
    for where, x in resident.items():
        assert np.abs(x - streamed[where]).max(initial=0) <= 2e-6 * max(np.abs(x).max(initial=0), 1e-3), where
    for i, (way, n_kv_heads) in enumerate(KINDS, start=1):
        before, after = initial[f"{i:03d}"]["blocks"]["attn"], trees["resident"][f"stacks/{i:03d}"]["blocks"]["attn"]
        learned = {name for name in before if not same_bits(before[name], after[name])}
        assert learned == {*before} - {"features"}, (way, n_kv_heads)


MLGKA = ["model.attention_preset=mlgka", "model.kernel.features=16", "model.n_heads=4"]


@pytest.mark.slow
@pytest.mark.parametrize("learn", [False, True])
def test_random_matrices_learn_only_where_asked(learn, tmp_path):
    changes = [*MLGKA, f"model.kernel.learn={learn}".lower(), "curriculum.plan=rackwise", "model.param_dtype=bf16"]
    run = train(tiny(*changes), tmp_path / "run")
    trees, key = saved(tmp_path / "run"), jax.random.key(run.setup.config.run.seed)
    first = functools.partial(run.setup.rack.init_params, key)()["stacks"]
    for name in ("000", "001"):
        drawn, kept = (tree["blocks"]["attn"]["features"] for tree in (first[name], trees[f"stacks/{name}"]))
        assert same_bits(drawn, kept) != learn


@pytest.mark.slow
def test_quantized_trunks_of_latent_attention_are_adapted(tmp_path):
    changes = [*MLGKA, "model.mla.rq=12", "curriculum.plan=append", "curriculum.trunk=adapt", "curriculum.frozen=nf4"]
    targets = "curriculum.adapters.targets=[q_a,q_b,kv_a,kv_b,o]"
    train(tiny(*changes, targets, "model.attention_mode=causal"), tmp_path / "run")
    loaded = load_rack(tmp_path / "run")
    attn = loaded.params["stacks"]["000"]["blocks"]["attn"]
    assert {name for name, leaf in attn.items() if "adapters" in leaf} <= {"q_a", "q_b", "kv_a", "kv_b", "o"}
    adapter = leaves(saved(tmp_path / "run")["adapters/000/trunk"])
    assert len({where.split("']['")[2] for where in adapter}) == 5
    assert all(np.isfinite(losses(tmp_path / "run")))


def test_targets_that_no_block_has_are_refused():
    with pytest.raises(UsageError, match=r"targets names q_a and model\.attention_type mha .* write any of q, k, v, o"):
        step_parts(tiny("curriculum.trunk=adapt", "curriculum.adapters.targets=[q,q_a]"))
    step_parts(tiny("curriculum.trunk=adapt", "model.attention_type=mla"))


def test_a_bandwidth_may_be_written_down_or_left_out_where_the_rack_stays_the_same(tmp_path):
    kernel = ["model.kernel.type=cauchy", "model.kernel.features=16"]
    for name, changes in {"products": [], "kernel": kernel}.items():
        run_dir = tmp_path / name
        create_directory(prepare(tiny(*changes), run_dir))
        text = (run_dir / "config.yaml").read_text()
        assert "bandwidth: null" in text
        (run_dir / "config.yaml").write_text(text.replace("bandwidth: null", "bandwidth: 1.0"))
        for more in ([], ["model.kernel.bandwidth=1.0"]):
            assert check_directory(prepare(tiny(*changes, *more), run_dir))
    with pytest.raises(UsageError, match="the rack is not that of"):
        check_directory(prepare(tiny(*kernel, "model.kernel.bandwidth=2"), run_dir))


SHAPE = [
    "model.d_model=128",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.d_ff=256",
    "model.architecture.blocks_per_stack=1",
    "optimizer.name=sgd",
    "curriculum.plan=rackwise",
]
COSTS = {
    "latent": ["model.attention_type=mla", "model.mla.rq=48"],
    "low rank": ["model.attention_type=low_rank"],
    "kernel": ["model.kernel.type=cauchy", "model.kernel.features=256"],
    "kernel that learns": ["model.kernel.type=cauchy", "model.kernel.features=256", "model.kernel.learn=true"],
    "linear": ["model.kernel.type=uniform", "model.kernel.mode=linear", "data.seq_len=192", "model.attention_type=mla"],
    "linear both ways": ["model.kernel.type=gaussian", "model.kernel.mode=linear", "objective.kind=mlm"],
}


@pytest.mark.parametrize("name", COSTS)
def test_the_formula_is_within_5_percent_of_the_engines_own_step(name, monkeypatch):
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    parts = step_parts(tiny(*SHAPE, "data.seq_len=128", *COSTS[name]))
    formula = step_flops_of(parts.setup.rack, parts.setup.config.data)((1, 1), parts.phase)
    step = functools.partial(train_step, parts.spec)
    analysis = jax.jit(step).lower(parts.state(), parts.frozen, parts.data, parts.constants).cost_analysis()
    counted = (analysis[0] if isinstance(analysis, list) else analysis)["flops"]
    assert formula == pytest.approx(counted, rel=0.05)
    trainable, fixed = trainable_and_frozen(parts.setup.rack, parts.phase)
    assert trainable == size_of(parts.learning)
    assert trainable + fixed == size_of([*parts.weights.trees.values()])
