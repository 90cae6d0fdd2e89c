"""Output matrices of a cut student, refitted by least squares to what its teacher computes."""
