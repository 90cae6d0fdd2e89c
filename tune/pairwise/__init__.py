"""A model that learns which answers are preferred."""
