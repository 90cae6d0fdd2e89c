"""What all training shares: processes, checkpoints, schedule, optimizer, adapters, metrics."""
