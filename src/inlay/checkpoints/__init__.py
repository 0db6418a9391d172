"""Reading what is on disk: the layout of each format, and tensors by span."""
