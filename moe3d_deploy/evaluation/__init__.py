"""How good is a model on scenes with truth, and does another form of it see the same? One scene in memory at a time.

The measures themselves are `moe3d_deploy.metrics`; docs/evaluation.md says how they are put together.
"""

from moe3d_deploy.evaluation.compare import Change, Comparison, compare
from moe3d_deploy.evaluation.evaluate import Evaluation, Predictor, SceneResult, Summary, evaluate, model_predictor
from moe3d_deploy.evaluation.scenes import EvaluationScene, native_size, rendered_scene, rendered_scenes

__all__ = [
    "Change",
    "Comparison",
    "Evaluation",
    "EvaluationScene",
    "Predictor",
    "SceneResult",
    "Summary",
    "compare",
    "evaluate",
    "model_predictor",
    "native_size",
    "rendered_scene",
    "rendered_scenes",
]
