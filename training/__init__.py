"""Contrastive pretraining with Accelerate: a program on top of `hfclip`. Start reading at `pretrain.py`."""
