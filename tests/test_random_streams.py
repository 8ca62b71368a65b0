"""One root key per seed, one number per stream, and the same bits whatever the environment says."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import TINY, tiny, train

from stackwise_jax.engine import prepare
from stackwise_jax.errors import UsageError
from stackwise_jax.random_streams import SETTINGS, Stream, check_settings, root_key, stream_key

PACKAGE = Path(__file__).parent.parent / "stackwise_jax"
HOME = "random_streams.py"
OF_A_BLOCK = ("model/block.py", "model/linear.py")  # they number the parts of a block, whose key is no root key
# Weights, corruption and texts of existing runs depend on these.
NUMBERS = {
    "EMBED": 0, "HEAD": 1, "BLOCKS": 2, "CORRUPTION": 3, "DROPOUT": 4, "RENEWED_ADAPTERS": 5, "INSERTED": 6,
    "ROUNDING": 7, "SAMPLING": 8, "STACK_ADAPTERS": 16, "TRUNK_ADAPTERS": 17,
}  # fmt: skip
HOSTILE = {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0", "JAX_ENABLE_X64": "1"}
HOSTILE |= {"JAX_RANDOM_SEED_OFFSET": "5", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}


def called(node: ast.AST) -> str:
    """The last part of the name that is called."""
    return ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""


def own_keys(tree: ast.AST) -> list[str]:
    """Calls that make a key from a seed."""
    names = ("jax.random.key", "random.key", "jax.random.PRNGKey", "random.PRNGKey", "PRNGKey")
    return [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in names]


def own_numbers(tree: ast.AST) -> list[str]:
    """Calls of fold_in with a fixed number or a constant of the module, or with a stream."""
    found = []
    for node in ast.walk(tree):
        if called(node) == "fold_in":
            parts = [
                part for argument in node.args[1:] + [k.value for k in node.keywords] for part in ast.walk(argument)
            ]
            names = [part.id for part in parts if isinstance(part, ast.Name)]
            names += [part.attr for part in parts if isinstance(part, ast.Attribute)]
            numbers = [part for part in parts if isinstance(part, ast.Constant)]
            if numbers or any(name.isupper() or name == "Stream" for name in names):
                found.append(ast.unparse(node))
    return found


def test_no_two_streams_have_the_same_number():
    assert len(Stream.__members__) == len({int(stream) for stream in Stream})


def test_the_numbers_are_those_of_existing_runs():
    assert {stream.name: int(stream) for stream in Stream} == NUMBERS


def test_a_stream_is_its_number_folded_into_threefry_of_the_seed():
    for stream in Stream:
        expected = jax.random.fold_in(jax.random.key(3, impl="threefry2x32"), NUMBERS[stream.name])
        np.testing.assert_array_equal(*map(jax.random.key_data, (stream_key(root_key(3), stream), expected)))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_keys_are_made_and_streams_numbered_in_one_place(path):
    if (name := path.relative_to(PACKAGE).as_posix()) == HOME:
        return
    tree = ast.parse(path.read_text())
    assert own_keys(tree) == []
    assert name in OF_A_BLOCK or own_numbers(tree) == []


@pytest.mark.parametrize("code", ["jax.random.key(0)", "jax.random.PRNGKey(seed)", "random.key(seed)"])
def test_keys_of_their_own_are_seen(code):
    assert own_keys(ast.parse(code)) == [code]


@pytest.mark.parametrize("argument", ["6", "INSERTED", "STREAMS[name]", "Stream.EMBED", "data=6", "2 + i"])
def test_numbers_of_their_own_are_seen(argument):
    assert len(own_numbers(ast.parse(f"jax.random.fold_in(key, {argument})"))) == 1
    assert own_numbers(ast.parse("jax.random.fold_in(key, step)")) == []


def test_a_text_draws_from_a_stream_of_its_own(monkeypatch):
    """The sampler's seed is often that of the run: its first token must not use the bits of the embedding."""
    from stackwise_jax.sampling import text

    keys = []
    monkeypatch.setattr(text, "generate_causal", lambda *_, key, **how: keys.append(key) or np.arange(3))
    tokenizer = prepare(tiny(), Path("no run")).tokenizer
    text.sample(None, {}, tokenizer, "a", objective_kind="clm", seed=2**32)
    np.testing.assert_array_equal(*map(jax.random.key_data, (keys[0], stream_key(root_key(0), Stream.SAMPLING))))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_change_the_numbers_are_refused(name):
    before = jax.config.values[name]
    check_settings()
    other = {"standard": "strict", "allow": "raise", 0: 3}.get(before, not before)
    try:
        jax.config.update(name, other)
        with pytest.raises(UsageError, match=name):
            prepare(tiny(), Path("no run"))
    finally:
        jax.config.update(name, before)


DRAWS = """
import argparse, jax
from stackwise_jax.random_streams import root_key
from stackwise_jax.reporting.command import add_common, run_command
add_common(parser := argparse.ArgumentParser())
draw = lambda _: print(*map(float.hex, map(float, jax.random.normal(root_key(2**31 + 7), (3,)))))
raise SystemExit(run_command(draw, parser, []))
"""


def test_a_command_draws_the_same_numbers_in_any_environment():
    done = subprocess.run([sys.executable, "-c", DRAWS], env=os.environ | HOSTILE, capture_output=True, text=True)
    numbers = [float.fromhex(number) for number in done.stdout.split()]
    np.testing.assert_array_equal(numbers, jax.random.normal(root_key(2**31 + 7), (3,)))


@pytest.mark.slow
def test_a_run_gives_the_same_numbers_in_any_environment(tmp_path):
    changes = ["objective.kind=diffusion", "model.dropout=0.1", "optimizer.rounding=stochastic"]
    changes += ["model.param_dtype=bf16", "run.sample_tokens=0"]
    train(tiny(*changes), tmp_path / "here")
    options = [f"--{change}" for change in (*TINY, *changes, f"run.dir={tmp_path / 'there'}")]
    command = [sys.executable, "-m", "stackwise_jax.train", *options]
    done = subprocess.run(command, env=os.environ | HOSTILE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here, there = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("here", "there"))
    assert here == there
