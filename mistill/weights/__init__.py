"""Codes, grids and floats in files: read, checked and written."""
