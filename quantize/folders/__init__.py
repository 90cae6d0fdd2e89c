"""From a float folder to a quantized one: plan, layers, resuming, report."""
