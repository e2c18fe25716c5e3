"""Credentials in text, masked: of URLs, tokens, and options given by name.

What is written to a file or shown on a screen passes through `redacted` first. It masks by form, so it needs no list of
the secrets at hand: text of other libraries, which quote a URL in their errors, is covered as well. Imports nothing
heavy: what is wrong with a command line is told at once.
"""

import re


MASK = "***"
# Parameters of URLs that say what is fetched. All others may let somebody in: signatures, keys, tokens, tickets.
_PUBLIC = "alt|dl|download|export|format|id|name|page|part|path|prefix|raw|ref|revision|version|versionId"
# Of options as s3fs, gcsfs, adlfs and environment variables call them.
_SECRETS = (
    r"(?:[\w-]*(?:secret|password|passwd|credential|api[_-]?key|access[_-]?key(?:[_-]?id)?|account[_-]?key)s?"
    # Not every token is one: there are those of texts, max_tokens and eos_token.
    r"|(?:[\w-]*(?:access|api|auth|bearer|hf|hub|id|refresh|sas|security|session)[_-])?token)"
)
_PATTERNS = (
    # scheme://user:password@host and https://token@host; passwords may hold an "@"
    (
        re.compile(r"(?<=://)[^/?#\s'\"]*:[^/?#\s'\"]*@|(?<=https://)[^/?#\s'\"]+@|(?<=http://)[^/?#\s'\"]+@"),
        f"{MASK}@",
    ),
    # tokens of the Hugging Face Hub, and those in headers
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), MASK),
    (re.compile(r"\b(Bearer)\s+[^\s'\"]+|(Authorization['\"]?\s*[:=]\s*['\"]?\w+)\s+[^\s'\"]+"), rf"\1\2 {MASK}"),
    # {key: value, secret_key: value}, {"secret_key": "value"} and AWS_SECRET_ACCESS_KEY=value
    (
        re.compile(
            rf"((?:[{{,]\s*|(?=['\"]))['\"]?(?:key|{_SECRETS})['\"]?\s*:\s*['\"]?)(?!\*|None\b|null\b)[^\s'\",}}]+",
            re.I,
        ),
        rf"\1{MASK}",
    ),
    (re.compile(rf"(?<![\w./-])({_SECRETS}=['\"]?)(?!\*)[^\s'\",}}&]+", re.I), rf"\1{MASK}"),
)
_URL = re.compile(r"\w:/[^\s'\"<>]+")  # with one slash where somebody has taken it for a path
# ?parameter=value of a URL; "::" begins another URL
_PARAMETER = re.compile(rf"([?&;#])(?!(?:{_PUBLIC})=)([\w.~%-]+)=(?:(?!::)[^&;#)}}\]])+", re.I)


def redacted(text: str) -> str:
    """Masks each credential in `text`; text without any stays as it is."""
    text = _URL.sub(lambda url: _PARAMETER.sub(rf"\1\2={MASK}", url[0]), text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
