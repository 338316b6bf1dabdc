"""ONNX -> engine: shape profiles and the build, run in a process of its own."""
