"""Items in every storage format: saved, loaded, converted, kept for good when nothing trains them any more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import leaves, metrics, same_bits, saved, summary, tiny, train

from stackwise_jax import convert, evaluate, generate, inspect
from stackwise_jax.checkpoint import Store
from stackwise_jax.curriculum import make_plan
from stackwise_jax.engine import Interrupted, Run, load_rack, prepare
from stackwise_jax.engine.events import NullReporter, StopFlag
from stackwise_jax.engine.shape import rack_shape
from stackwise_jax.engine.source import Source
from stackwise_jax.engine.weights import (
    EMBED,
    HEAD,
    Weights,
    count_values,
    final_format,
    item_shapes,
    path_items,
    stack_item,
)
from stackwise_jax.evaluation import evaluate_run, held_out_text
from stackwise_jax.memory.hashing import named_leaves
from stackwise_jax.memory.offload import Scratch
from stackwise_jax.memory.quantized import QUANTIZED, QuantizedTensor, bits_per_weight, dense_format, to_format
from stackwise_jax.model import create_rack_from_config

TOKENS = np.arange(64).reshape(4, 16) % 60
APPEND = ["curriculum.plan=append", "curriculum.steps=2", "run.keep=1"]
NF4 = [*APPEND, "curriculum.frozen=nf4", "memory.finished=frozen"]


as_stored = jax.jit(to_format, static_argnames="fmt")  # by one program, as in a run: an eager one rounds otherwise


def metas(run_dir: Path) -> dict[str, dict]:
    store = Store(run_dir / "checkpoints")
    return {item: store.item_meta(item, v) for item, v in store.latest().versions.items()}


def formats(run_dir: Path) -> dict[str, str]:
    """The format in which each item of the newest record lies on the disk."""
    return {item: meta["format"] for item, meta in metas(run_dir).items()}


def contents(tree) -> list[bytes]:
    """The bytes of the leaves; nested dicts of a quantized tree have them in the order of the names."""
    return [leaf.tobytes() for _, leaf in sorted(named_leaves(jax.device_get(tree)).items())]


def logits(path: Path) -> np.ndarray:
    loaded = load_rack(path)
    return np.asarray(loaded.rack.apply({"params": loaded.params}, TOKENS))


def dense(run_dir: Path) -> dict:
    """All items of a run, dequantized."""
    source = Source(run_dir)
    return {item: to_format(source.load(item), "fp32") for item in source.versions}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("formats")


@pytest.fixture(scope="module")
def nf4_run(folder) -> Path:
    train(tiny(*NF4), folder / "nf4")
    return folder / "nf4"


@pytest.fixture(scope="module")
def adapted_run(folder) -> Path:
    """A run whose stacks are kept in int8, with adapters on the first two."""
    changes = [change for change in NF4 if "nf4" not in change]
    changes += ["curriculum.frozen=int8", "curriculum.trunk=adapt", "curriculum.adapters.targets=[q, down]"]
    train(tiny(*changes, "optimizer.lr=0.05"), folder / "adapted")
    return folder / "adapted"


def test_finished_stacks_are_kept_as_a_later_phase_would_have_stored_them(nf4_run, folder):
    train(tiny(*APPEND, "curriculum.frozen=nf4"), folder / "master")
    assert set(formats(folder / "master").values()) == {"fp32"}
    assert formats(nf4_run) == dict.fromkeys(map(stack_item, range(2)), "nf4") | {EMBED: "bf16", HEAD: "bf16"}
    frozen, master = saved(nf4_run), saved(folder / "master")
    for item, tree in master.items():
        assert contents(as_stored(tree, formats(nf4_run)[item])) == contents(frozen[item])
    # What was trained is the same; what is measured at the end of a phase is what is kept.
    trained = [[r for r in metrics(path) if "loss" in r] for path in (nf4_run, folder / "master")]
    assert trained[0] == trained[1]
    loaded = load_rack(nf4_run)
    assert isinstance(loaded.params["stacks"]["001"]["blocks"]["attn"]["q"]["kernel"], QuantizedTensor)
    found = evaluate_run(loaded, held_out_text(loaded), limit=2)
    assert found["loss"] == pytest.approx(loaded.progress.results[-1]["held_out_loss"], rel=1e-6)


def test_the_record_says_how_items_are_kept_and_masters_vanish(nf4_run):
    store = Store(nf4_run / "checkpoints")
    progress = store.latest()
    assert progress.formats == formats(nf4_run)
    # The embedding learned in the first phase only; the head has a version for each depth, all but the last in fp32.
    assert store.items()[EMBED] == [progress.results[0]["versions"][EMBED]]
    heads = [result["versions"][HEAD] for result in progress.results]
    assert [store.item_meta(HEAD, v)["format"] for v in heads] == ["fp32", "bf16"]
    assert len(load_rack(nf4_run, depth=1).rack.stacks) == 1


def test_a_run_that_was_stopped_ends_bitwise_the_same(folder):
    stop = StopFlag()

    class Stopper(NullReporter):
        def step(self, row):
            if row["global_step"] == 5:  # the first of four steps of the second phase
                stop.set()

    # The new stack is a copy of one that is kept in nf4 only.
    config = tiny(*NF4, "curriculum.steps=4", "curriculum.init=copy")
    with pytest.raises(Interrupted):
        train(config, folder / "stopped", reporter=Stopper(), stop=stop)
    train(config, folder / "stopped")
    train(config, folder / "whole")
    assert same_bits(saved(folder / "stopped"), saved(folder / "whole"))
    assert (folder / "stopped" / "metrics.jsonl").read_bytes() == (folder / "whole" / "metrics.jsonl").read_bytes()
    assert Source(folder / "stopped").formats == Source(folder / "whole").formats == formats(folder / "whole")


def test_every_format_goes_to_every_other(nf4_run, folder, capsys):
    for fmt in ("fp32", "int8"):
        assert convert.main([str(nf4_run), str(folder / fmt), "--format", fmt]) == 0
        expected = dict.fromkeys(map(stack_item, range(2)), fmt) | dict.fromkeys((EMBED, HEAD), dense_format(fmt))
        assert formats(folder / fmt) == expected
        found, before = dense(folder / fmt), dense(nf4_run)
        for item in (stack_item(1), HEAD):
            for a, b in zip(leaves(found[item]).values(), leaves(before[item]).values(), strict=True):
                error = np.linalg.norm(a.astype("f4") - b) / np.linalg.norm(b)
                assert error <= {"fp32": 0, "int8": 0.01}[fmt]
    assert convert.main([str(folder / "fp32"), str(folder / "back"), "--format", "nf4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["formats"] == ["nf4"]
    assert formats(folder / "back") == formats(nf4_run)
    np.testing.assert_allclose(logits(folder / "fp32"), logits(nf4_run), atol=1e-4)


def test_stacks_in_unlike_formats_are_not_joined(nf4_run, folder, capsys):
    joined = [str(nf4_run), str(folder / "joined"), "--insert", "1", "--sizes", "2,1"]
    assert convert.main(joined) == 2
    assert "stored in fp32 and nf4" in capsys.readouterr().err
    assert convert.main([*joined, "--format", "nf4"]) == 0
    np.testing.assert_allclose(logits(folder / "joined"), logits(nf4_run), atol=1e-6)  # the new one is the identity


def test_adapters_are_merged_into_quantized_stacks(adapted_run, folder):
    names = [item for item in formats(adapted_run) if item.startswith("adapters/")]
    assert names and all(formats(adapted_run)[name] == "fp32" for name in names)
    assert formats(adapted_run)[stack_item(0)] == "int8"
    for name, more, fmt, near in (("dense", [], "fp32", 1e-5), ("few", ["--format", "int8"], "int8", 0.02)):
        assert convert.main([str(adapted_run), str(folder / name), "--merge_adapters", *more]) == 0
        assert formats(folder / name)[stack_item(0)] == fmt
        found, before = logits(folder / name), logits(adapted_run)
        assert np.linalg.norm(found - before) < near * np.linalg.norm(before)
    kernel = lambda path: dense(path)[stack_item(0)]["blocks"]["mlp"]["down"]["kernel"]
    assert np.abs(kernel(folder / "dense") - kernel(adapted_run)).max() > 1e-3  # there was something to merge


def test_every_command_reads_a_quantized_run(adapted_run, nf4_run, capsys):
    assert evaluate.main([str(adapted_run), "--batches", "2"]) == 0
    assert generate.main([str(adapted_run), "--prompt", "", "--max_tokens", "4"]) == 0
    capsys.readouterr()
    assert inspect.main([str(nf4_run), "--stack", "1", "--norms", "--json"]) == 0
    item = json.loads(capsys.readouterr().out.splitlines()[-1])["items"][-1]
    tree = dense(nf4_run)[stack_item(1)]
    assert item["format"] == "nf4" and item["values"] == sum(x.size for x in jax.tree.leaves(tree))
    assert 4.0 < item["bits_per_value"] == 8 * item["bytes"] / item["values"] < 6.0
    assert item["norm"] == pytest.approx(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree))), rel=1e-5)


def test_a_run_starts_from_a_quantized_one_and_says_so(nf4_run, folder, caplog):
    config = tiny("curriculum.plan=joint", f"run.init_from={nf4_run}")
    setup = prepare(config, folder / "tuned")
    assert "nf4 only" in caplog.text
    weights = Weights(setup.rack, setup.placement, None, jax.random.key(0))
    for item in (EMBED, HEAD, stack_item(1)):
        assert same_bits(setup.origin.load(item, weights.shapes(item, "fp32")), dense(nf4_run)[item])
    run = Run(setup)
    run._open()  # writes the items that exist from the start
    run.recorder.close()
    assert set(formats(folder / "tuned").values()) == {"fp32"}


def test_what_a_later_phase_needs_in_full_precision_is_kept_so():
    def finals(*changes: str) -> list[dict[str, str]]:
        config = tiny("model.architecture.n_stacks=3", "curriculum.frozen=int8", *changes)
        phases = make_plan(config, rack_shape(create_rack_from_config(config, 260), config.data)).phases
        return [{item: final_format(phases, i, item, "fp32") for item in path_items(p)} for i, p in enumerate(phases)]

    stack = lambda kept, i: [phase[stack_item(i)] for phase in kept if stack_item(i) in phase]
    cycle = finals("curriculum.plan=cycle", "curriculum.rounds=2")
    assert stack(cycle, 0) == ["fp32"] * 3 + ["int8"] * 3 and stack(cycle, 2) == ["fp32"] * 5 + ["int8"]
    mixed = finals("curriculum.plan=append", 'curriculum.frozen_stacks=["nf4", "int8", "fp8"]')
    assert stack(mixed, 0) == ["nf4"] * 3 and stack(mixed, 2) == ["fp8"]
    assert [phase[HEAD] for phase in mixed] == ["fp32", "fp32", "bf16"]
    merged = finals("curriculum.plan=append", "curriculum.trunk=adapt", "curriculum.adapters.merge=true")
    assert stack(merged, 0) == ["fp32", "fp32", "int8"]
    assert all(fmt == "fp32" for phase in merged for item, fmt in phase.items() if item.startswith("adapters/"))


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_a_rack_is_quantized_one_stack_at_a_time(place, tmp_path):
    config = tiny("model.architecture.n_stacks=6", "curriculum.frozen=nf4")
    setup = prepare(config, tmp_path / "none")
    store = Store(tmp_path / "store")
    weights = Weights(setup.rack, setup.placement, store, jax.random.key(0))
    weights.scratch = Scratch(tmp_path)
    names = [stack_item(i) for i in range(6)]
    for item in names:
        weights.grow(item)
        store.save_item(item, 1, weights.trees[item], {"format": "fp32"})
        weights.versions[item] = 1
        weights.drop(item)
    whole = count_values(item_shapes(setup.rack, names[0], "fp32", {})) * 4
    before = sum(x.nbytes for x in jax.live_arrays())
    for i, item in enumerate(names):
        weights.ensure(item, "nf4", place)
        weights.ensure(item, "nf4", place)  # as it is
        live = sum(x.nbytes for x in jax.live_arrays()) - before
        assert live < (i + 1) * whole / 4  # no master is left
    kept = as_stored(store.load_item(names[3], 1), "nf4")
    assert [x.tobytes() for x in leaves(kept).values()] == [
        x.tobytes() for x in leaves(weights.trees[names[3]]).values()
    ]
    kinds = {"disk": np.ndarray, "host": jax.Array, "device": jax.Array}
    assert all(isinstance(x, kinds[place]) for x in jax.tree.leaves(weights.trees[names[0]]))
    if place != "disk":
        expected = {"device": "device", "host": "pinned_host"}[place]
        assert {x.sharding.memory_kind for x in jax.tree.leaves(weights.trees[names[0]])} == {expected}
    weights.ensure(names[0], "nf4", "device")
    assert same_bits(weights.trees[names[0]], as_stored(store.load_item(names[0], 1), "nf4"))


@pytest.mark.parametrize("fmt", [*QUANTIZED, "bf16", "fp16"])
def test_an_item_comes_back_from_the_disk_as_it_was_saved(fmt, tmp_path):
    config = tiny("model.architecture.blocks_per_stack=2", "model.d_ff=40")
    setup = prepare(config, tmp_path / "none")
    store = Store(tmp_path / "store")
    weights = Weights(setup.rack, setup.placement, store, jax.random.key(0))
    item = stack_item(1)
    weights.ensure(item, fmt)
    tree = weights.trees[item]
    store.save_item(item, 1, tree, {"format": fmt})
    weights.versions[item] = 1
    weights.drop(item)
    weights.ensure(item, fmt, "host")
    assert same_bits(weights.trees[item], tree)
    weights.drop(item)
    weights.ensure(item, "fp32")
    assert same_bits(weights.trees[item], as_stored(tree, "fp32"))


@pytest.mark.parametrize("vocab_size", [32_000, 128_256])
def test_a_checkpoint_of_70b_in_nf4_fits_40_gb(vocab_size):
    config = tiny("model.d_model=8192", "model.n_heads=64", "model.n_kv_heads=8", "model.d_ff=28672")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    rack = create_rack_from_config(config, vocab_size)
    size = lambda item, fmt: sum(
        x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(item_shapes(rack, item, fmt, {}))
    )
    stack = item_shapes(rack, stack_item(0), "nf4", {})
    assert count_values(stack) == 855_654_400
    total = 80 * size(stack_item(0), "nf4") + size(EMBED, "bf16") + size(HEAD, "bf16")
    assert 35e9 < total < 40e9
    assert size(stack_item(0), "nf4") * 8 / count_values(stack) == pytest.approx(bits_per_weight("nf4"), abs=0.01)


def test_a_stack_in_nf4_is_small_on_the_disk(tmp_path):
    """Files and all, it takes less than a seventh of what it takes in fp32."""
    setup = prepare(tiny("model.d_model=256", "model.d_ff=512"), tmp_path / "none")
    store, on_disk = Store(tmp_path / "store"), {}
    weights = Weights(setup.rack, setup.placement, store, jax.random.key(0))
    for version, fmt in enumerate(("fp32", "nf4"), 1):
        weights.ensure(stack_item(0), fmt)
        store.save_item(stack_item(0), version, weights.trees[stack_item(0)], {"format": fmt})
        files = store.path(stack_item(0), version).rglob("*")
        on_disk[fmt] = sum(file.stat().st_size for file in files if file.is_file())
    assert on_disk["nf4"] < on_disk["fp32"] / 7


def test_a_phase_without_a_checkpoint_of_what_it_wants_says_so(tmp_path):
    setup = prepare(tiny(), tmp_path / "none")
    weights = Weights(setup.rack, setup.placement, None, jax.random.key(0))
    weights.ensure(stack_item(0), "nf4")
    with pytest.raises(Exception, match="stacks/000 is in no checkpoint"):
        weights.ensure(stack_item(0), "fp32")


def test_depths_that_are_let_go_free_their_heads(tmp_path):
    changes = ["curriculum.plan=append", "model.architecture.n_stacks=4", "run.keep=1", "run.max_bad_steps=99"]
    kept = {}
    for n in (None, 1):
        run_dir = tmp_path / f"keep {n}"
        train(tiny(*changes, *([] if n is None else [f"run.keep_depths={n}"])), run_dir)
        kept[n] = len([path for path in (run_dir / "checkpoints" / "head").iterdir() if path.is_dir()])
        assert len(summary(run_dir)["phases"]) == 4
        assert load_rack(run_dir).path == (0, 1, 2, 3)
        assert load_rack(run_dir, 1).path == (0,)  # with the head of its depth, or with the last
    assert kept == {None: 4, 1: 2}
