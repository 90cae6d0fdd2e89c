"""KL between models, and how sure a mean, a share or a difference is."""
