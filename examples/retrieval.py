"""Search and recall in a gallery whose score matrix is never formed: python examples/retrieval.py

Queries are noisy copies of gallery rows, as two views of one image are.
"""

import time

import torch
import torch.nn.functional as F

from m3bind.ops import similarity_rank, similarity_topk

NUM_QUERIES, NUM_ROWS, FEATURES = 1000, 100_000, 256

torch.manual_seed(0)
gallery = F.normalize(torch.randn(NUM_ROWS, FEATURES), dim=1)
own = torch.randint(0, NUM_ROWS, (NUM_QUERIES,))
noise = F.normalize(torch.randn(NUM_QUERIES, FEATURES), dim=1)
queries = F.normalize(gallery[own] + 3.5 * noise, dim=1)

start = time.perf_counter()
values, indices = similarity_topk(queries, gallery, 10)
print(f"the 10 nearest of {NUM_QUERIES} queries: {time.perf_counter() - start:.2f} s")
print(f"the first query: row {indices[0, 0]} at {values[0, 0]:.3f}, its own is row {own[0]}")

ranks = similarity_rank(queries, gallery, own)
for k in (1, 10, 100):
    print(f"recall@{k}: {(ranks <= k).float().mean():.3f}")
print(f"median rank: {ranks.median()} of {NUM_ROWS}")
assert torch.equal((indices == own[:, None]).any(1), ranks <= 10)

# Neighbours within the gallery: a row must not find itself.
ids = torch.arange(NUM_ROWS)
some = gallery[:NUM_QUERIES]
_, neighbours = similarity_topk(some, gallery, 5, exclude_ids=(ids[:NUM_QUERIES], ids))
assert not (neighbours == ids[:NUM_QUERIES, None]).any()
print(f"neighbours of row 0: {neighbours[0].tolist()}")
