"""Evaluation of a model, one module a task: embeddings and labels go in, a dictionary of figures comes out."""
