"""GPTQ: second moments of the inputs, and codes that make up for each error."""
