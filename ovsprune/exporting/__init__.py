"""ONNX graphs of slim towers."""
