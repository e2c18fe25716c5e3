"""What keeps strangers out of a server of one's own images: which requests are let in, and the headers of all replies."""

import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send


COOKIE = "hfclip_token"
# The page is scripts, styles and images of this server, and nothing else: no inline code, no frame, no other host.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Refuses requests under other names than the server's, of other sites, and without the token where there is one.

    Args:
        token: what a request needs: as a cookie, which `/?token=...` sets, or as `Authorization: Bearer ...`.
        hosts: names that requests may be sent to. A page of another site whose name is made to point here (DNS
            rebinding) sends its own. None: any, since such a page has no token.
    """

    def __init__(self, app: ASGIApp, token: str | None, hosts: Collection[str] | None):
        self.app, self.token, self.hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await (self._answer(Request(scope)) or self.app)(scope, receive, send_guarded)

    def _answer(self, request: Request) -> Response | None:
        """The reply to a request that the app is not to see."""
        names = request.headers.getlist("host")
        if self.hosts is not None and (len(names) != 1 or host_name(names[0]) not in self.hosts):
            return refuse(421, f"found Host {names}, expected one of {', '.join(sorted(self.hosts))}.")
        if request.url.path == "/healthz":
            return None
        if self.token is not None:
            if request.url.path == "/" and self._is_token(request.query_params.get("token", "")):
                reply = RedirectResponse("/", 303)  # so that the token is in no history, and in no link that is shared
                reply.set_cookie(COOKIE, self.token, max_age=30 * 24 * 3600, httponly=True, samesite="lax")
                return reply
            bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not self._is_token(request.cookies.get(COOKIE, "")) and not self._is_token(bearer):
                return refuse(401, "found no valid token. Open the address that `hfclip serve` has printed.")
        if request.method not in ("GET", "HEAD") and not is_of_own_page(request):
            return refuse(403, "found a request of another site's page, expected one of this server's.")
        return None

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())  # in a time that tells nothing of the token


def host_name(host: str) -> str | None:
    """The name in a Host header, without the port; None where there is none."""
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname if parts.netloc == host and "@" not in host else None
    except ValueError:
        return None


def is_of_own_page(request: Request) -> bool:
    """Whether a request is of this server's page, or of no browser: those say which page they ask for."""
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "none")
    own = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    return own and site in ("same-origin", "none")


def refuse(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)
