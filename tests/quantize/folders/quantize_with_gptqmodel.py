"""Run in the environment of interop_environment.py: ``to_gptq`` handed over to gptqmodel.

Arguments: a model folder, a text, the folder for the results, and a JSON object of options by name.
"""

import json
import sys

if __name__ == "__main__":  # gptqmodel starts processes of its own
    from quantize import to_gptq

    source, texts, out = sys.argv[1:4]
    for name, options in json.loads(sys.argv[4]).items():
        to_gptq(
            source,
            f"{out}/{name}",
            texts=texts,
            backend="gptqmodel",
            samples=8,
            block_length=64,
            **options,
        )
