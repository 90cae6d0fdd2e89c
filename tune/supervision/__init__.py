"""Supervised tuning: a model learns to write the answers of conversations."""
