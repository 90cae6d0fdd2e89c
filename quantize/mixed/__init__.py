"""Bits and groups for every matrix within a size."""
