"""Hadamard rotations of the hidden states."""
