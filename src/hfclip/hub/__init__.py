"""Model folders on the Hugging Face Hub: checked, described by a card, published in one commit."""

from .card import model_card
from .check import check_folder
from .upload import HubError, check_target, end_on_interrupt, push


__all__ = ["HubError", "check_folder", "check_target", "end_on_interrupt", "model_card", "push"]
