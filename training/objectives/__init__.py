"""What a run minimises. An objective embeds and computes its loss; TrainingStep does the rest.

    contrastive.py     images and texts that find each other, by any loss of `hfclip.losses`
    teacher.py         the same beside a teacher that embeds live, or has stored its embeddings (stored.py)

Another objective is one file and a line in `build_objective`. Images that predict the words of their captions:

    class BagOfWords(Objective):
        couples_pairs = False  # the loss is a mean over pairs: no process needs another's embeddings

        def embed(self, model, part):
            words = F.one_hot(part["input_ids"], model.config.vocab_size).amax(dim=1)
            return model(part["pixel_values"]), words  # logits and targets, (size, vocab_size) each

        def loss(self, embeds, scalars, inputs):
            logits, words = embeds
            return F.binary_cross_entropy_with_logits(logits.float(), words.float())
"""

import torch
from transformers import PreTrainedTokenizerBase

from hfclip.data.samples import Source

from ..config import Config
from .base import Objective
from .contrastive import Contrastive
from .stored import StoredEmbeddings
from .teacher import Distillation, Teacher


def build_objective(
    config: Config, tokenizer: PreTrainedTokenizerBase, source: Source, device: torch.device
) -> Objective:
    """The objective that the settings name.

    Args:
        tokenizer: the student's.
        source: the data that the student learns from.

    Raises:
        UsageError: if the teacher cannot teach this student, or the stored embeddings are of other data.
    """
    settings = config.distill
    if settings.teacher is not None:
        return Distillation(config, Teacher(settings.teacher, tokenizer, device, config.run.precision))
    if settings.embeddings is not None:
        return Distillation(config, StoredEmbeddings.open(settings.embeddings, source))
    return Contrastive(config)
