"""Engines of others that run the same weights, as adapters of ``LanguageModel``.

None is needed, and none is imported here: each lives in a Python environment of its own, is run
there by a child process, and is given files that were made from the weights of the folder that it
is compared with.
"""
