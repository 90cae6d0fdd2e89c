"""Two reports compared with each other."""
