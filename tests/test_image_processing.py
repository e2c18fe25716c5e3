"""The image processor against openai/CLIP's transform, written here once more in plain PIL and torch."""

import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import resource
import socketserver
import threading
import time

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from hfclip import HFCLIPImageProcessor
from hfclip.image_processing_hfclip import (
    center_square_crop,
    normalize,
    random_square_crop,
    to_pixel_values,
)
from hfclip.open_image_hfclip import open_image


MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def openai_crop(image: Image.Image, n: int) -> np.ndarray:
    """openai/CLIP `_transform(n)` up to the pixels: Resize(n, BICUBIC), CenterCrop(n), convert("RGB")."""
    w, h = image.size
    w, h = (n, int(n * h / w)) if w <= h else (int(n * w / h), n)
    if (w, h) != image.size:
        image = image.resize((w, h), Image.BICUBIC)
    left, top = int(round((w - n) / 2.0)), int(round((h - n) / 2.0))
    return np.array(image.crop((left, top, left + n, top + n)).convert("RGB"))


def openai_transform(image: Image.Image, n: int) -> torch.Tensor:
    """The whole of it: ToTensor and Normalize in torch's arithmetic."""
    # (n, n, 3) -> (3, n, n)
    pixels = torch.from_numpy(openai_crop(image, n)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).sub(MEAN).div(STD)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(20, 30)).save(file, "PNG")
    return file.getvalue()


def image_of_mode(mode: str, height: int, width: int) -> Image.Image:
    rgb = Image.fromarray(noise(height, width))
    if mode == "P":
        return rgb.quantize(16)
    if mode == "PA":
        return rgb.quantize(16).convert("PA")
    if mode in ("LA", "RGBA", "CMYK", "RGBX", "RGBa"):  # every byte free, alpha included
        return Image.frombytes(mode, (width, height), noise(height, width, len(Image.new(mode, (1, 1)).getbands())))
    if mode in ("YCbCr", "HSV", "LAB"):
        return Image.frombytes(mode, (width, height), noise(height, width))
    return rgb.convert(mode)


@pytest.fixture(scope="module")
def photos(data_dir):
    return sorted((data_dir / "imagenet_sample").glob("*.JPEG"))


@pytest.fixture(scope="module")
def processor():
    return HFCLIPImageProcessor()


# ------------------------------------------------------------------------------------------------ equality to OpenAI


def test_crops_equal_openai_on_all_golden_photos(data_dir, photos):
    golden = json.loads((data_dir / "golden" / "openai_crops_224.json").read_text())
    hashes = {path.name: hashlib.sha256(center_square_crop(path, 224).tobytes()).hexdigest() for path in photos}
    assert len(golden) == 120
    assert hashes == golden


def test_batch_of_photos_equals_openai_bit_for_bit(photos, processor):
    paths = photos[:16]  # of different sizes
    batch = processor(paths, return_tensors="pt")["pixel_values"]
    assert batch.shape == (16, 3, 224, 224) and batch.dtype == torch.float32
    assert torch.equal(batch, torch.stack([openai_transform(Image.open(path), 224) for path in paths]))


@pytest.mark.parametrize("n", [32, 224, 336])
@pytest.mark.parametrize(
    "height, width",
    [(1, 1), (1, 7), (9, 2), (31, 33), (32, 32), (224, 225), (225, 224), (223, 449), (300, 20), (333, 500)],
)
def test_sizes_and_rounding_equal_openai(height, width, n):
    image = Image.fromarray(noise(height, width))
    assert np.array_equal(center_square_crop(image, n), openai_crop(image, n))
    assert np.array_equal(to_pixel_values(image, n), openai_transform(image, n).numpy())


FILES = [
    *[(mode, "PNG") for mode in ("1", "L", "P", "LA", "RGB", "RGBA")],
    *[("L", "JPEG"), ("CMYK", "JPEG"), ("P", "GIF"), ("RGBA", "WEBP"), ("RGB", "BMP")],
    *[(mode, "TIFF") for mode in ("1", "CMYK", "LAB", "RGBX", "PA")],
]


@pytest.mark.parametrize("mode, file_format", FILES)
@pytest.mark.parametrize("height, width", [(40, 61), (90, 50), (1, 1)])
def test_files_of_every_mode_equal_openai(tmp_path, processor, mode, file_format, height, width):
    path = tmp_path / "image"
    image_of_mode(mode, height, width).save(path, file_format)
    with Image.open(path) as image:
        expected = openai_transform(image, 224)
    for source in (path, str(path), path.read_bytes(), base64.b64encode(path.read_bytes()).decode()):
        assert torch.equal(processor(source, return_tensors="pt")["pixel_values"][0], expected)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_images_of_every_mode_equal_openai_and_are_left_alone(mode):
    image = image_of_mode(mode, 37, 53)
    before = image.copy()
    assert np.array_equal(center_square_crop(image, 48), openai_crop(image, 48))
    assert image == before


def test_conversion_to_rgb_comes_after_resizing():
    """Guards the mode tests: for alpha the order matters, so they could not pass with it reversed."""
    image = image_of_mode("RGBA", 40, 61)
    assert not np.array_equal(center_square_crop(image, 32), openai_crop(image.convert("RGB"), 32))


@pytest.mark.peers
def test_equals_torchvision(processor):
    transforms = pytest.importorskip("torchvision.transforms", reason="compares with torchvision")
    steps = [
        transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        lambda image: image.convert("RGB"),
        transforms.ToTensor(),
        transforms.Normalize(MEAN.flatten().tolist(), STD.flatten().tolist()),
    ]
    for mode in ("L", "P", "LA", "RGB", "RGBA", "CMYK"):
        image = image_of_mode(mode, 131, 97)
        expected = transforms.Compose(steps)(image)
        assert torch.equal(processor(image, return_tensors="pt")["pixel_values"][0], expected)


# ----------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_turned_upright(orientation, file_format):
    upright = Image.fromarray(np.kron(noise(3, 5), np.ones((16, 16, 1), np.uint8)))
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    undo |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose[undo[orientation]])
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    stored.save(file, file_format, exif=exif, lossless=True, quality=100, subsampling=0)
    opened = Image.open(io.BytesIO(file.getvalue()))
    for source in (file.getvalue(), opened):
        found = np.asarray(open_image(source))
        assert found.shape == (48, 80, 3)
        # JPEG alone is lossy; a wrong turn is off by tens of levels
        assert np.abs(found.astype(int) - np.asarray(upright)).mean() < (3 if file_format == "JPEG" else 1e-9)
    assert opened.size == stored.size


def test_upright_image_is_not_turned_again():
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (4, 8)).save(file, "JPEG", exif=exif)
    assert open_image(open_image(file.getvalue())).size == (8, 4)


def test_malformed_exif_does_not_cost_the_image():
    unreadable, file = PngInfo(), io.BytesIO()
    unreadable.add_text("Raw profile type exif", "\nexif\n 4\nno hexadecimal digits")
    Image.new("RGB", (4, 8)).save(file, "PNG", pnginfo=unreadable)
    with pytest.raises(ValueError):
        Image.open(file).getexif()
    assert open_image(file.getvalue()).size == (4, 8)


def test_orientation_counts_beside_malformed_tags():
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010F] = 6, "maker"
    text, number = b"\x01\x0f\x00\x02\x00\x00\x00\x06", b"\x01\x0f\x00\x0b\x00\x00\x00\x01"
    damaged = exif.tobytes().replace(text, number)  # the maker is a floating point number
    Image.new("RGB", (4, 8)).save(file, "JPEG", exif=damaged)
    with pytest.raises(AttributeError):
        ImageOps.exif_transpose(Image.open(file))
    assert open_image(file.getvalue()).size == (8, 4)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_high_byte(file_format):
    values = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(40, 30)
    file = io.BytesIO()
    Image.fromarray(values).save(file, file_format)
    image = open_image(file.getvalue())
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), values >> 8)


def test_big_endian_16_bit_is_read_right():
    values = np.arange(0, 65536, 97, dtype=np.uint16)[:600].reshape(20, 30)
    image = Image.frombytes("I;16B", (30, 20), values.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(open_image(image)), values >> 8)


@pytest.mark.parametrize("maxval", [1000, 65535])
def test_16_bit_pgm_keeps_its_high_byte(maxval):
    values = np.linspace(0, maxval, 40 * 30).astype(">u2").reshape(40, 30)
    image = open_image(b"P5 30 40 %d\n" % maxval + values.tobytes())
    assert image.mode == "L"
    assert np.abs(np.asarray(image) - values.astype(float) * 65535 / maxval // 256).max() <= 1  # PIL's rounding


def test_16_bit_png_is_turned_upright():
    values, file, exif = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100, io.BytesIO(), Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(values).save(file, "PNG", exif=exif)
    assert np.array_equal(np.asarray(open_image(file.getvalue())), values[::-1, ::-1] >> 8)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_rejects_32_bit_images_of_unknown_range(processor, mode):
    with pytest.raises(ValueError, match=f"mode '{mode}'.*unknown range.*scale it to 0..255"):
        processor(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_file_is_named(tmp_path, processor, file_format):
    image = Image.fromarray(noise(64, 64))
    path = tmp_path / "damaged"
    image.save(path, file_format)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"image 1 \(.*damaged\): the image cannot be decoded"):
        processor([image, path])
    with pytest.raises(ValueError, match="image 0: the image cannot be decoded"):
        processor(path.read_bytes())


def test_formats_of_photographs_are_opened_and_no_others(tmp_path, processor):
    """By content, whatever the name says: an EPS file named jpg would start Ghostscript."""
    from hfclip.open_image_hfclip import FORMATS

    PIL.Image.init()
    image, opened = Image.fromarray(noise(40, 50)), set()
    for name in sorted(PIL.Image.SAVE.keys() & PIL.Image.OPEN.keys()):
        path = tmp_path / f"{name}.jpg"
        try:
            image.save(tmp_path / "any.name", name)
        except Exception:  # a format without RGB or without its library
            continue
        (tmp_path / "any.name").rename(path)  # not saved as jpg: PIL would take that for SPIDER's ending from then on
        if name in FORMATS:
            assert open_image(path).size == (50, 40)
            opened.add(name)
        else:
            for source in (path, path.read_bytes()):
                with pytest.raises(ValueError, match=r"cannot be decoded \(.*Expected one of JPEG, PNG, WEBP"):
                    processor(source)
    assert opened >= {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"}


def test_eps_named_jpg_is_refused_by_name_and_starts_nothing(tmp_path, processor, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")  # what PIL would run
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill\nshowpage\n%%EOF\n"
    (tmp_path / "photo.jpg").write_bytes(eps)
    for source in (eps, tmp_path / "photo.jpg", base64.b64encode(eps).decode()):
        with pytest.raises(ValueError, match="its format is EPS.*Expected one of JPEG"):
            processor(source)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    "data, found",
    [
        (b"", "it is empty"),
        (b"GIF89a\0", "its GIF header is damaged"),
        (b"<!DOCTYPE html>", "begins with b'<!DOCTYPE html>'"),
        (b"8BPS\0\1", "its format is PSD"),
    ],
)
def test_what_is_no_image_is_named(processor, data, found):
    with pytest.raises(ValueError, match=f"image 0: the image cannot be decoded .*{found}"):
        processor(data)


def test_missing_file_and_unreachable_url_are_named(processor):
    with pytest.raises(ValueError, match=r"image 0 \(nowhere.jpg\).*neither an existing file, nor a URL"):
        processor("nowhere.jpg")
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/a.jpg cannot be fetched"):
        processor("http://127.0.0.1:9/a.jpg")  # port 9 is closed


def test_directory_is_named(tmp_path, processor):
    for source in (tmp_path, str(tmp_path)):
        with pytest.raises(ValueError, match="image 0.* is a directory"):
            processor(source)


@contextlib.contextmanager
def serving(answer):
    """The URL of a local server of raw replies: `answer(socket, path)` writes whatever it likes."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            path = self.request.makefile("rb").readline().split()[1].decode()
            with contextlib.suppress(OSError):  # the client went away
                answer(self.request, path)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


OK = b"HTTP/1.0 200 OK\r\n"


@pytest.mark.parametrize("chunked", [False, True])
def test_url_is_fetched(processor, chunked):
    data = png()

    def answer(socket, path):
        if path == "/moved":
            socket.sendall(b"HTTP/1.1 302 Found\r\nLocation: /a.png\r\nContent-Length: 0\r\n\r\n")
        elif path != "/a.png":
            socket.sendall(b"HTTP/1.0 404 Not Found\r\n\r\n")
        elif chunked:
            parts = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (data[:100], data[100:], b""))
            socket.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + parts)
        else:
            socket.sendall(OK + b"Content-Length: %d\r\n\r\n" % len(data) + data)

    with serving(answer) as url:
        for path in ("a.png", "moved"):
            assert np.array_equal(np.asarray(open_image(f"{url}/{path}")), noise(20, 30))
            assert open_image(f"{url.upper()}/{path}").size == (30, 20)
        with pytest.raises(ValueError, match="image 0 .*b.png cannot be fetched .*404"):
            processor(f"{url}/b.png")


@pytest.mark.parametrize(
    "reply, reason",
    [
        (OK + b"Content-Length: 1000\r\n\r\n" + png()[:500], "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\nabc", "IncompleteRead"),
        (OK + b"Content-Length: 1000000000000000000\r\n\r\n" + png(), "IncompleteRead"),
        (b"", "closed connection"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "BadStatusLine"),
        (OK + b"a: b\r\n" * 200 + b"\r\n", "more than 100 headers"),
        (OK + b"a: " + b"b" * 10**5, "LineTooLong"),
        (OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(png(), mtime=0), r"compressed \(gzip\)"),
        (b"HTTP/1.0 302 Found\r\nLocation: file:///etc/hostname\r\n\r\n", "'file:///etc/hostname' is not allowed"),
        (b"HTTP/1.0 302 Found\r\nLocation: ftp://127.0.0.1/a.png\r\n\r\n", "unknown url type: ftp"),
        (b"HTTP/1.0 302 Found\r\nLocation: /loop\r\n\r\n", "infinite loop"),
        (OK + b"\r\n<html>", "begins with b'<html>'"),
    ],
)
def test_replies_that_are_no_image_are_refused_with_the_reason(processor, reply, reason):
    with serving(lambda socket, path: socket.sendall(reply)) as url:
        with pytest.raises(ValueError, match=f"image 0 .*{reason}"):
            processor(f"{url}/a.png")


@pytest.mark.parametrize("head", [OK + b"\r\n", OK + b"a: ", b"", b"HTTP/1.0 302 Found\r\nLocation: /b\r\n\r\n"])
def test_endless_replies_end_at_a_bound_of_time_and_of_size(processor, monkeypatch, head):
    monkeypatch.setattr("hfclip.download_hfclip.MAX_SECONDS", 0.5)
    monkeypatch.setattr("hfclip.download_hfclip.MAX_BYTES", 2**20)

    def drip(socket, path):
        socket.sendall(head)
        for _ in range(100):
            socket.sendall(b"x")
            time.sleep(0.05)

    def flood(socket, path):
        socket.sendall(head)
        while True:
            socket.sendall(b"x\r\n" * 2**12)

    with serving(drip) as url, pytest.raises(ValueError, match="takes more than 0.5 seconds|timed out"):
        processor(url)
    with (
        serving(flood) as url,
        pytest.raises(ValueError, match="more than 1,048,576 bytes|LineTooLong|BadStatusLine|100"),
    ):
        processor(url)


def test_silence_is_bounded(processor, monkeypatch):
    monkeypatch.setattr("hfclip.download_hfclip.MAX_SILENCE", 0.1)
    for head in (b"", OK + b"Content-Length: 9\r\n\r\nabc"):
        with serving(lambda socket, path: (socket.sendall(head), time.sleep(2))) as url:
            with pytest.raises(ValueError, match="timed out"):
                processor(url)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/a.png", "file:///etc/hostname", "gopher://a", "s3://bucket/a.png"])
def test_other_schemes_are_refused_by_name(processor, url):
    with pytest.raises(ValueError, match=f"has the scheme '{url.split(':')[0]}', expected http or https"):
        processor(url)


@pytest.mark.parametrize("url", ["http://", "http://a b/", "http://host:port/", "http://[::1/", "http://a..b/"])
def test_malformed_urls_are_refused(processor, url):
    with pytest.raises(ValueError, match="image 0 .*cannot be fetched"):
        processor(url)


def test_long_lists_of_paths_do_not_exhaust_open_files(tmp_path, processor):
    paths = []
    for i in range(100):
        paths.append(tmp_path / f"{i}.gif")
        frames = [Image.fromarray(noise(4, 4, seed=s)) for s in (i, i + 1)]
        frames[0].save(paths[-1], save_all=True, append_images=frames[1:])  # PIL keeps files of many frames open
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        batch = HFCLIPImageProcessor(size=4)(processor.fetch_images(paths), return_tensors="np")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert batch["pixel_values"].shape == (100, 3, 4, 4)


# ------------------------------------------------------------------------------------------------------------- limits


def test_rejects_extreme_aspect_ratio_before_allocating(processor):
    with pytest.raises(ValueError, match=r"224 x 4480000 = 1,003,520,000 pixels.*178,956,970.*MAX_IMAGE_PIXELS"):
        processor(Image.new("RGB", (1, 20000)))
    with pytest.raises(ValueError, match="4480000 x 224"):
        random_square_crop(Image.new("RGB", (20000, 1)), 224, np.random.default_rng(0))


def test_pils_limit_moves_the_limit(monkeypatch):
    image = Image.new("RGB", (1, 100))
    assert center_square_crop(image, 32).shape == (32, 32, 3)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 32 * 3200 // 2 - 1)
    with pytest.raises(ValueError, match="32 x 3200"):
        center_square_crop(image, 32)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    assert center_square_crop(image, 32).shape == (32, 32, 3)


def test_rejects_decompression_bomb(processor):
    file = io.BytesIO()
    Image.new("1", (20000, 20000)).save(file, "PNG")  # 400 million pixels in 60 kB
    with pytest.raises(ValueError, match="exceeds limit.*PIL.Image.MAX_IMAGE_PIXELS"):
        processor(file.getvalue())


# ------------------------------------------------------------------------------------------------- arrays and nesting


def test_arrays_and_tensors_equal_the_image(processor):
    pixels = noise(50, 70)
    expected = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    planes = pixels.transpose(2, 0, 1)
    sources = [pixels, planes, torch.from_numpy(pixels), torch.from_numpy(planes.copy())]
    sources += [pixels / 255, (pixels / 255).astype(np.float32), torch.from_numpy(planes / 255).requires_grad_()]
    for source in sources:
        for images in (source, [source], source[None]):
            assert torch.equal(processor(images, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (4, "RGBA")])
def test_grey_and_rgba_arrays_equal_the_image(channels, mode):
    pixels = noise(50, 70, channels)
    image = Image.frombytes(mode, (70, 50), pixels.tobytes())
    assert open_image(pixels) == image
    assert open_image(pixels.transpose(2, 0, 1), "channels_first") == image
    if channels == 1:
        assert open_image(pixels[..., 0]) == open_image(pixels.transpose(2, 0, 1)) == image


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_four_grey_images_are_never_read_as_one_rgba_image(processor, make):
    grey = make(noise(40, 50, 4).transpose(2, 0, 1).copy())  # (4, 40, 50)
    with pytest.raises(ValueError, match=r"\(4, 40, 50\) is one RGBA image or four grey ones.*channels_first.*list"):
        processor(grey)
    four = processor([Image.fromarray(np.asarray(plane)) for plane in grey], return_tensors="pt")["pixel_values"]
    for images in (list(grey), grey[:, None], grey[..., None]):
        assert torch.equal(processor(images, return_tensors="pt")["pixel_values"], four)
    one = processor(grey, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
    rgba = Image.fromarray(np.ascontiguousarray(np.asarray(grey).transpose(1, 2, 0)))
    assert rgba.mode == "RGBA" and torch.equal(one, processor(rgba, return_tensors="pt")["pixel_values"])
    # In a batch the second dimension is that of the channels, an entry of a list is one image: nothing is ambiguous.
    for images in (grey[None], [grey], [[grey]]):
        assert torch.equal(processor(images, return_tensors="pt")["pixel_values"], one)


@pytest.mark.parametrize("num_images", [2, 5, 32])
def test_other_numbers_of_grey_images_are_refused(processor, num_images):
    grey = noise(40, 50, num_images).transpose(2, 0, 1)
    with pytest.raises(ValueError, match=rf"\({num_images}, 40, 50\).*Grey images.*list\(images\)"):
        processor(grey)
    assert processor(list(grey), return_tensors="np")["pixel_values"].shape == (num_images, 3, 224, 224)


def test_floats_are_rounded_to_the_nearest_level():
    values = np.array([[0, 0.4 / 255, 0.6 / 255, 1]], np.float32)
    assert np.asarray(open_image(values)).tolist() == [[0, 0, 1, 255]]


def test_half_precision_tensors_are_accepted():
    tensor = torch.full((3, 8, 8), 0.5, dtype=torch.bfloat16)
    assert np.asarray(open_image(tensor)).tolist() == np.full((8, 8, 3), 128).tolist()


@pytest.mark.parametrize(
    "array, message",
    [
        (np.full((4, 4, 3), 200.0), "0..1, found 200.0..200.0"),
        (np.full((4, 4, 3), -0.1), "0..1, found -0.1"),
        (np.full((4, 4, 3), np.nan), "0..1, found nan"),
        (np.zeros((4, 4, 3), np.int64), "uint8 or of floating point.*int64"),
        (np.zeros((4, 4, 3), bool), "uint8 or of floating point.*bool"),
        (np.full((4, 4, 3), 200, np.int16), "uint8 or of floating point.*int16"),
        (torch.full((3, 40, 50), 255.0), "0..1, found 255.0"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((5, 5, 2), np.uint8), r"RGBA\) channels, found shape \(5, 5, 2\)"),
        (np.zeros((3, 8, 3), np.uint8), "channels first or last.*input_data_format"),
        (np.zeros(12, np.uint8), "2 or 3 dimensions"),
    ],
)
def test_rejects_arrays_that_are_no_image(processor, array, message):
    with pytest.raises(ValueError, match=f"image 1: .*{message}"):
        processor([Image.new("RGB", (4, 4)), array])


def test_input_data_format_settles_ambiguous_shapes(processor):
    pixels = noise(3, 3)
    first = processor(pixels, input_data_format="channels_first", return_tensors="np")["pixel_values"]
    last = processor(pixels, input_data_format="channels_last", return_tensors="np")["pixel_values"]
    assert np.array_equal(last[0], to_pixel_values(Image.fromarray(pixels), 224))
    assert np.array_equal(first[0], to_pixel_values(Image.fromarray(pixels.transpose(1, 2, 0)), 224))


def test_one_pixel_arrays_are_read_as_rgb():
    pixel = np.array([[[1, 2, 3]]], np.uint8)
    for array in (pixel, pixel.transpose(2, 0, 1)):
        assert open_image(array).getpixel((0, 0)) == (1, 2, 3)


def test_nested_lists_are_flattened_in_order(processor):
    images = [Image.new("RGB", (9, 7), (i, i, i)) for i in range(4)]
    nested = [[images[0]], [images[1], images[2]], [], (images[3],)]
    flat = processor(images, return_tensors="np")["pixel_values"]
    assert np.array_equal(processor(nested, return_tensors="np")["pixel_values"], flat)
    assert len(np.unique(flat[:, 0, 0, 0])) == 4


@pytest.mark.parametrize("images", [[], [[]], None, [None], {"image": 1}, [[1, 2]]])
def test_rejects_what_is_no_image(processor, images):
    with pytest.raises((TypeError, ValueError), match="expected"):
        processor(images)


def test_rejects_empty_image(processor):
    with pytest.raises(ValueError, match="0 x 5"):
        processor(Image.new("RGB", (0, 5)))


# ------------------------------------------------------------------------------------------------------------ options


def test_return_types(processor):
    images = [Image.new("RGB", (30, 40)), Image.new("RGB", (50, 40))]
    assert isinstance(processor(images, return_tensors="pt")["pixel_values"], torch.Tensor)
    assert processor(images, return_tensors="np")["pixel_values"].shape == (2, 3, 224, 224)
    arrays = processor(images, do_center_crop=False)["pixel_values"]
    assert [array.shape for array in arrays] == [(3, 298, 224), (3, 224, 280)]
    with pytest.raises(ValueError, match=r"\[\(224, 280\), \(298, 224\)\] \(height, width\) do not fit one tensor"):
        processor(images, do_center_crop=False, return_tensors="pt")


def test_options_act_at_construction_and_per_call(processor):
    image = Image.fromarray(noise(60, 80))
    cases = [
        ({"do_resize": False, "do_center_crop": False}, np.asarray(image)),
        ({"size": {"height": 20, "width": 30}, "do_center_crop": False}, np.asarray(image.resize((30, 20), 3))),
        ({"size": (20, 30), "crop_size": (20, 30)}, np.asarray(image.resize((30, 20), 3))),
        ({"size": 30, "crop_size": 30, "resample": Image.BOX}, np.asarray(image.resize((40, 30), 4))[:, 5:35]),
        ({"size": 30, "crop_size": {"height": 10, "width": 20}}, np.asarray(image.resize((40, 30), 3))[10:20, 10:30]),
    ]
    for options, pixels in cases:
        expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(255).sub(MEAN).div(STD)
        per_call = processor(image, return_tensors="pt", **options)["pixel_values"][0]
        at_construction = HFCLIPImageProcessor(**options)(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(per_call, expected), options
        assert torch.equal(at_construction, expected), options


def test_crop_size_follows_size_at_construction():
    assert HFCLIPImageProcessor(size=336).crop_size == {"height": 336, "width": 336}
    assert HFCLIPImageProcessor(size=(20, 30)).crop_size == {"height": 20, "width": 30}
    assert HFCLIPImageProcessor(size=256, crop_size=224).crop_size == {"height": 224, "width": 224}


def test_crop_size_follows_a_later_size_unless_it_was_another(tmp_path):
    image = Image.fromarray(noise(60, 80))
    plain, cropping = HFCLIPImageProcessor(size=32), HFCLIPImageProcessor(size=32, crop_size=24)
    for size in (20, 48):
        found = plain(image, size=size, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(found, openai_transform(image, size))
    assert plain(image, size=(20, 30), return_tensors="np")["pixel_values"].shape == (1, 3, 20, 30)
    assert plain(image, size=48, crop_size=32, return_tensors="np")["pixel_values"].shape == (1, 3, 32, 32)
    assert cropping(image, size=48, return_tensors="np")["pixel_values"].shape == (1, 3, 24, 24)
    for saved, options, edge in [(plain, {}, 48), (plain, {"crop_size": 32}, 32), (cropping, {}, 24)]:
        saved.save_pretrained(tmp_path)
        loaded = HFCLIPImageProcessor.from_pretrained(tmp_path, size=48, **options)
        assert loaded.size["shortest_edge"] == 48 and loaded.crop_size == {"height": edge, "width": edge}


@pytest.mark.parametrize("height, width", [(5, 5), (5, 40), (4, 41)])
def test_crop_larger_than_the_image_is_padded_with_black(height, width):
    pixels = noise(height, width)
    options = {"do_resize": False, "crop_size": (10, 20), "do_rescale": False, "do_normalize": False}
    found = HFCLIPImageProcessor(**options)(pixels, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    # torchvision's CenterCrop: half of the missing pixels, rounded down, on the left and on the top
    canvas = np.zeros((10, max(width, 20), 3))
    top, left = (10 - height) // 2, max(20 - width, 0) // 2
    canvas[top : top + height, left : left + width] = pixels
    offset = int(round(max(width - 20, 0) / 2.0))
    assert np.array_equal(found, canvas[:, offset : offset + 20])


def test_rescaling_and_normalisation_are_separate():
    pixels = noise(8, 8)
    planes = pixels.transpose(2, 0, 1)
    options = {"do_resize": False, "do_center_crop": False, "return_tensors": "np"}
    processor = HFCLIPImageProcessor()

    def run(image, **more):
        return processor(image, **options, **more)["pixel_values"][0]

    assert np.array_equal(run(pixels, do_rescale=False, do_normalize=False), planes.astype(np.float32))
    assert np.array_equal(run(pixels, do_normalize=False), planes / np.float32(255))
    assert np.array_equal(run(pixels, do_normalize=False, rescale_factor=0.5), planes / np.float32(2))
    half = run(pixels, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    assert np.array_equal(half, (planes / np.float32(255) - np.float32(0.5)) / np.float32(0.5))
    # floating point images are in 0..1 already: not to rescale leaves them there
    assert np.array_equal(run(pixels / 255, do_rescale=False, do_normalize=False), planes / np.float32(255))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"do_resiz": True}, "no option 'do_resiz'.*nearest is 'do_resize'"),
        ({"do_resize": "no"}, "do_resize must be True or False, found 'no'"),
        ({"size": -1}, "size must be a positive integer.*found -1"),
        ({"size": True}, "size must be a positive integer.*found True"),
        ({"size": {"longest_edge": 5}}, "size must be.*longest_edge"),
        ({"size": 10**12}, "size must be.*up to 4096.*found 1000000000000"),
        ({"size": {"height": 1, "width": 30000}}, "size must be.*up to 4096"),
        ({"crop_size": 30000}, "crop_size must be.*up to 4096.*found 30000"),
        ({"image_mean": [10**400, 0, 0]}, "image_mean must be three numbers"),
        ({"image_std": [1e-50, 1, 1]}, "image_std must be positive, at least 1e-06"),
        ({"rescale_factor": 1e300}, "rescale_factor must be a positive number"),
        ({"crop_size": 0}, "crop_size must be.*found 0"),
        ({"crop_size": {"shortest_edge": 5}}, r"crop_size must be .*\(height and width\), found"),
        ({"resample": 99}, "resample must be one of.*3: 'BICUBIC'.*found 99"),
        ({"rescale_factor": 0}, "rescale_factor must be a positive number, found 0"),
        ({"image_mean": 0.5}, "image_mean must be three numbers.*found 0.5"),
        ({"image_std": [1, 0, 1]}, "image_std must be positive"),
        ({"resize_backend": "torchvision"}, "'pil' or 'torch', found 'torchvision'"),
        ({"resize_backend": "torch", "resample": 1}, "bilinear.*bicubic.*found 1"),
    ],
)
def test_rejects_bad_options_at_construction_and_per_call(processor, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        HFCLIPImageProcessor(**options)
    with pytest.raises((TypeError, ValueError), match=message):
        processor(Image.new("RGB", (4, 4)), **options)


def test_rejects_absurd_sizes_in_a_saved_folder(tmp_path):
    for name in ("crop_size", "size"):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({name: {"height": 30000, "width": 30000}}))
        with pytest.raises(ValueError, match=f"{name} must be .*up to 4096.*found"):
            HFCLIPImageProcessor.from_pretrained(tmp_path)


def test_rejects_options_of_transformers_that_it_would_ignore():
    with pytest.raises(TypeError, match="no option 'do_pad'"):
        HFCLIPImageProcessor(do_pad=True)


def test_do_convert_rgb_false_refuses_other_modes(processor):
    assert len(processor(Image.new("RGB", (4, 4)), do_convert_rgb=False)["pixel_values"]) == 1
    with pytest.raises(ValueError, match="found mode 'L', expected RGB"):
        processor(Image.new("L", (4, 4)), do_convert_rgb=False)


def test_rejects_unknown_return_tensors(processor):
    with pytest.raises(ValueError, match="'pt', 'np' or None, found 'tf'"):
        processor(Image.new("RGB", (4, 4)), return_tensors="tf")


# -------------------------------------------------------------------------------------------------- the torch resizer


def test_torch_resizing_stays_within_two_levels(photos):
    binary = noise(300, 400) // 128 * 255  # the hardest edges there are
    images = [open_image(source) for source in [*photos, noise(90, 130), noise(32, 32), binary]]
    for image in [*images, images[0].convert("L"), images[-1].resize((200, 400))]:
        for size in (64, 128, 224):
            exact = center_square_crop(image, size).astype(int)
            difference = np.abs(center_square_crop(image, size, "torch") - exact)
            assert difference.max() <= 2, (image.size, size)  # the documented bound
    assert difference.any()  # or it was PIL that resized


@pytest.mark.parametrize("mode", ["1", "P", "PA", "LA", "RGBA", "RGBa", "CMYK", "YCbCr"])
def test_torch_resizing_leaves_what_it_cannot_do_to_pil(mode):
    image, tall, wide = image_of_mode(mode, 90, 130), image_of_mode("RGB", 130, 60), image_of_mode("RGB", 90, 130)
    for source, size in ((image, 32), (image, 200), (tall, 32), (wide, (20, 90))):
        exact, fast = (HFCLIPImageProcessor(size=size, resize_backend=backend) for backend in ("pil", "torch"))
        assert torch.equal(*(p(source, return_tensors="pt")["pixel_values"] for p in (exact, fast)))


def test_torch_resizing_equals_torchvision():
    functional = pytest.importorskip("torchvision.transforms.v2.functional", reason="compares with torchvision")
    pixels = noise(90, 130)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    resized = functional.resize(tensor, [32], functional.InterpolationMode.BICUBIC, antialias=True)
    # not torchvision's center_crop: its offset is ours already
    expected = resized[:, :, 7 : 7 + 32].permute(1, 2, 0).numpy()
    assert np.array_equal(center_square_crop(pixels, 32, "torch"), expected)


def test_resize_backend_is_saved_and_pil_by_default(tmp_path):
    HFCLIPImageProcessor().save_pretrained(tmp_path / "default")
    assert json.loads((tmp_path / "default" / "preprocessor_config.json").read_text())["resize_backend"] == "pil"
    HFCLIPImageProcessor(resize_backend="torch").save_pretrained(tmp_path / "torch")
    assert HFCLIPImageProcessor.from_pretrained(tmp_path / "torch").backend == "torch"
    assert HFCLIPImageProcessor.from_pretrained(tmp_path / "default", resize_backend="torch").backend == "torch"


# ------------------------------------------------------------------------------------------------------ data workers


def test_random_crops_are_windows_of_the_resized_image():
    image = Image.fromarray(noise(20, 26))
    resized = np.asarray(image.resize((20, 16), Image.BICUBIC))  # 16 * 26 / 20 = 20.8
    windows = [resized[:, left : left + 16].transpose(2, 0, 1) for left in range(5)]
    generator, seen = np.random.default_rng(0), set()
    for _ in range(60):
        crop = random_square_crop(image, 16, generator)
        assert crop.shape == (3, 16, 16) and crop.dtype == np.uint8
        (left,) = [left for left, window in enumerate(windows) if np.array_equal(crop, window)]
        seen.add(left)
    assert seen == set(range(5))


def test_random_crops_convert_as_center_crops_do():
    for mode in ("L", "P", "LA", "RGBA", "CMYK"):
        image = image_of_mode(mode, 24, 24)  # square: there is one crop only
        random = random_square_crop(image, 16, np.random.default_rng(0))
        assert np.array_equal(random.transpose(1, 2, 0), openai_crop(image, 16))


def test_random_stream_depends_on_the_seed_alone():
    tall, square = Image.fromarray(noise(90, 20)), Image.fromarray(noise(20, 20))
    first, second = np.random.default_rng(7), np.random.default_rng(7)
    random_square_crop(tall, 16, first)
    random_square_crop(square, 16, second)
    assert np.array_equal(random_square_crop(tall, 16, first), random_square_crop(tall, 16, second))


def test_normalize_writes_into_out():
    out = np.empty((3, 4, 4), np.float32)
    assert normalize(noise(4, 4), out=out) is out
    assert np.array_equal(out, normalize(noise(4, 4)))


def test_processor_is_picklable(processor):
    image = Image.fromarray(noise(9, 9))
    again = pickle.loads(pickle.dumps(processor))
    assert np.array_equal(again(image)["pixel_values"][0], processor(image)["pixel_values"][0])


# ------------------------------------------------------------------------------------------------------------- saving


def test_round_trip_keeps_every_option(tmp_path):
    options = {
        "do_resize": False,
        "size": {"height": 20, "width": 30},
        "resample": 2,
        "do_center_crop": False,
        "crop_size": {"height": 10, "width": 12},
        "do_rescale": False,
        "rescale_factor": 0.5,
        "do_normalize": False,
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (0.4, 0.5, 0.6),
        "do_convert_rgb": False,
        "resize_backend": "torch",
    }
    HFCLIPImageProcessor(**options).save_pretrained(tmp_path)
    again = HFCLIPImageProcessor.from_pretrained(tmp_path)
    default = HFCLIPImageProcessor()
    for name, value in options.items():
        assert getattr(again, name) == value, name
        assert getattr(default, name) != value, name  # or the round trip would prove nothing


def test_opens_what_openai_published_on_the_hub(tmp_path):
    # the preprocessor_config.json of openai/clip-vit-large-patch14-336
    saved = {
        "crop_size": 336,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 336,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    assert HFCLIPImageProcessor.from_pretrained(tmp_path).to_dict() == HFCLIPImageProcessor(size=336).to_dict()


def test_exchanges_settings_with_transformers_clip(tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    options = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "image_mean": (0.1, 0.2, 0.3)}
    CLIPImageProcessorPil(**options).save_pretrained(tmp_path / "theirs")
    ours = HFCLIPImageProcessor.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path / "ours")
    for processor in (ours, theirs):
        assert all(getattr(processor, name) == value for name, value in options.items())
    image = Image.fromarray(noise(40, 56))  # nothing to resize, and a crop whose offset needs no rounding
    # transformers computes in another order: float32 rounding of values up to 2.7
    expected = theirs(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ours(image, return_tensors="np")["pixel_values"], expected, atol=1e-6)
