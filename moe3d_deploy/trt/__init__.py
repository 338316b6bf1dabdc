"""TensorRT and TensorRT-RTX through Polygraphy: what is installed, build an engine from an ONNX file, run an engine.

The only package that imports tensorrt, tensorrt_rtx or polygraphy, and importing it imports none of them. Precision is
the graph's: networks are strongly typed on both builders and no flag changes a type. A plugin library is registered
with TensorRT alone: TensorRT-RTX aborts the process when one is.
"""

from moe3d_deploy.trt.attentions import Attention
from moe3d_deploy.trt.builder import BuiltEngine, build_engine
from moe3d_deploy.trt.features import BuildFlags, check_flags, check_targets, check_version, knows_opset
from moe3d_deploy.trt.inspection import layer_information
from moe3d_deploy.trt.installed import (
    RTX_CAPABILITIES,
    Capability,
    available,
    load,
    require,
    target_capabilities,
    title,
    visible_gpus,
)
from moe3d_deploy.trt.load_checks import accepted_findings, load_faults, plugin_digest, rebuild_command
from moe3d_deploy.trt.network import ImageProfile, NetworkFacts
from moe3d_deploy.trt.onnx_names import calls_of, onnx_nodes
from moe3d_deploy.trt.plugin_library import PluginLibrary
from moe3d_deploy.trt.runner import EngineRunner
from moe3d_deploy.trt.watch import Progress

__all__ = [
    "RTX_CAPABILITIES",
    "Attention",
    "BuildFlags",
    "BuiltEngine",
    "Capability",
    "EngineRunner",
    "ImageProfile",
    "NetworkFacts",
    "PluginLibrary",
    "Progress",
    "accepted_findings",
    "available",
    "build_engine",
    "calls_of",
    "check_flags",
    "check_targets",
    "check_version",
    "knows_opset",
    "layer_information",
    "load",
    "load_faults",
    "onnx_nodes",
    "plugin_digest",
    "rebuild_command",
    "require",
    "target_capabilities",
    "title",
    "visible_gpus",
]
