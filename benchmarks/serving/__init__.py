"""How a server of language models does under load, whoever wrote it."""
