"""What an ONNX graph costs on a processor, worked out before anything runs."""
