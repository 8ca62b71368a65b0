"""Whether a phase caches its prefix: the rule, and the sentence that gives the reason."""

import pytest

from stackwise_jax.errors import UsageError
from stackwise_jax.memory import choose_cache


def choose(kind="auto", **changes):
    usual = dict(phase_visits=100, dataset_batches=80, chunk_bytes=1 << 20, host_budget=50 << 20, disk_budget=50 << 20)
    return choose_cache(kind, **(usual | dict(has_prefix=True, corruption="auto") | changes))


def test_auto_caches_what_is_visited_at_most_twice():
    choice = choose()
    assert choice.use and choice.kind == "host" and choice.n_chunks == 80 and "1.2 times" in choice.reason
    assert choose(phase_visits=160).use and not choose(phase_visits=161).use
    assert "overfit" in choose(phase_visits=400).reason and "5.0 times" in choose(phase_visits=400).reason
    assert choose(phase_visits=30).n_chunks == 30


def test_auto_recomputes_where_a_cache_is_impossible():
    assert "budget" in choose(disk_budget=10 << 20).reason
    assert "fresh" in choose(corruption="fresh").reason
    for choice in (choose(disk_budget=10 << 20), choose(corruption="fresh"), choose("recompute")):
        assert (choice.use, choice.kind, choice.n_chunks) == (False, "recompute", 0)
    for kind in ("auto", "host", "disk", "recompute"):
        assert not choose(kind, has_prefix=False).use


def test_a_kind_that_is_asked_for_is_obeyed_or_refused():
    assert choose("host", phase_visits=4000) == choose("host", phase_visits=4000) and choose("host").kind == "host"
    assert choose("disk", phase_visits=4000, disk_budget=80 << 20).kind == "disk"
    with pytest.raises(UsageError, match=r"cache\.kind disk.*cache\.disk_budget"):
        choose("disk")
    with pytest.raises(UsageError, match=r"cache\.kind host.*cache\.host_budget.*cache\.disk_budget"):
        choose("host", host_budget=10 << 20)
    with pytest.raises(UsageError, match=r"objective\.corruption fixed"):
        choose("host", corruption="fresh")
