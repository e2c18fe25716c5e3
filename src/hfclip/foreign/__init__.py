"""Checkpoints of OpenAI and OpenCLIP, read as data: their files, names, architectures, towers and tokenizers."""
