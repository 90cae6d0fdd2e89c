"""TRL's trainers, kept quiet: arguments, checkpoints, progress, and the folder they end in."""
