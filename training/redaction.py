from hfclip_errors import MASK
from hfclip_errors import redact as redacted


__all__ = ["MASK", "redacted"]
