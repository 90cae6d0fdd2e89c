"""What lies on disk: the forms of folders, how they appear whole, and how they came to be."""
