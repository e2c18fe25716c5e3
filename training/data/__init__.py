"""Order and batches of training data; `hfclip.data` reads it."""
