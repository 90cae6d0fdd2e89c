"""Divergences between student and teacher, and the losses made of them."""
