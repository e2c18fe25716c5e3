"""Programs of the command `hfclip` that need the library alone."""
