"""Documents of different lengths into rows of one length: best fit, the longest document first.

    order, ends = best_fit([5, 2, 7, 3, 1], capacity=8)        # rows {2, 4}, {0, 3}, {1}: 7 + 1, 5 + 3, 2

A document goes into the row in which it leaves the least room. That takes at most 11/9 of the fewest rows that there
could be, and 4 more (Johnson, Demers, Ullman, Garey, Graham 1974, "Worst-case performance bounds for simple
one-dimensional packing algorithms").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def best_fit(lengths: ArrayLike, capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(order, ends): the documents row by row, by number, and where each row ends in that list.

        >>> order, ends = best_fit([5, 2, 7, 3, 1], capacity=8)
        >>> order.tolist(), ends.tolist()
        ([2, 4, 0, 3, 1], [2, 4, 5])

    `lengths` [n], each in 1 … capacity. A pure function: of two documents of one length the earlier comes first, rows
    come in the order in which they were begun, and within a row documents stand in the order of their numbers. Cost:
    n log n, and a number of `capacity` bits per document. Raises ValueError for a length out of range.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and not 1 <= sizes.min() <= sizes.max() <= capacity:
        raise ValueError(f"lengths from {sizes.min()} to {sizes.max()} must lie in 1 … capacity={capacity}.")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left, the latest last
    some = 0  # bit r is set where a row has room r
    for document in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[document])
        if fitting := some >> size:
            room = size + (fitting & -fitting).bit_length() - 1  # the least that suffices
            row = with_room[room].pop()
            if not with_room[room]:
                some &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        left = room - size
        with_room[left].append(row)
        if left:
            some |= 1 << left
    order = np.array([document for row in rows for document in sorted(row)], np.int64)
    return order, np.cumsum([len(row) for row in rows], dtype=np.int64)
