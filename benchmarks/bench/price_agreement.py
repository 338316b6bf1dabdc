"""Whether forms of one head give one result: a form that computes something else has no time worth telling."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.bench.price import PLAIN, SINGLE

# Largest difference between two forms of the same weights, of each value. In float32 these are sums of some thousand
# terms in another order, under an exponential; in 16 bits the convolutions before it are rounded.
LIMITS = {"fp32": 1e-3, "fp16": 1e-2}


def disagreements(maps: Mapping[str, Sequence[NDArray[Any]]], limit: float) -> Iterator[tuple[str, str]]:
    """(form, what is wrong) for every form whose maps are not finite or not those of the plain one.

    The single head is another function: its maps have to be finite only. Without a plain form so have all.
    """
    for form, found in maps.items():
        if not all(np.isfinite(values).all() for values in found):
            yield form, "an output is not finite"
        elif form != SINGLE and PLAIN in maps:
            pairs = zip(found, maps[PLAIN], strict=True)
            error = max(float((np.abs(got - want) / np.abs(want)).max()) for got, want in pairs)
            if not error <= limit:
                yield form, f"off by {error:.2g} of the plain form, limit {limit:g}"
