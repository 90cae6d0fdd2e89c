"""Tasks of lm-evaluation-harness and our own offline questions."""
