"""Whether the graph is sound and predicts what PyTorch predicts."""
