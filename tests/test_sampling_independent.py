"""Racks that were trained apart: which one works when, and how much each settles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.errors import UsageError
from stackwise_jax.model import create_simple_rack
from stackwise_jax.objectives.batch import Vocab
from stackwise_jax.sampling import Expert, expert_spans, generate_independent, generate_unmask, independent, unmask
from stackwise_jax.sampling.unmask import fill, spread_steps

VOCAB = Vocab(size=40, mask_id=3, pad_id=0, special_ids=(0, 1, 2, 3), eos_id=2)
PROMPT_P = np.array([1, 5, 3, 9], np.int32)  # holds a mask token of its own
QUARTERS = [(0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25)]
HOW = {"key": jax.random.key(0), "vocab": VOCAB, "temperature": 0.0}


def build(stack_id=0, says=None):
    """A rack of one stack; says: the only token that it ever predicts."""
    rack = create_simple_rack(
        n_stacks=1, blocks_per_stack=1, d_model=16, d_ff=16, n_heads=2, vocab_size=48, attention_mode="bidirectional"
    )
    stacks = (rack.stacks[0].clone(stack_id=stack_id, parent=None),)
    rack = rack.clone(stacks=stacks, tie_embeddings=False, parent=None)
    params = rack.init_params(jax.random.key(1))
    if says is not None:  # the same hidden states everywhere, and a head that knows one word
        params = jax.tree.map(jnp.zeros_like, params)
        params["embed"]["embedding"] += 1.0
        params["head"]["norm"]["scale"] += 1.0
        params["head"]["kernel"] = params["head"]["kernel"].at[:, says].set(1.0)
    return rack, params


@pytest.fixture(scope="module")
def experts():
    """Expert i of the quarters of the noise says nothing but 10 + i."""
    return [Expert(*interval, *build(i, says=10 + i)) for i, interval in enumerate(QUARTERS)]


@pytest.fixture
def passes(monkeypatch):
    """The hidden share when each pass begins, and what the rack at work says."""
    found = []

    def watched(rack, params, tokens_T, masked_T, segment_ids_1T, n_hideable, counts_S, *rest, **how):
        left = int(masked_T.sum())
        for count in counts_S:
            found.append((left / n_hideable, int(params["head"]["kernel"][0].argmax())))
            left -= int(count)
        return fill(rack, params, tokens_T, masked_T, segment_ids_1T, n_hideable, counts_S, *rest, **how)

    monkeypatch.setattr(independent, "fill", watched)
    return found


@pytest.mark.parametrize(
    ("length", "n_real", "intervals", "spans"),
    [
        (8, 8, QUARTERS, [(0, 2), (1, 2), (2, 2), (3, 2)]),
        (8, 16, QUARTERS, [(2, 4), (3, 4)]),  # half of the row is prompt: nothing for those above one half
        (4, 16, QUARTERS, [(3, 4)]),
        (12, 12, [(2 / 3, 1), (1 / 3, 2 / 3), (0, 1 / 3)], [(0, 4), (1, 4), (2, 4)]),
        (10, 10, [(0.4, 1.0), (0.0, 0.6)], [(0, 5), (1, 5)]),  # an overlap and a gap are parted in the middle
        (10, 10, [(0.6, 1.0), (0.0, 0.4)], [(0, 5), (1, 5)]),
        (10, 10, [(0.8, 0.8), (0.4, 0.4)], [(0, 4), (1, 6)]),  # single levels
        (10, 10, [(0.15, 0.9)], [(0, 10)]),
        (3, 3, [(0.95, 1.0), (0.9, 0.95), (0.0, 0.9)], [(0, 1), (2, 2)]),  # too narrow for a token
        (0, 5, QUARTERS, []),
    ],
)
def test_spans_by_hand(length, n_real, intervals, spans):
    assert expert_spans(length, n_real, intervals) == spans


@pytest.mark.parametrize("steps", [None, 9, 500])
@pytest.mark.parametrize("n_prompt", [1, 40])
def test_each_pass_is_made_by_the_expert_of_its_hidden_share(experts, passes, steps, n_prompt):
    prompt_P = np.resize(PROMPT_P, n_prompt)
    ids = generate_independent(experts, prompt_P, length=20, steps=steps, **HOW)
    np.testing.assert_array_equal(ids[:n_prompt], prompt_P)
    for share, said in passes:
        low, high = QUARTERS[said - 10]
        assert low < share <= high
    at_work = [said for _, said in passes]
    assert at_work == sorted(at_work)
    spans = expert_spans(20, int(VOCAB.is_target[prompt_P].sum()) + 20, QUARTERS)
    assert len(passes) == (len(spans) if steps is None else min(steps, 20))
    assert [(i, int((ids[n_prompt:] == 10 + i).sum())) for i in sorted({said - 10 for said in at_work})] == spans


def test_one_expert_of_all_noise_is_the_iterative_sampler():
    rack, params = build()
    ids = generate_independent([(0.0, 1.0, rack, params)], PROMPT_P, length=9, steps=1, **HOW)
    np.testing.assert_array_equal(ids, generate_unmask(rack, params, PROMPT_P, length=9, steps=1, **HOW))
    slow = generate_independent([(0.0, 1.0, rack, params)], PROMPT_P, length=9, steps=9, **HOW)
    np.testing.assert_array_equal(slow, generate_unmask(rack, params, PROMPT_P, length=9, **HOW))


def test_the_key_decides_and_experts_of_equal_shape_share_a_program(monkeypatch):
    def run(seed, n_prompt=4, order="entropy"):
        how = HOW | {"key": jax.random.key(seed), "temperature": 1.7}
        return generate_independent(experts, np.full(n_prompt, 7), length=12, order=order, **how)

    traces, settle = [], unmask.settle
    monkeypatch.setattr(unmask, "settle", lambda *args: (traces.append(1), settle(*args))[1])
    experts = [Expert(*interval, *build(i)) for i, interval in enumerate(QUARTERS)]
    first = run(0)
    assert len(run(0, n_prompt=30)) == 42
    assert len(traces) == 1
    np.testing.assert_array_equal(run(0), first)
    assert (run(1) != first).any()
    assert (run(0, order="random") != first).any()
    np.testing.assert_array_equal(first[:4], [7, 7, 7, 7])
    assert set(first[4:].tolist()) <= {*VOCAB.ordinary_ids.tolist(), VOCAB.eos_id}


@pytest.mark.parametrize(
    ("steps", "sizes", "passes"),
    [
        (4, [2, 2, 2, 2], [1, 1, 1, 1]),
        (8, [2, 2, 2, 2], [2, 2, 2, 2]),
        (99, [3, 1], [3, 1]),
        (5, [8, 1, 1], [3, 1, 1]),  # in proportion it would be 4 and two halves
        (3, [100, 1, 1], [1, 1, 1]),
        (5, [], []),
    ],
)
def test_steps_are_spread_in_proportion_but_nobody_is_left_out(steps, sizes, passes):
    assert spread_steps(steps, sizes, "parts") == passes


def test_spread_steps_never_asks_for_more_passes_than_tokens():
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = [int(size) for size in rng.integers(1, 9, rng.integers(1, 7))]
        steps = int(rng.integers(len(sizes), sum(sizes) + 3))
        passes = spread_steps(steps, sizes, "parts")
        assert sum(passes) == min(steps, sum(sizes))
        assert all(1 <= n <= size for n, size in zip(passes, sizes, strict=True))


def test_wrong_arguments_are_refused_by_name(experts):
    for wrong in ([], experts[::-1], [experts[0], experts[0]], [Expert(0.5, 0.2, *build())]):
        with pytest.raises(UsageError, match="highest first"):
            generate_independent(wrong, PROMPT_P, length=4, **HOW)
    with pytest.raises(UsageError, match="steps is 3 and there are 4 racks"):
        generate_independent(experts, PROMPT_P[:1], length=40, steps=3, **HOW)
    with pytest.raises(UsageError, match="steps is 0"):
        generate_independent(experts, PROMPT_P, length=4, steps=0, **HOW)
    with pytest.raises(UsageError, match="max_tokens"):
        generate_independent(experts, PROMPT_P, length=-4, **HOW)
