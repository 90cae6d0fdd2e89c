"""What was measured, as data: one class a figure, and the comparison of them all."""
