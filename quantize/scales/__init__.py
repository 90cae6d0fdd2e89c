"""Scales and norm gains of a quantized folder, trained on the float model."""
