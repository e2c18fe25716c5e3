"""Tasks of mteb itself on an hfclip folder."""

import numpy as np
import pytest
import torch
from PIL import Image


mteb = pytest.importorskip("mteb", reason="mteb is not installed")

from mteb.mocks.mock_tasks.classification import MockImageClassificationTask  # noqa: E402
from mteb.mocks.mock_tasks.zeroshot_classification import MockZeroShotClassificationTask  # noqa: E402
from test_evaluate import save_model  # noqa: E402

from hfclip.embeddings import embed_images, embed_texts  # noqa: E402
from hfclip.evaluation.mteb import MtebModel  # noqa: E402


pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MtebModel:
    return MtebModel(str(save_model(tmp_path_factory.mktemp("mteb") / "small")))


@pytest.mark.parametrize("task", [MockImageClassificationTask, MockZeroShotClassificationTask])
def test_tasks_run(task, model):
    found = mteb.evaluate(model, task(), cache=None, co2_tracker=False)
    assert 0 <= found.task_results[0].get_score() <= 1
    assert found.model_name.startswith("hfclip/") and found.model_revision


def test_rows_are_the_models_own(model):
    images = [Image.new("RGB", (9, 8), colour) for colour in ("red", "blue")]
    texts, pair = ["a cat", ""], model.opened[:2]
    text = torch.cat([embed_texts(*pair, "a cat", precision="fp32"), torch.zeros(1, 16)]).numpy()
    assert np.array_equal(model.encode([{"text": texts}]), text)
    image = embed_images(*pair, images, precision="fp32").numpy()
    assert np.array_equal(model.encode([{"image": images, "text": texts}]), text + image)
    with pytest.raises(ValueError, match=r"found the columns \['audio'\]"):
        model.encode([{"audio": []}])
