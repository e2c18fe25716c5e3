"""Programs that turn other projects' CLIP checkpoints into hfclip folders and back."""
