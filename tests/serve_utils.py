"""What the tests of the server of image search share: a small index, and a server of it in a thread."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image
from training_utils import save_model

from hfclip.search import ImageIndex


SIZES = [(90, 60), (60, 90), (64, 64), (200, 40)]


def write_photos(folder: Path, number: int) -> None:
    """Images of two colors each, in four shapes and two folders."""
    random = np.random.default_rng(0)
    for seed in range(number):
        place = folder / ("summer days" if seed % 3 else "winter")
        place.mkdir(parents=True, exist_ok=True)
        width, height = SIZES[seed % len(SIZES)]
        pixels = np.empty((height, width, 3), np.uint8)
        pixels[: height // 2], pixels[height // 2 :] = random.integers(0, 256, (2, 3))
        Image.fromarray(pixels).save(place / f"photo_{seed:03d}.png")


def build_index(folder: Path, number: int) -> ImageIndex:
    write_photos(folder / "photos", number)
    return ImageIndex.build(folder / "photos", str(save_model(folder)), store=folder / "store")


@contextmanager
def serving(app) -> Iterator[str]:
    """The address of a server that runs meanwhile."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
