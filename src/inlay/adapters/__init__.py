"""Reading adapters: configs of every age, tensor names, and nothing that is not understood."""
