"""Between formats, back to floats, and adapters merged."""
