"""torch -> one verified ONNX file."""
