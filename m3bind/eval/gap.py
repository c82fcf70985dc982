"""The modality gap: how far apart the modalities lie as wholes."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from m3bind.eval.store import as_unit

__all__ = ["modality_gap"]


def modality_gap(
    embeddings: Mapping[str, Any],  # modality -> [N, D] unit norm
) -> dict[str, float]:
    """``(a.mean(0) - b.mean(0)).norm()`` for every unordered pair "a<->b", and their "mean".

    The centroids are not renormalised (Liang et al., "Mind the gap", arXiv 2203.02053): 0 when
    the clouds lie on one another, at most 2. Fewer than two modalities give an empty dict.
    """
    centroids = {
        name: as_unit(x, f"{name} embeddings").mean(axis=0, dtype=np.float64)
        for name, x in embeddings.items()
    }
    gaps = {
        f"{a}<->{b}": float(np.linalg.norm(centroids[a] - centroids[b]))
        for a, b in combinations(centroids, 2)
    }
    return {"mean": float(np.mean(list(gaps.values()))), **gaps} if gaps else {}
