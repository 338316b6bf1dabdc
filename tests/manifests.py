"""Examples of a manifest and of an engine's record in it, which several test files fill bundles with."""

from moe3d_deploy.config import PRESETS
from moe3d_deploy.manifest import (
    Checkpoint,
    EngineRecord,
    Manifest,
    Preprocessing,
    Profile,
    Range,
    ShapeRanges,
    Tensor,
    Verification,
)

ENGINE = "engines/moe3d-tiny_1-4-8x392x518_fp16_sm89_rtx1.6.1.plan"


def example_engine(file: str = ENGINE) -> EngineRecord:
    profile = Profile(min=(1, 1, 392, 518), opt=(1, 4, 392, 518), max=(1, 8, 392, 518))
    return EngineRecord(
        file=file,
        builder="tensorrt-rtx",
        builder_version="1.6.1",
        compute_capabilities=(89,),
        precision="fp16",
        profiles=(profile,),
        plugin={"name": "ExpertMix", "version": "1"},
        audit={"summary": "fp16 matmuls 456 of 456", "matmuls": {"fp16": 456}},
        build={"seconds": 51.0, "peak_bytes": 2_200_000_000, "host": "x86_64"},
    )


def example_manifest() -> Manifest:
    """A manifest of a bundle that has only its ONNX file, but for `files`, which a writer fills in."""
    return Manifest(
        name="moe3d-tiny",
        created_by={"moe3d_deploy": "0.1.0", "torch": "2.13.0"},
        model_config=PRESETS["moe3d-tiny"].to_dict(),
        checkpoint=Checkpoint(origin="preset:moe3d-tiny seed 0", sha256=None, licence="Apache-2.0"),
        preprocessing=Preprocessing(
            mode="crop", size=224, patch_size=7, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), layout="BS3HW"
        ),
        inputs=(Tensor("images", "float32", ("B", "S", 3, "H", "W"), "RGB in [0,1]"),),
        outputs=(
            Tensor("depth", "float32", ("B", "S", "H", "W"), "along the optical axis, up to the scene's scale"),
            Tensor("depth_conf", "float32", ("B", "S", "H", "W"), "at least 1"),
        ),
        precision="fp16",
        opset=20,
        shape_ranges=ShapeRanges(Range(1, None), Range(1, 32), Range(140, 518, 14), Range(140, 518, 14)),
        merged_experts=True,
        verification=Verification(
            status="passed",
            limits={"depth": {"max": 1e-2, "mean": 1e-3}, "*": {"max": 2e-2}},
            cases=(
                {"shape_in_patches": [1, 1, 10, 10], "errors": {"executed": {"depth": {"max": 5.2e-3, "p99": 3e-3}}}},
                {
                    "shape_in_patches": [1, 2, 10, 14],
                    "errors": {
                        "executed": {"depth": {"max": 4.1e-3, "p99": 1e-3}, "pose_enc": {"max": 1e-4, "mean": 1e-5}},
                        "rounded": {"depth": {"max": 6.3e-3, "mean": 2e-4}},
                    },
                },
            ),
            headroom={"limit": 0.5, "tensors": 456, "largest": {"depth_head.out": 0.31, "aggregator.0": 0.12}},
        ),
    )
