"""Which weights an export is of, in a form that travels to a child process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe3d_deploy.export.precision import PrecisionPolicy

if TYPE_CHECKING:
    from moe3d_deploy.checkpoint import WeightSource
    from moe3d_deploy.model import MoE3D


@dataclass(frozen=True)
class SourceSpec:
    """The arguments of `open_checkpoint`."""

    source: str
    seed: int | None = None
    allow_pickle: bool = False

    def open(self) -> "WeightSource":
        from moe3d_deploy.checkpoint import open_checkpoint

        return open_checkpoint(self.source, seed=self.seed, allow_pickle=self.allow_pickle)

    def load(self, policy: PrecisionPolicy, outputs: Sequence[str]) -> "MoE3D":
        """The model in the precision of `policy`; the point head only if an output needs it."""
        from moe3d_deploy.checkpoint import load_model
        from moe3d_deploy.model.moe3d import OF_POINT_HEAD

        source = self.open()
        point_head = source.config.point_head and not set(OF_POINT_HEAD).isdisjoint(outputs)
        return load_model(source, dtype_of=policy.dtype_of(), point_head=point_head)
