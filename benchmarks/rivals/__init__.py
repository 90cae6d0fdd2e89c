"""Other engines that run the same weights, as adapters of ``LanguageModel``.

None is required and none is imported here: each is installed in a Python environment of its own and
run there by a child process, with files made from the weights of the folder that it is compared
with.
"""
