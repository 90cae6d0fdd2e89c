"""A model that learns from a judge of the answers that it writes itself."""
