"""The picture of size, speed and quality."""
