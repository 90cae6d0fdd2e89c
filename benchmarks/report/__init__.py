"""A comparison as a table, Markdown or a page."""
