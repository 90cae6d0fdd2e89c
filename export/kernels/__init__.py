"""Which kernel of ONNX Runtime multiplies which matrix fastest here."""
