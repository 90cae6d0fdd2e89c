"""What a teacher predicts, from the model itself."""
