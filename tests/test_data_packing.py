"""Cutting documents into rows: nothing lost, nothing twice, everything where it says."""

import numpy as np
import pytest

from stackwise_jax.data.packing import chunk, pack

T = 16


def some_documents(lengths, seed=0):
    """Documents of distinct tokens, so that each token tells where it is from."""
    starts = np.cumsum([1000, *lengths])
    return [np.arange(s, s + n, dtype=np.int32) for s, n in zip(starts, lengths, strict=False)]


LENGTHS = {
    "mixed": np.random.default_rng(0).integers(1, 3 * T, 200).tolist(),
    "short": np.random.default_rng(1).integers(1, T // 2, 200).tolist(),
    "exact": [T, 2 * T, T, T],
    "one": [3],
    "one over": [T + 1],
    "all over": [T + 1, 2 * T + 1, T - 1, 3] * 9,
}


def segments_of(tokens_NT, segment_ids_NT, positions_NT):
    for tokens_T, segments_T, positions_T in zip(tokens_NT, segment_ids_NT, positions_NT, strict=True):
        n_real = int((segments_T > 0).sum())
        # Real tokens come first, segments count 1, 2, 3 ... in order, padding is 0 in everything.
        assert (segments_T[:n_real] > 0).all() and set(np.diff(segments_T[:n_real])) <= {0, 1} and segments_T[0] == 1
        assert not segments_T[n_real:].any() and not positions_T[n_real:].any() and not tokens_T[n_real:].any()
        for segment in range(1, int(segments_T.max()) + 1):
            here = segments_T == segment
            assert positions_T[here].tolist() == list(range(here.sum()))
            yield tokens_T[here]


@pytest.mark.parametrize("case", LENGTHS)
def test_pack_places_each_document_once_whole_or_in_pieces_of_a_row(case):
    documents = some_documents(LENGTHS[case])
    arrays = pack(documents, T, pad_id=0)
    assert all(a.dtype == np.int32 and a.shape == arrays[0].shape and a.shape[1] == T for a in arrays)
    found = sorted((s.tolist() for s in segments_of(*arrays)), key=lambda s: s[0])
    assert [token for piece in found for token in piece] == np.concatenate(documents).tolist()
    starts, lasts = {int(d[0]) for d in documents}, {int(d[-1]) for d in documents}
    for piece in found:
        assert piece[-1] in lasts or len(piece) == T or (len(piece) == T - 1 and piece[-1] + 2 in lasts)
        assert len(piece) > 1 or piece[0] in starts  # only a document of one token stands alone


def test_pack_fills_rows_and_keeps_the_order_of_the_text():
    documents = some_documents(LENGTHS["mixed"])
    tokens_NT, segments_NT, _ = pack(documents, T, pad_id=0)
    assert (segments_NT > 0).mean() > 0.98
    firsts = [row[segments > 0].min() for row, segments in zip(tokens_NT, segments_NT, strict=True)]
    assert firsts == sorted(firsts)
    for row, segments in zip(tokens_NT, segments_NT, strict=True):
        assert (np.diff(row[segments > 0]) > 0).all()


def test_pack_needs_no_more_rows_than_first_fit():
    lengths = LENGTHS["short"]
    rows: list[int] = []
    for n in lengths:
        at = next((i for i, filled in enumerate(rows) if filled + n <= T), None)
        if at is None:
            rows.append(n)
        else:
            rows[at] += n
    assert len(pack(some_documents(lengths), T, pad_id=0)[0]) <= len(rows)


def test_pad_id_fills_the_rest():
    tokens_NT, segments_NT, _ = pack(some_documents([3, 20]), T, pad_id=7)
    assert (tokens_NT[segments_NT == 0] == 7).all() and (segments_NT == 0).any()


@pytest.mark.parametrize("case", LENGTHS)
def test_chunk_is_the_stream_cut_in_rows(case):
    documents = some_documents(LENGTHS[case])
    tokens_NT, segments_NT, positions_NT = chunk(documents, T, pad_id=7)
    stream = np.concatenate(documents)
    assert tokens_NT[segments_NT == 1].tolist() == stream.tolist()
    assert (tokens_NT[segments_NT == 0] == 7).all() and set(segments_NT.reshape(-1).tolist()) <= {0, 1}
    assert (np.diff(segments_NT, axis=1) <= 0).all() and (segments_NT[:-1].sum(1) >= T - 1).all()
    lasts = {int(d[-1]) for d in documents}
    assert min(LENGTHS[case]) == 1 or not lasts & set(tokens_NT[1:, 0].tolist())
    assert (positions_NT == np.arange(T) * segments_NT).all()
    assert {a.dtype for a in (tokens_NT, segments_NT, positions_NT)} == {np.dtype(np.int32)}
