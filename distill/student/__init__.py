"""A student cut out of its teacher: what to keep, how it is measured, and the new folder."""
