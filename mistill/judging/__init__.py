"""Judges of answers: a reward model, a check that a machine can make, or a function."""
