"""Serves image search to browsers: a page, and a JSON API for programs.

    hfclip serve                                # the index that `hfclip index` makes, at http://127.0.0.1:7860
    hfclip serve photos.index --host 0.0.0.0    # for other machines too; the address that is printed holds a token

    GET  /api/search?q=two+parrots+-+people&like=0.5:17&folder=Spain&after=2020-05&limit=60&offset=0
    GET  /api/similar/17, /api/images (the latest), /api/stats, /thumb/17, /image/17, /healthz
    POST /api/images    an image as the body; the key in the reply is for /api/search?image=KEY

`like` and `image` are terms of the query: ids and keys of images, after a weight and a colon or a minus where they have
one. HFCLIP_SERVE_TOKEN is the token to ask for instead of one that is drawn.

exit codes: 2 wrong usage, 130 stopped with Ctrl-C
"""

import argparse
import os
import secrets
import socket

from hfclip_errors import UsageError, require_extra, run


LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def main() -> None:
    options = parse_options()
    require_extra("search")
    import uvicorn

    from hfclip.search import ImageIndex
    from hfclip.search.serve import create_app

    is_public = options.host not in LOOPBACK
    token = (os.environ.get("HFCLIP_SERVE_TOKEN") or secrets.token_urlsafe(24)) if is_public else None
    with listen(options.host, options.port) as listening:
        index = ImageIndex.open(options.store, options.model)
        index.open_model()
        app = create_app(index, token, None if is_public else LOOPBACK)
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/{f'?token={token}' if token else ''}"
        print(f"{len(index):,} images at {address}  (Ctrl-C ends)", flush=True)
        settings = {"log_level": "warning", "server_header": False, "limit_concurrency": 1000, "lifespan": "off"}
        uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=3, **settings)).run(sockets=[listening])


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", help="the index's own folder (default: ~/.cache/hfclip/search)")
    parser.add_argument("--model", help="where the model of the index is now, if it was moved")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="0 for any that is free (default: %(default)s)")
    return parser.parse_args()


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound. Raises UsageError where the address is taken, or none of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"--host {host} --port {port}: {error}. Give another, or port 0 for any that is free."
        ) from error


if __name__ == "__main__":
    run(main)
