"""A CLIP model as mteb takes it: any task of images and texts (MIEB), and its leaderboard's protocol.

    import mteb
    from hfclip.evaluation.mteb import MtebModel

    mteb.evaluate(MtebModel("clip-b32"), mteb.get_tasks(tasks=["CIFAR10ZeroShot"]))

Texts are embedded by their own tokens, and a text that repeats once; where a task gives both, their embeddings are added.
"""

from typing import Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from ..data.image_list import ImageList
from ..data.samples import not_blank
from ..embeddings import embed, embed_texts
from .records import slug
from .running import OpenModel, describe_model, open_model


class MtebModel(AbsEncoder):
    """An hfclip model with the methods that mteb calls.

    Args:
        model: a folder or name on the Hub, or an `OpenModel`.
        revision: under which mteb keeps its results. None: the model's fingerprint.
        options: `batch_size`, `num_workers` and `precision` of `hfclip.embeddings.embed`; "fp32" if none is given.
    """

    def __init__(self, model: str | OpenModel, revision: str | None = None, device: str | None = None, **options):
        self.opened = open_model(model) if isinstance(model, str) else model
        if device is not None:
            self.opened.model.to(device)
        self.options = {"precision": "fp32", **options}
        about, config = describe_model(self.opened), self.opened.model.config
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": self.opened.name if self.opened.name.count("/") == 1 else f"hfclip/{slug(self.opened.name)}",
                "revision": revision or about.get("revision") or about["fingerprint"][:16],
                "n_parameters": about["parameters"],
                "max_tokens": config.text_config.max_position_embeddings,
                "embed_dim": config.projection_dim,
                "framework": ["PyTorch"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": False,
                "modalities": ["image", "text"],
            }
        )

    def encode(self, inputs: Any, *, prompt_type: Any = None, **kwargs) -> np.ndarray:
        """Embeddings (num_rows, dim) of the columns `text` and `image` of a DataLoader's batches."""
        parts = []
        for batch in inputs:
            sides = [self._texts(batch["text"])] if "text" in batch else []
            sides += [self._images(batch["image"])] if "image" in batch else []
            if not sides:
                raise ValueError(f"found the columns {sorted(batch)}, expected text or image among them.")
            parts.append(np.sum(sides, axis=0))
        return np.concatenate(parts)

    def _texts(self, texts: list[str]) -> np.ndarray:
        """Blank texts, which mean nothing, are zeros."""
        rows = np.zeros((len(texts), self.opened.model.config.projection_dim), np.float32)
        if words := [place for place, text in enumerate(texts) if not_blank([text])]:
            rows[words] = embed_texts(*self.opened[:2], [texts[place] for place in words], **self.options).numpy()
        return rows

    def _images(self, images: list) -> np.ndarray:
        """Images that cannot be read are zeros."""
        found = embed(*self.opened[:2], ImageList(list(images)), what=("images",), alone=True, **self.options)
        return np.asarray(found.image_embeds)
