"""Cutting documents into sequences of equal length.

Legend: N sequences (rows), T sequence length, D documents, P pieces of documents, S tokens of the whole stream.
"""

from __future__ import annotations

import numpy as np


def pack(documents: list[np.ndarray], seq_len: int, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill rows with documents, each whole where it fits in one.

    A longer document is cut into pieces of seq_len and a rest; each piece is a segment of its own. The rest has at
    least two tokens, so that the last token of a document, which says that it ends, has one that it is predicted from.
    Rows are filled by best fit, longest piece first (Johnson 1974), and then sorted by the first piece they hold, so
    that the order of the text is kept as far as can be.

    Returns:
        tokens_NT, segment_ids_NT (from 1 within a row; 0: padding) and positions_NT (from 0 within a segment), int32.
    """
    doc_lengths = np.array([len(d) for d in documents], np.int64)
    n_pieces = -(-doc_lengths // seq_len)
    lengths_P = np.full(n_pieces.sum(), seq_len, np.int64)
    last_D = np.cumsum(n_pieces) - 1
    lengths_P[last_D] = doc_lengths - (n_pieces - 1) * seq_len
    alone_D = (n_pieces > 1) & (lengths_P[last_D] == 1)
    lengths_P[last_D[alone_D]] += 1
    lengths_P[last_D[alone_D] - 1] -= 1

    rows_P = _best_fit(lengths_P, seq_len)
    order_P = np.argsort(rows_P, kind="stable")  # by row, then by place in the text
    is_first_P = np.diff(rows_P[order_P], prepend=-1) != 0
    segments_P, offsets_P = np.empty_like(rows_P), np.empty_like(rows_P)
    segments_P[order_P] = 1 + _since_first(np.arange(len(order_P)), is_first_P)
    offsets_P[order_P] = _since_first(np.cumsum(lengths_P[order_P]) - lengths_P[order_P], is_first_P)

    starts_P = np.cumsum(lengths_P) - lengths_P
    positions_S = np.arange(lengths_P.sum()) - np.repeat(starts_P, lengths_P)
    places_S = np.repeat(rows_P * seq_len + offsets_P, lengths_P) + positions_S
    shape = (int(rows_P.max()) + 1, seq_len)
    tokens_NT, segment_ids_NT = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    positions_NT = np.zeros(shape, np.int32)
    tokens_NT.reshape(-1)[places_S] = np.concatenate(documents)
    segment_ids_NT.reshape(-1)[places_S] = np.repeat(segments_P, lengths_P)
    positions_NT.reshape(-1)[places_S] = positions_S
    return tokens_NT, segment_ids_NT, positions_NT


def chunk(documents: list[np.ndarray], seq_len: int, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the stream of all documents every seq_len tokens; each row is one segment. The last row is padded.

    No row begins with the last token of a document, which nothing in the row could predict: the row before it then
    ends one token earlier.

    Returns:
        tokens_NT, segment_ids_NT and positions_NT as `pack` does.
    """
    stream_S = np.concatenate(documents)
    ends_S = np.zeros(len(stream_S), bool)
    ends_S[np.cumsum([len(document) for document in documents]) - 1] = True
    starts = [0]
    while starts[-1] + seq_len < len(stream_S):
        starts.append(starts[-1] + seq_len - int(ends_S[starts[-1] + seq_len]))
    lengths_N = np.diff([*starts, len(stream_S)])
    segment_ids_NT = (np.arange(seq_len) < lengths_N[:, None]).astype(np.int32)
    tokens_NT = np.full(segment_ids_NT.shape, pad_id, np.int32)
    tokens_NT[segment_ids_NT == 1] = stream_S
    return tokens_NT, segment_ids_NT, np.arange(seq_len, dtype=np.int32) * segment_ids_NT


def _since_first(values: np.ndarray, is_first: np.ndarray) -> np.ndarray:
    """Values that never fall, each less the value where its group began."""
    return values - np.maximum.accumulate(np.where(is_first, values, 0))


def _best_fit(lengths_P: np.ndarray, seq_len: int) -> np.ndarray:
    """The row of each piece: always the fullest row in which it fits."""
    by_space: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows by the space left in them
    spaces = 0  # bit s is set while a row has s tokens left: the search is for the lowest bit from n up
    rows_P = np.empty(len(lengths_P), np.int64)
    n_rows = 0
    lengths = lengths_P.tolist()
    for piece in np.argsort(-lengths_P, kind="stable").tolist():
        n = lengths[piece]
        fitting = spaces >> n
        if fitting:
            space = n + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            row, space, n_rows = n_rows, seq_len, n_rows + 1
        rows_P[piece] = row
        if space > n:
            by_space[space - n].append(row)
            spaces |= 1 << (space - n)
    _, first_piece = np.unique(rows_P, return_index=True)
    rank = np.empty(n_rows, np.int64)
    rank[np.argsort(first_piece)] = np.arange(n_rows)
    return rank[rows_P]
