"""A reward model, which scores answers as their judges did."""
