"""Keeps the best of the candidates that similarity_topk has collected."""

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-(1 << 63))  # below every candidate's key
# More keys at a time use the stack with spaces of 1024.
_KEYS_AT_ONCE = tl.constexpr(2048)


@triton.jit
def _kth_largest(scores, k):
    """The k-th largest integer of each row, bit by bit: the largest one that k are not below. The
    lowest where there are fewer than k."""
    enough = tl.sum((scores >= 0).to(tl.int32), 1) >= k
    kth = tl.where(enough, 0, -2147483648)
    step = 1073741824
    for _ in range(31):
        enough = tl.sum((scores >= (kth + step)[:, None]).to(tl.int32), 1) >= k
        kth = tl.where(enough, kth + step, kth)
        step = step >> 1
    return kth


@triton.jit
def keep_best(
    keys,  # [rows, num_parts, CAPACITY] int64: a row's own in the ascending order of columns
    counts, limits,  # [rows, num_parts]: how many keys, and a score that more than k reach
    first_row, num_parts, part, k,
    BLOCK_M: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Leaves the k best keys of each row, in the order in which they are there."""
    ROWS: tl.constexpr = min(BLOCK_M, max(1, _KEYS_AT_ONCE // CAPACITY))
    for group in range(0, BLOCK_M, ROWS):
        rows = first_row + group + tl.arange(0, ROWS)
        lists = rows.to(tl.int64) * num_parts + part
        there = tl.arange(0, CAPACITY)[None, :] < tl.load(counts + lists)[:, None]
        pointers = keys + lists[:, None] * CAPACITY
        own = tl.load(pointers + tl.arange(0, CAPACITY)[None, :], mask=there, other=NO_KEY)
        scores = (own >> 32).to(tl.int32)
        kth = _kth_largest(scores, k)
        above = scores > kth[:, None]
        equal = there & (scores == kth[:, None])
        # Both numbers in one sum: the first of the equal ones, those of lower columns, stay.
        before = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 1)
        room = k - tl.sum(above.to(tl.int32), 1)
        places = (before & 0xFFFF) + tl.minimum(before >> 16, room[:, None]) - 1
        tl.debug_barrier()  # all have been read
        kept = above | (equal & ((before >> 16) <= room[:, None]))
        tl.store(pointers + places, own, mask=kept)
        tl.store(counts + lists, tl.sum(kept.to(tl.int32), 1))
        # As a score again; nothing but NaN is above infinity, and not even that is above NaN.
        bits = tl.where(kth < 0, kth ^ 0x7FFFFFFF, kth)
        limit = tl.where(kth == 0x7FFFFFFF, float("inf"), bits.to(tl.float32, bitcast=True))
        tl.store(limits + lists, limit)
