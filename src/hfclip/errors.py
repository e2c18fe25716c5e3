"""The one error that programs show as a line, and what shows it; `hfclip_errors` is the same without torch's import."""

from hfclip_errors import MASK, UsageError, as_usage_error, in_words, redact, run


__all__ = ["MASK", "UsageError", "as_usage_error", "in_words", "redact", "run"]
