"""One session over a bundle and one over its checkpoint, each opened once per run, and images for them."""

import functools

import exports
import numpy as np
from exports import MOE
from numpy.typing import NDArray

from moe3d_deploy.export.verify import images_for
from moe3d_deploy.runtime.session import Session

Images = NDArray[np.float32]


@functools.cache
def of_bundle() -> Session:
    return Session.open(exports.bundle().path)


@functools.cache
def of_checkpoint() -> Session:
    return Session.open(exports.checkpoint())


def images(*shape: int) -> Images:
    """B, S, rows, columns in patches."""
    batch, views, rows, columns = shape
    return images_for((batch, views, rows, columns), MOE.patch_size)
