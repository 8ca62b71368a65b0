"""One pass through the depth: against a plain loop, and what it costs."""

import jax
import numpy as np
import pytest

from stackwise_jax.errors import UsageError
from stackwise_jax.model import create_simple_rack, embed_tokens, logits
from stackwise_jax.objectives.batch import Vocab
from stackwise_jax.sampling import ORDERS, depth, depth_counts, generate_depth, generate_unmask

VOCAB = Vocab(size=40, mask_id=3, pad_id=0, special_ids=(0, 1, 2, 3), eos_id=2)
PROMPT_P = np.array([1, 5, 3, 9], np.int32)  # holds a mask token of its own
LEVELS = (0.9, 0.75, 0.5, 0.25)
HOW = {"key": jax.random.key(0), "vocab": VOCAB, "temperature": 0.0}


def build(n_stacks=4, seed=1, **fields):
    rack = create_simple_rack(
        n_stacks=n_stacks, blocks_per_stack=1, d_model=16, d_ff=16, n_heads=2, vocab_size=48,
        attention_mode="bidirectional",
    ).clone(parent=None, **fields)  # fmt: skip
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(rack.init_params, jax.random.key(0))
    return rack, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.7).astype(leaf.dtype), shapes)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def calls(monkeypatch):
    """The parameters that a stack was run with, call by call."""
    found, run_stack = [], depth._run_stack

    def counted(stack, params, *rest):
        found.append(params)
        return run_stack(stack, params, *rest)

    monkeypatch.setattr(depth, "_run_stack", counted)
    return found


@pytest.mark.parametrize(
    ("length", "levels", "counts"),
    [
        (8, (1.0, 0.75, 0.5, 0.25), [2, 2, 2, 2]),
        (8, (0.3, 0.25, 0.25, 0.25), [6, 0, 0, 2]),  # the level of the first stack is not asked for
        (9, (1.0, 0.5, 0.1), [5, 3, 1]),  # 4.5 rounds to 4, 0.9 to 1
        (8, (1.0, 1.0, 1.0), [0, 0, 8]),
        (8, (1.0, 0.5, 0.0, 0.0), [4, 4]),
        (8, (1.0, 0.05, 0.05), [8]),
        (3, (0.6,), [3]),
        (0, (1.0, 0.5), []),
    ],
)
def test_counts_follow_the_level_of_the_next_stack(length, levels, counts):
    np.testing.assert_array_equal(depth_counts(length, levels), counts)


def by_hand(rack, params, length, counts):
    """Confidence order at temperature 0 on the bare row: no padding, no segment ids, one stack at a time."""

    def run(k, x_1TD):
        return rack.stacks[k].apply({"params": params["stacks"][f"{k:03d}"]}, x_1TD)

    row_T = np.concatenate([PROMPT_P, np.full(length, VOCAB.mask_id)]).astype(np.int32)
    masked_T = np.arange(len(row_T)) >= len(PROMPT_P)
    x_1TD = embed_tokens(rack, params["embed"], row_T[None])
    for k, count in enumerate(counts):
        x_1TD = read_1TD = run(k, x_1TD)
        for behind in range(k + 1, len(rack.stacks)):
            read_1TD = run(behind, read_1TD)
        logits_TV = np.array(logits(rack, params["head"], params["embed"], read_1TD)[0, :, 4:40])
        odds_TV = np.exp(logits_TV - logits_TV.max(-1, keepdims=True))
        sure_T = np.where(masked_T, (odds_TV / odds_TV.sum(-1, keepdims=True)).max(-1), -1)
        chosen = np.argsort(-sure_T)[:count]
        row_T[chosen], masked_T[chosen] = 4 + logits_TV[chosen].argmax(-1), False
        embedded_1TD = embed_tokens(rack, params["embed"], row_T[None])
        x_1TD = x_1TD.at[0, chosen].set(embedded_1TD[0, chosen])
    assert not masked_T.any()
    return row_T


@pytest.mark.parametrize("levels", [LEVELS, (1.0, 1.0, 0.5, 0.5), (1.0, 0.5, 0.0, 0.0)])
def test_the_pass_equals_a_plain_loop(model, levels):
    ids = generate_depth(*model, PROMPT_P, length=12, levels=levels, **HOW)
    np.testing.assert_array_equal(ids, by_hand(*model, 12, depth_counts(12, levels)))
    np.testing.assert_array_equal(ids[:4], PROMPT_P)


def test_a_single_stack_fills_all_at_once():
    rack, params = build(1)
    ids = generate_depth(rack, params, PROMPT_P, length=9, levels=(0.5,), **HOW)
    np.testing.assert_array_equal(ids, generate_unmask(rack, params, PROMPT_P, length=9, steps=1, **HOW))


@pytest.mark.parametrize(
    ("levels", "ran"),
    [
        ((1.0, 0.75, 0.5, 0.25), "0 123 1 23 2 3 3"),
        ((1.0, 0.5, 0.0, 0.0), "0 123 1 23"),  # nothing is masked behind stack 1: no further stack runs
        ((1.0, 0.01, 0.01, 0.01), "0 123"),
        ((1.0, 1.0, 0.5, 0.5), "0 1 23 2 3"),  # nothing to settle behind stacks 0 and 2: they are not read
    ],
)
def test_stacks_run_once_for_the_stream_and_only_where_they_are_read(model, calls, levels, ran):
    rack, params = model
    generate_depth(rack, params, PROMPT_P, length=12, levels=levels, **HOW)
    names = {id(tree): name[-1] for name, tree in params["stacks"].items()}
    assert "".join(names[id(tree)] for tree in calls) == ran.replace(" ", "")


def test_the_cost_is_what_the_docstring_says(calls):
    for n_stacks in (1, 2, 5):
        rack, params = build(n_stacks)
        calls.clear()
        levels = np.linspace(1, 0, n_stacks, endpoint=False)
        generate_depth(rack, params, PROMPT_P, length=20, levels=list(levels), **HOW)
        assert len(calls) == n_stacks * (n_stacks + 1) / 2


def test_stacks_levels_and_prompts_share_programs(monkeypatch):
    traces = {"run_stacks": 0, "settle": 0}

    def traced(name):
        function = getattr(depth, name)

        def counted(*args, **how):
            traces[name] += 1
            return function(*args, **how)

        monkeypatch.setattr(depth, name, counted)

    for name in traces:
        traced(name)
    rack, params = build(4, norm_eps=3e-6)
    for n_prompt, length, levels in ((4, 7, LEVELS), (30, 30, (1.0, 0.6, 0.6, 0.1)), (60, 4, LEVELS)):
        how = HOW | {"order": "margin"}
        generate_depth(rack, params, np.full(n_prompt, 7), length=length, levels=levels, **how)
    assert traces["settle"] == 1
    assert traces["run_stacks"] <= 1  # four stacks are one program, which the tests before may have made


@pytest.mark.parametrize("order", ORDERS)
def test_the_key_decides_and_only_text_comes_out(model, order):
    def run(seed):
        how = HOW | {"key": jax.random.key(seed), "temperature": 2.0}
        return generate_depth(*model, PROMPT_P, length=60, levels=LEVELS, order=order, **how)

    first = run(0)
    np.testing.assert_array_equal(run(0), first)
    assert (run(1) != first).any()
    np.testing.assert_array_equal(first[:4], PROMPT_P)
    assert set(first[4:].tolist()) <= {*VOCAB.ordinary_ids.tolist(), VOCAB.eos_id}
    assert len(set(first[4:])) > 10


def test_a_tied_rack_of_bf16_samples_too():
    rack, params = build(3, tie_embeddings=True, compute_dtype="bf16")
    ids = generate_depth(rack, params, PROMPT_P, length=6, levels=(1.0, 0.5, 0.2), **HOW)
    assert (ids[4:] >= 4).all()
    assert len(generate_depth(rack, params, PROMPT_P, length=0, levels=(1.0, 0.5, 0.2), **HOW)) == 4


def test_wrong_arguments_are_refused_by_name(model):
    for levels, named in (
        ((1.0, 0.5), "2 entries for 4 stacks"),
        ((0.2, 0.4, 0.6, 0.8), "rise with depth"),
        ((1.5, 1.0, 0.5, 0.2), "shares"),
        ((1.0, 0.5, 0.2, float("nan")), "shares"),
    ):
        with pytest.raises(UsageError, match=named):
            generate_depth(*model, PROMPT_P, length=4, levels=levels, **HOW)
    with pytest.raises(UsageError, match="max_tokens"):
        generate_depth(*model, PROMPT_P, length=-1, levels=LEVELS, **HOW)
    with pytest.raises(UsageError, match="BOS"):
        generate_depth(*model, [], length=4, levels=LEVELS, **HOW)
    with pytest.raises(UsageError, match="order"):
        generate_depth(*model, PROMPT_P, length=4, levels=LEVELS, order="best", **HOW)
    rack, params = build(time_embedding="sinusoidal")
    with pytest.raises(UsageError, match="leave levels out"):
        generate_depth(rack, params, PROMPT_P, length=4, levels=LEVELS, **HOW)
