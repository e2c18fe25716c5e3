"""Credentials are masked in any text, and nothing else is."""

import pytest

from hfclip.errors import redact


@pytest.mark.parametrize(
    "text",
    [
        "http://user:PW@host/a/{0..3}.tar",
        "'https://user:P@PW@host:8080/x' cannot be fetched",
        "https://PW@host/x.git",
        "s3://PW:PW@bucket/x.tar",
        "https://b.s3.amazonaws.com/x.tar?X-Amz-Algorithm=AWS4&X-Amz-Credential=PW&X-Amz-Signature=PW",
        "https://b.s3.amazonaws.com/x.tar?AWSAccessKeyId=PW&Signature=PW%3D&Expires=1",
        "https://storage.googleapis.com/b/x.tar?GoogleAccessId=a&X-Goog-Signature=PW",
        "https://account.blob.core.windows.net/c/x.tar?sv=2020&sig=PW%2Fd%3D&download=true",
        "https://d1.cloudfront.net/x.tar?Policy=PW&Key-Pair-Id=PW",
        "https://host/x.tar?token=PW::https://user:PW@host/y.tar",
        "simplecache::https://user:PW@host/y.tar",
        "{'key': 'PW', 'secret': 'PW'}",
        '{"account_key": "PW==", "sas_token": "PW"}',
        "{https://host/x.tar: {key: PW, client_secret: PW}}",
        "AWS_SECRET_ACCESS_KEY=PW AWS_SESSION_TOKEN='PW'",
        "401 for hf_PWabcdefghijklmnopqrstuvwx",
        "Authorization: Bearer PW",
        "headers {'Authorization': 'Basic PW'}",
    ],
)
def test_masks_credentials(text):
    assert "PW" not in redact(text) and "***" in redact(text)
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://zenodo.org/records/1/files/x.tar?download=1",
        "https://host/x-??.tar",
        "hf://datasets/owner/name@main/x.tar",
        "abfs://container@account.dfs.core.windows.net/x.tar",
        "shards/{000..099}.tar",
        "runs/hf_models_2024",
        "runs/max_tokens=77",
        "runs/token=3",
        "runs/emb #2;lr=3",
        "shards/ab;v=2/{0..3}.tar",
        "TypeError: f(pad_token=0, eos_token=3, tokens=77)",
        "me@example.org",
        "run.push_to_hub: found no token. Log in with `hf auth login`, or set HF_TOKEN.",
        "data.caption_key: 0.tar has the keys ['a', 'b'], expected 'c' among them.",
        "{'eos_token_id': 3, 'hidden_size': 8}",
        "the most tokens: 77, the key: none",
    ],
)
def test_leaves_all_else_as_it_is(text):
    assert redact(text) == text
