"""Retrieval without the matrix of scores: the recall of 1,000 reports among 50,000 images."""

import time

import torch
from torch.nn import functional as F

from m3bind.ops import similarity_rank, similarity_topk

QUERIES, GALLERY, DIM = 1_000, 50_000, 128

torch.manual_seed(0)
images = F.normalize(torch.randn(GALLERY, DIM), dim=-1)
own = torch.randperm(GALLERY)[:QUERIES]  # the image of each report
reports = F.normalize(images[own] + 0.2 * torch.randn(QUERIES, DIM), dim=-1)

start = time.perf_counter()
ranks = similarity_rank(reports, images, own)  # 1: nothing is nearer
print(f"ranks of {QUERIES} among {GALLERY}: {time.perf_counter() - start:.2f} s")
for k in (1, 5, 10):
    print(f"recall@{k:<2} {(ranks <= k).float().mean().item():.3f}")
print(f"median rank {ranks.median().item()}")

start = time.perf_counter()
scores, found = similarity_topk(reports, images, 10)
print(f"the 10 best of each: {time.perf_counter() - start:.2f} s")
agree = (found == own[:, None]).any(1) == (ranks <= 10)
print(f"their own image is among them where its rank says so: {bool(agree.all())}")

# The nearest other image of an image: equal ids are left out, so it does not find itself.
ids = torch.arange(GALLERY)
_, neighbours = similarity_topk(images[:5], images, 1, exclude_ids=(ids[:5], ids))
print(f"nearest others of images 0 to 4: {neighbours.flatten().tolist()}")
print(f"the {QUERIES} x {GALLERY} scores, {QUERIES * GALLERY * 4 >> 20} MiB, were never in memory")
