"""Names the markers of transformers' tests, which pytest would refuse as unknown."""

MARKERS = (
    *("flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test", "accelerate_tests"),
    *("is_pipeline_test", "order", "slow"),
)


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by transformers")
