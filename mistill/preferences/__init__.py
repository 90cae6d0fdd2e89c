"""Preference data: which of two answers is better, which answer is good, how several rank."""
