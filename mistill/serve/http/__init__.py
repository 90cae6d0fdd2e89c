"""Requests and answers on the wire: connections, guards, keys, files, the start and the end."""
