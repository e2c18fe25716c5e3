"""Many clients at once of `hfclip serve`: latency, errors and memory.

    python benchmarks/serving.py STORE --clients 200 --seconds 60

Each client asks, waits for the reply and asks again, without a pause; half of the queries are new to the server, the
other half among a hundred that repeat. Clients and server share the machine, so the times are upper bounds.
"""

import argparse
import asyncio
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import numpy as np
import psutil


WORDS = (
    "red blue large small old two running sleeping cat dog car tree house beach people food flower night snow".split()
)
SOURCES = Path(__file__).resolve().parents[1] / "src"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="folder of an index")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    line = [sys.executable, "-c", "import hfclip_cli; hfclip_cli.main()", "serve", options.store, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) as process:
        greeting = process.stdout.readline()
        try:
            address = re.search(r"http://\S+", greeting)[0]
            seconds, errors, memory = asyncio.run(load(address, psutil.Process(process.pid), options))
        finally:
            process.terminate()
    median, p95 = np.percentile(seconds, [50, 95])
    print(f"{greeting.partition(' at ')[0]}, {options.clients} clients, {options.seconds:.0f} s")
    print(f"{len(seconds):,} replies, {len(seconds) / options.seconds:.0f} per second, {errors} errors")
    print(f"median {median * 1e3:.0f} ms, 95 % {p95 * 1e3:.0f} ms, {p95 / median:.2f} times the median")
    print("memory " + ", ".join(f"{value / 2**20:.0f}" for value in memory) + " MiB at quarters of the time")


async def load(
    address: str, server: psutil.Process, options: argparse.Namespace
) -> tuple[list[float], int, list[int]]:
    """Seconds of each reply, the number of errors, and the server's memory at quarters of the time."""
    end = time.perf_counter() + options.seconds
    seconds, errors, memory = [], 0, []
    host = urlsplit(address).netloc

    async def ask_on(number: int) -> None:
        nonlocal errors
        draw = random.Random(number)
        reader, writer = await asyncio.open_connection(*host.split(":"))
        while time.perf_counter() < end:
            words = draw.choices(WORDS, k=2) if draw.random() < 0.5 else [draw.choice(WORDS), str(draw.random())]
            begin = time.perf_counter()
            query = urlencode({"q": " ".join(words), "limit": 20})
            writer.write(f"GET /api/search?{query} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
            errors += not head.startswith(b"http/1.1 200")
            seconds.append(time.perf_counter() - begin)
        writer.close()

    async def weigh() -> None:
        for _ in range(4):
            await asyncio.sleep(options.seconds / 4.2)
            memory.append(server.memory_info().rss)

    await asyncio.gather(weigh(), *map(ask_on, range(options.clients)))
    return seconds, errors, memory


if __name__ == "__main__":
    main()
