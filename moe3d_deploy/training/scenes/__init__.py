"""Procedural scenes with exact depth, normals, cameras and occlusion edges, rendered on the fly."""

from moe3d_deploy.training.scenes.options import GENERATOR_VERSION, SPLITS, Scene, SceneOptions
from moe3d_deploy.training.scenes.render import render_scene

__all__ = ["GENERATOR_VERSION", "SPLITS", "Scene", "SceneOptions", "render_scene"]
