"""Quantized folders: planned, made layer by layer, resumed, written."""
