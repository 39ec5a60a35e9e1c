"""uvicorn's HTTP protocol, with a bound on how long a request's head may take."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedHeads(H11Protocol):
    """uvicorn stops its clock for idle connections at the first byte, and has none for a connection that never sent a
    request: a client that sends a byte now and then, or nothing, would hold its connection for ever."""

    def __init__(self, *args: Any, head_timeout_s: float, **kwargs: Any) -> None:
        """``head_timeout_s``: from the connection, or from the first byte of a later request, to the end of its head."""
        super().__init__(*args, **kwargs)
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._has_begun = False
        self.app_state = {**self.app_state, "write_now": self.write_now}

    def write_now(self, data: bytes) -> bool:
        """Sends what is not nothing as a chunk of the response that has begun, past h11, which would take as long as all
        else that a token costs here.  False where it would wait, or be no chunk."""
        if (
            self.flow.write_paused
            or self.transport.is_closing()
            or self.conn.our_state is not h11.SEND_BODY
            or self.conn.their_http_version != b"1.1"
        ):
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._start_clock()

    def data_received(self, data: bytes) -> None:
        self._has_begun = True
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_clock()
        elif self._head_timer is None and not self.transport.is_closing():
            self._start_clock()

    def on_response_complete(self) -> None:
        self._has_begun = False
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)
        # What it refers to refers to it: without this it would be there until somebody looks for garbage.
        self.app_state = {}
        self.cycle = None  # type: ignore[assignment]

    def _start_clock(self) -> None:
        self._head_timer = self.loop.call_later(self._head_timeout_s, self._time_out)

    def _stop_clock(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _time_out(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self._has_begun and self.conn.our_state is h11.IDLE:
            text = f"the request's head took longer than {self._head_timeout_s:g} s\n".encode()
            headers = [("content-type", "text/plain"), ("content-length", str(len(text))), ("connection", "close")]
            for event in (
                h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
                h11.Data(data=text),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
