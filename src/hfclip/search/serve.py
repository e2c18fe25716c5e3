"""The server of image search: a JSON API, images, and one page that uses them."""

import asyncio
import os
import re
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from torch import Tensor

from ..errors import UsageError
from . import Found, Hit, ImageIndex, Query, parse_query
from .serve_guard import Guard, refuse
from .serve_images import LARGEST_UPLOAD, Thumbnails, Uploads, original, printable, read_image, thumbnail


LONGEST_QUERY, MOST_TERMS = 1000, 16  # characters; images and texts
MOST_HITS, FARTHEST = 200, 10_000  # in a reply; the number of the first one
MOST_AT_ONCE = 64  # queries
UPLOAD_SECONDS = 60
PAGE = {"index.html": "text/html", "style.css": "text/css", "app.js": "text/javascript", "icon.svg": "image/svg+xml"}
IMAGE_TERM = re.compile(r"(-?)(?:(\d{1,3}(?:\.\d{1,3})?):)?([0-9a-f]{1,24})")


class QueryQueue:
    """Answers queries in a thread: those that come while it computes are its next batch, in their order."""

    def __init__(self, answer: Callable[[list[tuple]], list]):
        self.answer, self.thread = answer, ThreadPoolExecutor(1, "queries")
        self.waiting: list[tuple[tuple, asyncio.Future]] = []
        self.work: asyncio.Task | None = None

    async def ask(self, *question: Any) -> Any:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.waiting.append((question, future))
        if self.work is None or self.work.done():
            self.work = loop.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self.waiting:
            batch, self.waiting = self.waiting[:MOST_AT_ONCE], self.waiting[MOST_AT_ONCE:]
            questions = [question for question, _ in batch]
            answers = await asyncio.get_running_loop().run_in_executor(self.thread, self.answer, questions)
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():  # cancelled, as the server ends
                    (future.set_exception if isinstance(answer, Exception) else future.set_result)(answer)


class Routes:
    """What is answered to the page and to programs."""

    def __init__(self, index: ImageIndex):
        self.index, self.queries, self.uploads = index, QueryQueue(self._search_all), Uploads()
        self.thumbnails = Thumbnails(index.store.folder / "thumbnails")
        self.readers = CapacityLimiter(min(os.cpu_count() or 1, 8))  # images that are decoded at a time

    def __iter__(self):
        yield Route("/", self.send_page)
        yield Route("/page/{name}", self.send_page)
        yield Route("/api/search", self.search)
        yield Route("/api/similar/{id:int}", self.similar)
        yield Route("/api/images", self.latest)
        yield Route("/api/images", self.upload, methods=["POST"])
        yield Route("/api/stats", self.stats)
        yield Route("/thumb/{id:int}", self.thumbnail)
        yield Route("/thumb/upload/{key}", self.thumbnail_of_upload)
        yield Route("/image/{id:int}", self.image)
        yield Route("/healthz", self.health)

    # ------------------------------------------------------------------------------------------------------- queries

    async def search(self, request: Request) -> Response:
        return await self._found(request, Query(tuple(self._read_terms(request.query_params))))

    async def similar(self, request: Request) -> Response:
        return await self._found(request, Query(((1.0, self._hit(request).id),)))

    async def latest(self, request: Request) -> Response:
        return await self._found(request, None)

    async def _found(self, request: Request, query: Query | None) -> Response:
        limit = read_number(request.query_params, "limit", 60, 1, MOST_HITS)
        offset = read_number(request.query_params, "offset", 0, 0, FARTHEST)
        found = await self.queries.ask(query, limit, read_filters(request.query_params), offset)
        terms = (
            [{"weight": weight, "text": term} for weight, term in query.terms if isinstance(term, str)]
            if query
            else []
        )
        reply = {"total": found.total, "strong": found.strong, "terms": terms}
        return JSONResponse({"hits": [as_json(hit) for hit in found.hits], **reply})

    def _search_all(self, questions: list[tuple]) -> list[Found | Exception]:
        """Answers of the index, or the errors that it raises; texts are embedded at once, and kept by the index."""
        terms = [term for query, *_ in questions if query for _, term in query.terms]
        attempt(self.index.embed_texts, [term for term in terms if isinstance(term, str)])
        return [
            attempt(self.index.search, query, *rest) if query else attempt(self.index.latest, *rest)
            for query, *rest in questions
        ]

    def _read_terms(self, parameters: QueryParams) -> list[tuple[float, Any]]:
        text = parameters.get("q", "").strip()
        if len(text) > LONGEST_QUERY:
            raise HTTPException(400, f"q: found {len(text):,} characters, expected at most {LONGEST_QUERY:,}.")
        terms = list(parse_query(text).terms) if text else []
        for name in ("like", "image"):
            for value in parameters.getlist(name):
                parts = IMAGE_TERM.fullmatch(value)
                if not parts or (name == "like" and not parts[3].isdecimal()):
                    raise HTTPException(400, f"{name}: found {value[:40]!r}, expected an image as 17, -17 or 0.5:17.")
                term = self._known(int(parts[3])).id if name == "like" else self.uploads.get(parts[3])[0]
                terms.append((float(f"{parts[1]}{parts[2] or 1}"), term))
        if not 1 <= len(terms) <= MOST_TERMS:
            raise HTTPException(
                400, f"found {len(terms) or 'no'} terms, expected up to {MOST_TERMS} by q, like and image."
            )
        return terms

    # -------------------------------------------------------------------------------------------------------- images

    def _hit(self, request: Request) -> Hit:
        return self._known(request.path_params["id"])

    def _known(self, number: int) -> Hit:
        try:
            return self.index.get(number)
        except LookupError as error:
            raise HTTPException(404, f"found no image {number}.") from error

    async def _read(self, function: Callable, *arguments: Any) -> Any:
        return await to_thread.run_sync(function, *arguments, limiter=self.readers)

    async def thumbnail(self, request: Request) -> Response:
        data = await self._read(self.thumbnails.get, self._hit(request))
        return Response(data, media_type="image/webp", headers={"Cache-Control": "private, max-age=604800"})

    async def image(self, request: Request) -> Response:
        return await self._read(original, self._hit(request), "download" in request.query_params)

    async def upload(self, request: Request) -> Response:
        try:
            data = await asyncio.wait_for(read_body(request), UPLOAD_SECONDS)
        except asyncio.TimeoutError as error:
            raise HTTPException(408, f"found no whole image within {UPLOAD_SECONDS} seconds.") from error
        return JSONResponse({"image": self.uploads.add(data, *await self._read(self._embed_upload, data))})

    def _embed_upload(self, data: bytes) -> tuple[Tensor, bytes]:
        image = read_image(data)
        return self.index.embed(image), thumbnail(image)

    async def thumbnail_of_upload(self, request: Request) -> Response:
        return Response(self.uploads.get(request.path_params["key"])[1], media_type="image/webp")

    # -------------------------------------------------------------------------------------------------- all the rest

    async def stats(self, request: Request) -> Response:
        stats = await to_thread.run_sync(self.index.stats)
        return JSONResponse({**stats, "folders": [printable(folder) for folder in stats["folders"]]})

    async def send_page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in PAGE:
            raise HTTPException(404)
        data = (files(__package__) / "page" / name).read_bytes()
        return Response(data, media_type=PAGE[name], headers={"Cache-Control": "no-cache"})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})


def attempt(function: Callable, *arguments: Any) -> Any:
    """What a function returns, or the error that it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return error


def read_number(parameters: QueryParams, name: str, default: int, least: int, most: int) -> int:
    value = parameters.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", value) or not least <= int(value) <= most:
        raise HTTPException(400, f"{name}: found {value[:40]!r}, expected a number from {least} to {most}.")
    return int(value)


def read_filters(parameters: QueryParams) -> str | None:
    """The conditions of a request as the index takes them."""
    return (
        shlex.join(f"{name}={parameters[name]}" for name in ("folder", "after", "before") if parameters.get(name))
        or None
    )


async def read_body(request: Request) -> bytes:
    """The body of an upload. Raises HTTPException as soon as it is too large."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > LARGEST_UPLOAD:
            raise HTTPException(413, f"found more than {LARGEST_UPLOAD >> 20} MiB, expected a smaller image.")
    return bytes(data)


def as_json(hit: Hit) -> dict[str, Any]:
    path, folder = printable(hit.path), printable(hit.folder)
    shown = {"id": hit.id, "name": os.path.basename(path), "path": path, "folder": folder}
    return {**shown, **{name: getattr(hit, name) for name in ("score", "z", "width", "height", "modified")}}


async def show_error(request: Request, error: Exception) -> Response:
    """Errors of this server, of the query, and of images that have gone in the meantime."""
    if isinstance(error, HTTPException):
        return refuse(error.status_code, error.detail)
    return refuse(404 if isinstance(error, LookupError) else 400, str(error))


def create_app(index: ImageIndex, token: str | None = None, hosts: set[str] | None = None) -> ASGIApp:
    """The ASGI app of an open index.

    Args:
        token: what each request needs; None where nobody else reaches the server.
        hosts: names that requests may be sent to, any for None.
    """
    handlers = {HTTPException: show_error, UsageError: show_error, LookupError: show_error}
    return Guard(Starlette(routes=list(Routes(index)), exception_handlers=handlers), token, hosts)
