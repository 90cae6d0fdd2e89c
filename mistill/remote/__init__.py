"""Models behind servers that the user names."""
