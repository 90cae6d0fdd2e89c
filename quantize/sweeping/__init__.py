"""Many ways of quantizing, each measured, in one table."""
