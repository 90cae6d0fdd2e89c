"""The distillation loop: steps, held-out text, text of the student, and the trained folder."""
