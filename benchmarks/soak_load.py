"""Load on a server as users make it: streams, clients that go away, aborts, long prompts, bursts.

Every request is greedy, so that what each client heard can be judged. Which request comes when follows from a seed; how
far the server has got by then does not.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CLIENTS = 6
BURST = 64
BURST_SECONDS = 15
ABORTED_TOKENS = 30
"""Before which an abort is asked for; it takes effect some later."""
MODEL = "tiny"
HUNG = "hung"
"""How a stream ended that did not."""


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids, and how many tokens are asked for."""

    ids: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Heard:
    """What a client heard: tokens, and how it ended: length, left, abort, hung, or an error's text."""

    prompt: Prompt
    tokens: tuple[int, ...]
    end: str


@dataclass
class Load:
    """Clients of one server.

    Args:
        url: the server's base URL.
        short, long: prompts to choose from, short ones and long ones.
        lasting: prompts whose answers take long enough for an abort to come in time.
        seed: of the choices.

    Attributes:
        heard: every request that has ended.
        kinds: how many of each kind were begun.
        streamed: tokens that clients have heard of streams so far.
    """

    url: str
    short: Sequence[Prompt]
    long: Sequence[Prompt]
    lasting: Sequence[Prompt]
    seed: int
    heard: list[Heard] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    streamed: int = 0

    def run(self, seconds: float) -> None:
        """Load the server for so long, then wait for what is under way."""
        asyncio.run(self._run(seconds))

    async def _run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        # Idle connections go before the server closes them, in 5 s: a request on one would fail and prove nothing.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as self.session:
            clients = [self._client(random.Random(f"{self.seed} {number}"), deadline) for number in range(CLIENTS)]
            await asyncio.gather(self._bursts(random.Random(self.seed), deadline), *clients)

    async def _client(self, chance: random.Random, deadline: float) -> None:
        kinds = {self._stream: 5, self._long: 2, self._leave: 3, self._leave_unanswered: 1, self._abort: 2}
        while time.monotonic() < deadline:
            (kind,) = chance.choices(list(kinds), list(kinds.values()))
            await kind(chance)

    async def _bursts(self, chance: random.Random, deadline: float) -> None:
        while time.monotonic() < deadline:
            self._count("burst")
            await asyncio.gather(*(self.hear(chance.choice(self.short)) for _ in range(BURST)))
            await asyncio.sleep(max(0.0, min(BURST_SECONDS, deadline - time.monotonic())))

    async def _stream(self, chance: random.Random) -> None:
        self._count("stream")
        await self.hear(chance.choice(self.short))

    async def _long(self, chance: random.Random) -> None:
        self._count("long prompt")
        await self.hear(chance.choice(self.long))

    async def _leave(self, chance: random.Random) -> None:
        """Close the connection in mid-stream."""
        self._count("disconnect")
        prompt = chance.choice(self.short)
        await self.hear(prompt, leave_after=chance.randrange(prompt.new_tokens))

    async def _leave_unanswered(self, chance: random.Random) -> None:
        """Go away before the answer to a request that does not stream."""
        self._count("cancel")
        prompt = chance.choice([*self.short, *self.long])
        answer = asyncio.ensure_future(self._answer(prompt))
        await asyncio.wait([answer], timeout=chance.uniform(0, 1))
        if not answer.cancel():
            await answer
            return
        self.heard.append(Heard(prompt, (), "left"))

    async def _answer(self, prompt: Prompt) -> None:
        try:
            async with self.session.post(f"{self.url}/v1/completions", json=body(prompt, stream=False)) as answer:
                answer.raise_for_status()
                (choice,) = (await answer.json())["choices"]
                self.heard.append(Heard(prompt, tuple(choice["token_ids"]), choice["finish_reason"]))
        except aiohttp.ClientError as error:
            self.heard.append(Heard(prompt, (), f"{type(error).__name__}: {error}"))

    async def _abort(self, chance: random.Random) -> None:
        """Have the server abort the request by its id, from another connection."""
        self._count("abort")
        await self.hear(chance.choice(self.lasting), abort_after=chance.randrange(ABORTED_TOKENS))

    async def hear(self, prompt: Prompt, leave_after: int | None = None, abort_after: int | None = None) -> None:
        """Stream one answer and note it; leave, or have it aborted, after more than so many tokens."""
        tokens: list[int] = []
        end = HUNG
        try:
            async with self.session.post(f"{self.url}/v1/completions", json=body(prompt, stream=True)) as answer:
                answer.raise_for_status()
                async for chunk in chunks(answer):
                    if "error" in chunk:
                        end = f"error: {chunk['error']}"
                        break
                    new = chunk["choices"][0]["token_ids"] or []
                    tokens += new
                    self.streamed += len(new)
                    end = chunk["choices"][0]["finish_reason"] or end
                    if leave_after is not None and len(tokens) > leave_after and end == HUNG:
                        end = "left"
                        break
                    if abort_after is not None and len(tokens) > abort_after:
                        abort_after = None
                        await self._abort_request(chunk["id"])
        except aiohttp.ClientError as error:
            end = f"{type(error).__name__}: {error}"
        finally:  # also when the client gives up waiting
            self.heard.append(Heard(prompt, tuple(tokens), end))

    async def _abort_request(self, identifier: str) -> None:
        # vLLM numbers the prompts of a completion.
        async with self.session.post(f"{self.url}/abort_requests", json={"request_ids": [f"{identifier}-0"]}) as answer:
            answer.raise_for_status()

    def _count(self, kind: str) -> None:
        self.kinds[kind] = self.kinds.get(kind, 0) + 1


def body(prompt: Prompt, stream: bool) -> dict[str, Any]:
    """A greedy completion of exactly ``new_tokens`` tokens."""
    return {
        "model": MODEL, "prompt": list(prompt.ids), "max_tokens": prompt.new_tokens, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True, "stream": stream,
    }  # fmt: skip


async def chunks(answer: aiohttp.ClientResponse) -> Any:
    """Parsed events of a stream."""
    async for line in answer.content:
        text = line.decode().strip().removeprefix("data: ")
        if text and text != "[DONE]":
            yield json.loads(text)
