"""What the figures of `metrics.scene_quality` are called, which way is better, and how they are printed."""

from typing import NamedTuple

from moe3d_deploy.metrics.scene import EXPERT_SHARE

ALIGNMENT = (
    "Depth is compared after one scale per scene, median(true) / median(predicted); point clouds after a similarity "
    "and ICP; lengths are shares of the scene's mean distance."
)
POINT_MEASURES = (
    "accuracy_mean", "accuracy_median", "completeness_mean", "completeness_median", "normal_consistency_mean",
    "normal_consistency_median",
)  # fmt: skip


class Measure(NamedTuple):
    """A key of `scene_quality`; `better` is "lower", "higher", or "" where neither is; `unit` "", "share" or "deg"."""

    key: str
    name: str
    better: str = ""
    unit: str = ""

    def text(self, value: float) -> str:
        """The figure with its unit, as tables show it."""
        if self.unit == "share":
            return f"{100 * value:.2f} %"
        return f"{value:.2f} deg" if self.unit == "deg" else f"{value:.4f}"


_MEASURES = {
    measure.key: measure
    for measure in (
        Measure("abs_rel", "AbsRel", "lower"),
        Measure("rmse", "RMSE", "lower"),
        Measure("delta1", "delta < 1.25", "higher", "share"),
        Measure("boundary_f1", "boundary F1", "higher"),
        Measure("boundary_precision", "boundary precision", "higher"),
        Measure("boundary_recall", "boundary recall", "higher"),
        Measure("edge_miou", "edge mIoU", "higher"),
        Measure("flying", "flying points", "lower", "share"),
        Measure("accuracy_mean", "accuracy, mean", "lower"),
        Measure("accuracy_median", "accuracy, median", "lower"),
        Measure("completeness_mean", "completeness, mean", "lower"),
        Measure("completeness_median", "completeness, median", "lower"),
        Measure("normal_consistency_mean", "normal consistency, mean", "higher"),
        Measure("normal_consistency_median", "normal consistency, median", "higher"),
        Measure("rotation_deg", "rotation error", "lower", "deg"),
        Measure("translation_deg", "translation direction error", "lower", "deg"),
        Measure("auc30", "camera AUC@30", "higher"),
        Measure("gate_entropy", "gate entropy in nats"),
    )
}


def measure(key: str) -> Measure:
    """The measure of a key of `scene_quality`; one that is not known is called by its key."""
    if key.startswith(EXPERT_SHARE):
        return Measure(key, f"expert {key.removeprefix(EXPERT_SHARE)} is strongest", unit="share")
    return _MEASURES.get(key, Measure(key, key))


def in_order(keys: set[str]) -> list[str]:
    """Keys in the order of tables; those that are not known come last, by name."""
    known = [key for key in _MEASURES if key in keys]
    return known + sorted(keys - set(known))
