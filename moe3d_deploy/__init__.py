"""MoE3D Deploy: from a VGGT or MoE3D checkpoint to the machine that needs depth."""

__version__ = "0.1.0"
