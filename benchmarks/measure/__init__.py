"""Models measured in child processes, turn by turn."""
