"""Sampled teacher distributions on disk: drawn, coded, stored in shards and read again."""
