"""What other runtimes need beside the graph: ONNX Runtime GenAI, transformers.js."""
