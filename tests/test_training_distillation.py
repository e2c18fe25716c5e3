"""The distillation loss against its definition, teachers, and stored embeddings."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from training_utils import caption, image_bytes, model_with_tokenizer, pairs, write_tar
from transformers import PreTrainedTokenizerFast

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.errors import UsageError
from hfclip.losses import distillation_loss
from training import embed as embedding
from training.config import DataConfig
from training.data.batches import open_data as open_source
from training.objectives.stored import StoredEmbeddings
from training.objectives.teacher import Teacher


CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def unit_vectors(num, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num, dim, generator=generator, dtype=torch.float64), dim=1)


def embeddings(num=7, dim=5, teacher_dim=3):
    sizes = (dim, dim, teacher_dim, teacher_dim)
    return [unit_vectors(num, size, seed) for seed, size in enumerate(sizes)]


def definition(images, texts, scale, teacher_images, teacher_texts, teacher_scale):
    """Equations 2 and 3 of arXiv:2311.17049 with one teacher, written out."""
    student, teacher = scale * images @ texts.T, teacher_scale * teacher_images @ teacher_texts.T
    total = 0
    for ours, theirs in ((student, teacher), (student.T, teacher.T)):
        p, q = theirs.softmax(dim=1), ours.softmax(dim=1)
        total = total + (p * (p / q).log()).sum() / len(p) / 2
    return total


@pytest.mark.parametrize("tile", [1024, 3, 1], ids=["whole", "three", "single"])
def test_loss_and_gradients_are_those_of_the_definition(tile, monkeypatch):
    monkeypatch.setattr("hfclip.losses.tiles.CPU_TILE", tile)
    images, texts, teacher_images, teacher_texts = embeddings()
    found, expected = [], []
    for loss, results in ((distillation_loss, found), (definition, expected)):
        student = [tensor.clone().requires_grad_() for tensor in (images, texts, torch.tensor(12.0).double())]
        value = loss(*student, teacher_images, teacher_texts, 30.0)
        (3 * value).backward()
        results += [value.detach(), *(tensor.grad for tensor in student)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # order of some hundred additions


def test_gradients_pass_the_numerical_check():
    images, texts, teacher_images, teacher_texts = embeddings()
    student = [tensor.requires_grad_() for tensor in (images, texts, torch.tensor(3.0).double())]
    torch.autograd.gradcheck(lambda *s: distillation_loss(*s, teacher_images, teacher_texts, 5.0), student)


def test_student_that_is_the_teacher_has_no_loss_and_no_gradient():
    images, texts, *_ = embeddings(num=50)
    student = [tensor.clone().requires_grad_() for tensor in (images, texts, torch.tensor(20.0).double())]
    loss = distillation_loss(*student, images, texts, 20.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert all(tensor.grad.abs().max() < 1e-13 for tensor in student)
    other = distillation_loss(images, texts, 21.0, images, texts, 20.0)
    assert other > 1e-5


def test_teacher_gets_no_gradient():
    images, texts, teacher_images, teacher_texts = (tensor.requires_grad_() for tensor in embeddings())
    distillation_loss(images, texts, 3.0, teacher_images, teacher_texts, 5.0).backward()
    assert images.grad.abs().max() > 0
    assert teacher_images.grad is None and teacher_texts.grad is None


def test_half_precision_embeddings_are_compared_in_float32_under_autocast():
    student = [tensor.bfloat16().requires_grad_() for tensor in embeddings()[:2]]
    teacher = [tensor.float() for tensor in embeddings()[2:]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distillation_loss(*student, 3.0, *teacher, 5.0)
    loss.backward()
    expected = definition(*(tensor.detach().double() for tensor in student), 3.0, *(t.double() for t in teacher), 5.0)
    assert loss.dtype == torch.float32 and student[0].grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_extreme_similarities_stay_finite():
    images, texts, teacher_images, teacher_texts = (tensor.float().requires_grad_() for tensor in embeddings())
    loss = distillation_loss(images, texts, 100.0, -teacher_images, teacher_texts, 1000.0)
    loss.backward()
    assert loss.isfinite() and images.grad.isfinite().all() and texts.grad.isfinite().all()


def test_rejects_embeddings_that_do_not_fit():
    images, texts, teacher_images, teacher_texts = embeddings()
    with pytest.raises(ValueError, match=r"student_image \(7, 5\) .*student_text \(6, 5\)"):
        distillation_loss(images, texts[:6], 1.0, teacher_images, teacher_texts, 1.0)
    with pytest.raises(ValueError, match="student has 7 pairs and the teacher 6"):
        distillation_loss(images, texts, 1.0, teacher_images[:6], teacher_texts[:6], 1.0)
    with pytest.raises(ValueError, match="global batch is empty"):
        distillation_loss(images[:0], texts[:0], 1.0, teacher_images[:0], teacher_texts[:0], 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Teachers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A random model of 32 pixels with colours of its own, saved as a checkpoint."""
    folder = tmp_path_factory.mktemp("teacher")
    config = HFCLIPConfig(**model_with_tokenizer(folder)["config"])
    torch.manual_seed(0)
    tokenizer = HFCLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=16)
    images = HFCLIPImageProcessor(size=32, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    HFCLIPModel(config).save_pretrained(folder)
    HFCLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(teacher_folder):
    return HFCLIPProcessor.from_pretrained(teacher_folder)


def reference_embeddings(folder, processor, images, texts):
    model = HFCLIPModel.from_pretrained(folder).eval()
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.image_embeds, outputs.text_embeds


def tokens_of(processor, texts):
    tokens = processor(text=texts, padding=True, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def test_teacher_embeds_the_students_batch_as_the_model_alone_would(teacher_folder, processor):
    teacher = Teacher(str(teacher_folder), processor.tokenizer, CPU, "fp32")
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = [caption(seed) for seed in range(3)]
    images, texts_found = teacher.embed({"pixel_values": pixels, **tokens_of(processor, texts)})
    expected = reference_embeddings(teacher_folder, processor, list(pixels), texts)
    torch.testing.assert_close(images, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(texts_found, expected[1], rtol=0, atol=1e-5)
    assert not images.requires_grad and images.dtype == torch.float32
    assert teacher.scale == pytest.approx(1 / 0.07, rel=1e-4)  # 2.6592 is its logarithm
    assert not any(p.requires_grad for p in teacher.model.parameters()) and not teacher.model.training


def test_teacher_of_another_size_sees_resized_images(teacher_folder, processor):
    teacher = Teacher(str(teacher_folder), processor.tokenizer, CPU, "fp32")
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(image_bytes(0, (48, 48)))))).permute(2, 0, 1)[None]
    images, texts = teacher.embed({"pixel_values": pixels, **tokens_of(processor, ["a dog"])})
    resized = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BICUBIC)
    expected = reference_embeddings(teacher_folder, processor, [resized], ["a dog"])
    # PIL rounds its bicubic result to 256 levels.
    torch.testing.assert_close(images, expected[0], rtol=0, atol=0.01)
    corner = reference_embeddings(
        teacher_folder, processor, [Image.fromarray(pixels[0, :, :32, :32].permute(1, 2, 0).numpy())], ["a dog"]
    )
    assert (corner[0] - expected[0]).abs().max() > 0.05


def test_rejects_teacher_with_another_tokenizer(teacher_folder, processor):
    def student(iterator, **options):
        return HFCLIPTokenizer.train_new_from_iterator(iterator, 600, show_progress=False, **options)

    other = student(f"{word} of the {word}s" for word in ("sun", "moon", "world"))
    with pytest.raises(UsageError, match="reads other token ids than the student.*distill.embeddings"):
        Teacher(str(teacher_folder), other, CPU, "fp32")
    same = HFCLIPTokenizer.from_pretrained(teacher_folder, model_max_length=16)
    Teacher(str(teacher_folder), same, CPU, "fp32")


def without_lower_case(state):
    state["normalizer"] = None
    return state


def with_merges_reversed(state):
    state["model"]["merges"].reverse()
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [(without_lower_case, "'  A PHOTO.* becomes"), (with_merges_reversed, "other merges of the same vocabulary")],
)
def test_rejects_tokenizer_with_other_cleaning_or_merges(teacher_folder, processor, tmp_path, change, message):
    processor.tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    student = PreTrainedTokenizerFast(tokenizer_file=str(path), model_max_length=16)
    with pytest.raises(UsageError, match=message):
        Teacher(str(teacher_folder), student, CPU, "fp32")


def test_rejects_teacher_with_a_shorter_context(teacher_folder):
    tokenizer = HFCLIPTokenizer.from_pretrained(teacher_folder, model_max_length=17)
    with pytest.raises(UsageError, match="at most 16 tokens.*up to 17"):
        Teacher(str(teacher_folder), tokenizer, CPU, "fp32")


def test_rejects_teacher_that_is_not_there(tmp_path, processor):
    with pytest.raises(UsageError, match="Teacher"):
        Teacher(str(tmp_path / "none"), processor.tokenizer, CPU, "fp32")


# ---------------------------------------------------------------------------------------------------------------------
# Stored embeddings
# ---------------------------------------------------------------------------------------------------------------------


def command_line(folder, shards, out, *options):
    options = ["--precision", "fp32", "--num-workers", "0", *options]
    return ["--model", str(folder), "--data", str(shards), "--out", str(out), *options]


def embed(*arguments):
    return embedding.store(embedding.parse_arguments(command_line(*arguments)))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twelve pairs; the picture of sample 3 is damaged, and sample 5 has three captions, one of them empty."""
    folder = tmp_path_factory.mktemp("shards")
    members = dict(pairs(range(12)))
    members["000003.jpg"] = members["000003.jpg"][:100]
    del members["000005.txt"]
    members["000005.json"] = json.dumps({"captions": ["one", "  ", " two "]}).encode()
    write_tar(folder / "0.tar", sorted(members.items()))
    return folder


@pytest.fixture(scope="module")
def stored_folder(teacher_folder, shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("stored") / "embeddings"
    return embed(teacher_folder, shards, out, "--batch-size", "5")


def source_of(shards, tmp_path):
    config = DataConfig(train=str(shards))
    return open_source(config.train, config, "train", 32)


def test_stored_embeddings_are_the_teachers(teacher_folder, processor, shards, stored_folder, tmp_path):
    source = source_of(shards, tmp_path)
    stored = StoredEmbeddings.open(stored_folder, source)
    stored = pickle.loads(pickle.dumps(stored))  # as it comes to the workers
    samples, texts = [0, 11, 5, 5], [caption(0), caption(11), "two", "one"]
    images, text_embeds = stored.targets(samples, texts).values()
    originals = [Image.open(io.BytesIO(image_bytes(seed))) for seed in samples]
    expected = reference_embeddings(teacher_folder, processor, originals, texts)
    # float16 keeps eleven bits.
    torch.testing.assert_close(images, expected[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(text_embeds, expected[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(4))
    assert stored.scale == pytest.approx(1 / 0.07, rel=1e-4)  # 2.6592 is its logarithm
    assert isinstance(stored.stored.image_embeds, np.memmap)


def test_mixture_is_stored_as_training_numbers_it(teacher_folder, processor, tmp_path):
    names = [tmp_path / "first", tmp_path / "second"]
    for name, seeds in zip(names, (range(5), range(20, 28)), strict=True):
        name.mkdir()
        write_tar(name / "0.tar", pairs(seeds))
    mixture = {str(names[0]): 3.0, str(names[1]): 1.0}
    out = embed(teacher_folder, json.dumps(mixture), tmp_path / "out", "--max-samples", "4")
    config = DataConfig(train=mixture, max_samples=4)
    source = open_source(mixture, config, "train", 32)
    stored = StoredEmbeddings.open(out, source)
    assert len(source) == 8  # four of each
    texts = stored.targets([3, 4], [caption(3), caption(20)])["teacher_text_embeds"]
    originals = [Image.open(io.BytesIO(image_bytes(seed))) for seed in (3, 20)]
    expected = reference_embeddings(teacher_folder, processor, originals, [caption(3), caption(20)])
    torch.testing.assert_close(texts, expected[1], rtol=0, atol=1e-3)  # float16 keeps eleven bits


def test_rejects_samples_that_could_not_be_read(shards, stored_folder):
    with pytest.raises(UsageError, match=r"sample 3 \(0.tar/000003.jpg\) could not be read"):
        StoredEmbeddings(stored_folder).targets([0, 3], [caption(0), caption(3)])


def test_rejects_captions_that_were_not_embedded(stored_folder):
    with pytest.raises(UsageError, match=r"sample 2 \(0.tar/000002.jpg\) had no caption 'a new caption'"):
        StoredEmbeddings(stored_folder).targets([2], ["a new caption"])


def test_rejects_embeddings_of_other_data(stored_folder, tmp_path):
    (tmp_path / "other").mkdir()
    write_tar(tmp_path / "other" / "0.tar", pairs(range(100, 112)))
    with pytest.raises(UsageError, match="made for other data: sample 0 .* had no caption"):
        StoredEmbeddings.open(stored_folder, source_of(tmp_path / "other", tmp_path))
    (tmp_path / "longer").mkdir()
    write_tar(tmp_path / "longer" / "0.tar", pairs(range(13)))
    with pytest.raises(UsageError, match="holds 12 samples, expected the 13"):
        StoredEmbeddings.open(stored_folder, source_of(tmp_path / "longer", tmp_path))
    with pytest.raises(UsageError, match="holds no stored embeddings.*hfclip embed"):
        StoredEmbeddings.open(tmp_path, source_of(tmp_path / "longer", tmp_path))


def test_rejects_embedding_into_a_folder_that_holds_something_else(teacher_folder, shards, stored_folder):
    with pytest.raises(UsageError, match="exists and holds something else: other data"):
        embed(teacher_folder, shards, stored_folder, "--max-samples", "4")


def test_opens_what_earlier_versions_have_stored(teacher_folder, shards, stored_folder, tmp_path):
    """Four arrays and a header without fingerprint."""
    for name in ("image_embeds", "text_embeds", "offsets", "caption_ids"):
        (tmp_path / f"{name}.npy").write_bytes((stored_folder / f"{name}.npy").read_bytes())
    header = {"model": "teacher", "scale": 14.2, "dim": 16, "num_samples": 12, "num_captions": 13, "done": 12}
    (tmp_path / "embeddings.json").write_text(json.dumps(header))
    stored, now = StoredEmbeddings.open(tmp_path, source_of(shards, tmp_path)), StoredEmbeddings(stored_folder)
    targets = ([0, 5], [caption(0), "two"])
    assert stored.scale == 14.2
    assert all(torch.equal(a, b) for a, b in zip(stored.targets(*targets).values(), now.targets(*targets).values()))
    with pytest.raises(UsageError, match="exists and holds something else"):
        embed(teacher_folder, shards, tmp_path)


def test_rejects_data_without_captions(teacher_folder, tmp_path):
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "0.tar", [("0.jpg", image_bytes(0)), ("0.txt", b"  ")])
    with pytest.raises(UsageError, match="no usable pair.* Left out: 1 with empty caption"):
        embed(teacher_folder, tmp_path / "data", tmp_path / "out")
