"""Dynamic stacking: what stays keeps its bits, weights and adapters alike.

Legend: B batch, T sequence, D d_model, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.adapters import init_adapter, merge_adapters
from stackwise_jax.curriculum.phase import AdapterSpec, StackAdapter
from stackwise_jax.errors import UsageError
from stackwise_jax.model import (
    Block,
    Rack,
    Stack,
    append_stack,
    combine,
    create_simple_rack,
    init_rack,
    insert_stack,
    merge_stacks,
    prepend_stack,
    remove_stack,
    split_stack,
    stack_name,
)

D, T, V = 16, 8, 30
BLOCK = Block(d_model=D, d_ff=24, n_heads=2)
OTHER = Block(d_model=D, d_ff=32, n_heads=2)
KEY, NEW_KEY = jax.random.key(0), jax.random.key(7)
TOKENS_BT = jax.random.randint(KEY, (2, T), 0, V)


def make_rack(stacks=((BLOCK,) * 2,) * 3):
    rack = Rack(tuple(Stack(blocks, i) for i, blocks in enumerate(stacks)), V, D)
    return rack, init_rack(rack, KEY)


def adapter_of(rack, index, rank=2, name="stack"):
    spec = AdapterSpec(rank=rank, alpha=4.0, dropout=0.1)
    first = sum(len(stack.blocks) for stack in rack.stacks[:index])
    tree = init_adapter(rack.stacks[index], StackAdapter(stack=index, name=name, spec=spec), first, KEY)
    return jax.tree.map(lambda x: x + 0.1, tree)


def adapters_of(rack, indices):
    return {stack_name(i): adapter_of(rack, i) for i in indices}


def logits(edited):
    rack, params, adapters = edited
    stacks = {name: combine(tree, adapters.get(name, {})) for name, tree in params["stacks"].items()}
    layout = {"positions_BT": jnp.tile(jnp.arange(T), (2, 1)), "segment_ids_BT": jnp.ones((2, T), jnp.int32)}
    return jax.jit(rack.apply)({"params": {**params, "stacks": stacks}}, TOKENS_BT, **layout)


def assert_same(edited, other):
    assert edited[0] == other[0]
    for a, b in zip(edited[1:], other[1:], strict=True):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("init", ["random", "copy", "zero"])
def test_insert_then_remove_is_identity(at, init):
    rack, params = make_rack()
    adapters = adapters_of(rack, (0, 2))
    longer = insert_stack(rack, params, at, adapters, key=NEW_KEY, init=init)
    assert [stack.stack_id for stack in longer.rack.stacks] == [0, 1, 2, 3]
    kept = [i for i in range(4) if i != at]
    for old, new in enumerate(kept):
        assert longer.params["stacks"][stack_name(new)] is params["stacks"][stack_name(old)]
        assert longer.adapters.get(stack_name(new)) is adapters.get(stack_name(old))
    assert stack_name(at) not in longer.adapters
    assert_same(remove_stack(longer.rack, longer.params, at, longer.adapters), (rack, params, adapters))


def test_the_inputs_are_as_they_were():
    rack, params = make_rack()
    adapters = adapters_of(rack, (1,))
    before = (rack, jax.tree.map(np.array, params), jax.tree.map(np.array, adapters))
    prepend_stack(rack, params, adapters, key=NEW_KEY)
    remove_stack(rack, params, 0, adapters)
    split_stack(rack, params, 1, (1, 1), adapters)
    assert_same((rack, params, adapters), before)


def test_how_new_stacks_begin():
    rack, params = make_rack()
    before = (rack, params, {})
    assert_same(append_stack(rack, params, key=KEY), (*make_rack(((BLOCK,) * 2,) * 4), {}))
    zeroed = insert_stack(rack, params, 1, key=NEW_KEY, init="zero")
    np.testing.assert_array_equal(logits(zeroed), logits(before))
    copied = prepend_stack(rack, params, key=NEW_KEY, init="copy")
    jax.tree.map(np.testing.assert_array_equal, copied.params["stacks"]["000"], params["stacks"]["000"])
    leaves = jax.tree.leaves([copied.params["stacks"][name] for name in ("000", "001")])
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)  # no buffer is shared
    between = insert_stack(rack, params, 2, key=NEW_KEY, init="copy")
    jax.tree.map(np.testing.assert_array_equal, between.params["stacks"]["002"], params["stacks"]["001"])
    random = prepend_stack(rack, params, key=NEW_KEY)
    assert np.abs(logits(random) - logits(before)).max() > 1e-3
    single = append_stack(rack, params, key=NEW_KEY, stack=Stack((OTHER,)))
    assert single.params["stacks"]["003"]["blocks"]["mlp"]["up"]["kernel"].shape == (1, D, 32)


UNLIKE = ((BLOCK, OTHER), (OTHER,), (BLOCK,))


@pytest.mark.parametrize("stacks", [((BLOCK,) * 2, (BLOCK,), (BLOCK,)), UNLIKE], ids=["alike", "unlike"])
@pytest.mark.parametrize("at", [0, 1])
def test_merge_then_split_is_identity_and_the_same_model(stacks, at):
    rack, params = make_rack(stacks)
    adapters = adapters_of(rack, (0, 1, 2))
    merged = merge_stacks(rack, params, at, adapters)
    assert [len(stack.blocks) for stack in merged.rack.stacks] == ([3, 1] if at == 0 else [2, 2])
    assert set(merged.adapters) == {"000", "001"}
    sizes = [len(stack.blocks) for stack in rack.stacks[at : at + 2]]
    again = split_stack(merged.rack, merged.params, at, sizes, merged.adapters)
    assert_same(again, (rack, params, adapters))
    np.testing.assert_allclose(logits(merged), logits((rack, params, adapters)), atol=1e-5)


def test_alike_stacks_are_bitwise_the_same_model_when_merged():
    rack, params = make_rack()
    adapters = adapters_of(rack, (1, 2))
    merged = merge_stacks(rack, params, 1, adapters)
    np.testing.assert_array_equal(logits(merged), logits((rack, params, adapters)))


def test_split_then_merge_is_identity_and_the_rest_follows():
    rack, params = make_rack()
    adapters = adapters_of(rack, (0, 2))
    halves = split_stack(rack, params, 0, (1, 1), adapters)
    assert [stack.stack_id for stack in halves.rack.stacks] == [0, 1, 2, 3]
    assert set(halves.adapters) == {"000", "001", "003"}
    assert halves.params["stacks"]["002"] is params["stacks"]["001"]
    assert_same(merge_stacks(halves.rack, halves.params, 0, halves.adapters), (rack, params, adapters))


def test_adapters_that_differ_must_be_merged_into_the_weights_first():
    rack, params = make_rack()
    alone = adapters_of(rack, (0,))
    ranks = {"000": adapter_of(rack, 0), "001": adapter_of(rack, 1, rank=4)}
    names = {"000": adapter_of(rack, 0), "001": adapter_of(rack, 1, name="trunk")}
    for adapters in (alone, ranks, names):
        with pytest.raises(UsageError, match=r"stacks 0 and 1 have different adapters .* merge the adapters into"):
            merge_stacks(rack, params, 0, adapters)
    weights = {**params["stacks"], "000": merge_adapters(params["stacks"]["000"], alone["000"])}
    merged = merge_stacks(rack, {**params, "stacks": weights}, 0)
    np.testing.assert_allclose(logits(merged), logits((rack, params, alone)), atol=1e-5)


def test_what_cannot_be_done_says_what_to_write():
    rack, params = make_rack()
    frozen = Rack((Stack((BLOCK,), freeze_blocks=True), Stack((BLOCK,), 1)), V, D)
    single = create_simple_rack(1, 1, D, 24, 2, V)
    wide = Stack((Block(d_model=2 * D, d_ff=24, n_heads=2),))
    for sentence, edit in {
        "no place 4 .* write 0 to 3": lambda: insert_stack(rack, params, 4, key=KEY),
        "init 'ones' is unknown": lambda: insert_stack(rack, params, 0, key=KEY, init="ones"),
        "cannot be a copy of stack 2": lambda: append_stack(rack, params, key=KEY, stack=Stack((OTHER,)), init="copy"),
        "stack 3 has d_model 32 in a rack of 16": lambda: append_stack(rack, params, key=KEY, stack=wide),
        "no stack 3 in a rack of 3; write 0 to 2": lambda: remove_stack(rack, params, 3),
        "the only one": lambda: remove_stack(single, init_rack(single, KEY), 0),
        "no stacks 2 and 3": lambda: merge_stacks(rack, params, 2),
        "some of them frozen": lambda: merge_stacks(frozen, init_rack(frozen, KEY), 0),
        r"stack 1 of 2 blocks cannot be split into \[1, 2\]": lambda: split_stack(rack, params, 1, (1, 2)),
    }.items():
        with pytest.raises(UsageError, match=sentence):
            edit()
