"""A folder's weights as the graph stores them: architecture, shapes, blocks."""
