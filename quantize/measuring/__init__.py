"""How far a quantized model is from the float one, measured layer by layer."""
