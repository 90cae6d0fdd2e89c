"""Models measured in child processes that take turns."""
