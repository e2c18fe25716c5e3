"""Contrastive pretraining with Accelerate: a program on top of the `hfclip` library. Start reading at `pretrain.py`."""
