"""Progress records that somebody else made or changed: every field is checked before anything is done with it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from test_checkpoint_trust import forge, record, store_at

from stackwise_jax.checkpoint import Store, check_goes_on
from stackwise_jax.errors import RunError

COUNTS = ("number", "phase", "step", "global_step", "metrics_bytes", "bad_steps")
PROGRESS = {
    **{key: [-1, 1.0, "1", None, True, 10**30, []] for key in COUNTS},
    "versions": [
        7,
        {"../../x": 1},
        {"/x": 1},
        {"head": -1},
        {"head": 10**8},
        {"head": "1"},
        {"progress": 1},
        [["a", 1]],
    ],
    "formats": [7, {"head": 1}, {"head": "fp33"}, {"head": ["fp32"]}],
    "data": [7, []],
    "results": [7, {}, [7], [{"index": "0"}], [{"versions": {"../x": 1}}], [{"versions": {"head": 1}}], [{"path": 7}]],
    "finished": [1, "yes", None],
    "extra": [7, {"history": 7}, {"seconds": "x"}, {"skipped": -1}],
    "digests": [7, {"../x": "0" * 64}, {"rack.json": "0"}],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in PROGRESS.items() for v in values])
def test_a_record_with_wrong_types_is_refused_and_the_field_named(tmp_path, key, value):
    store = store_at(tmp_path)
    file = store.directory / "progress" / "00000001.json"
    forge(file, lambda data: data["progress"].update({key: value}))
    with pytest.raises(RunError, match=rf"00000001\.json is damaged: {key}"):
        store.read(1)
    with pytest.raises(RunError, match="no record"):
        store.latest()


def test_a_record_that_lacks_a_field_or_has_one_too_many_is_refused(tmp_path):
    store = store_at(tmp_path)
    file = store.directory / "progress" / "00000001.json"
    sound = file.read_bytes()
    for change in (lambda p: p.pop("versions"), lambda p: p.pop("step"), lambda p: p.update(other=1)):
        forge(file, lambda data, change=change: change(data["progress"]))
        with pytest.raises(RunError, match=r"damaged: the record .*(versions|step|other)"):
            store.read(1)
        file.write_bytes(sound)
    shutil.copy(file, file.with_name("00000007.json"))
    with pytest.raises(RunError, match="it is the record 1 under another name"):
        store.read(7)
    with pytest.raises(RunError, match=r"00000008\.json is damaged: step cannot be -1"):
        store.commit(replace(record(8, {"stacks/000": 1}), step=-1))
    assert store.records() == [1, 7]


GOES_ON = {
    "data": {"fingerprint": "a", "held_out": "b", "tokenizer": "c"},
    "extra": {"seconds": 1.0, "skipped": 0, "history": [[1, None]]},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"fingerprint": "a", "held_out": "b"}}, r"has no data\.tokenizer"),
        ({"versions": {"embed": 1}}, r"has no versions\.head"),
        ({"extra": {"seconds": 1.0, "skipped": 0}}, r"has no extra\.history"),
        ({"step": 0, "results": [{"index": 0}]}, r"has no results\[0\]\.versions"),
        ({"phase": 10**6}, "names phase 1000000 of 2"),
        ({"results": [{"index": 10**6}]}, "names phase 1000000 of 2"),
    ],
)
def test_a_record_from_which_its_run_cannot_go_on_is_refused(tmp_path, change, said):
    sound = record(3, {"embed": 1, "head": 1}, **GOES_ON)
    check_goes_on(sound, 2, tmp_path)
    with pytest.raises(RunError, match=f"record 3 of .* is damaged: it {said}"):
        check_goes_on(replace(sound, **change), 2, tmp_path)


def test_weights_that_a_record_forgets_are_not_taken_for_new_ones(tmp_path):
    store = store_at(tmp_path)
    figures = dict.fromkeys(("held_out_loss", "bits_per_byte", "tokens", "flops", "seconds"), 1)
    result = {"index": 0, "name": "a", "versions": {"stacks/000": 1}, "formats": {}} | figures
    with pytest.raises(RunError, match=r"versions has no stacks/000"):
        store.commit(record(2, {}, results=[result]))
    store.commit(record(2, {"stacks/000": 1}, results=[result]))


def test_a_record_of_version_0_1_is_read(tmp_path):
    store = store_at(tmp_path)

    def as_before(data):
        data["format"] = 1
        del data["progress"]["digests"]

    forge(store.directory / "progress" / "00000001.json", as_before)
    assert store.latest() == record(1, {"stacks/000": 1})


def test_figures_of_a_long_run_are_no_damage(tmp_path):
    """A phase of days on a large accelerator has more FLOPs than 64 bits hold."""
    store = store_at(tmp_path)
    result = {"index": 0, "name": "a", "formats": {}, "held_out_loss": 1.0, "bits_per_byte": 1.0}
    result |= {"tokens": 10**13, "flops": 10**25, "seconds": 1e6, "versions": {"stacks/000": 1}}
    store.commit(record(2, {"stacks/000": 1}, results=[result]))
    assert store.latest().results[0]["flops"] == 10**25


def test_records_that_did_not_change_are_read_once(tmp_path, monkeypatch):
    store, plain, read = store_at(tmp_path), Store.read, []
    monkeypatch.setattr(Store, "read", lambda self, number: read.append(number) or plain(self, number))
    for version in (3, 4, 5):
        store.save_item("stacks/000", version, {"a": np.zeros(2)}, {})
    assert read == [1]
    forge(store.directory / "progress" / "00000001.json", lambda data: data["progress"].update(step=-1))
    store.save_item("stacks/000", 1, {"a": np.zeros(2)}, {})  # no sound record names it any more
    assert read == [1, 1]
