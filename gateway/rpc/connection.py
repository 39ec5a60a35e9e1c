"""One client's connection: HTTP/2 by h2, but for the frames that carry messages.

Whatever is to be sent in a turn of the event loop, to however many streams, leaves in one write at its end.  That, and that
a message is no more than a few bytes put before it, is what this server is for (ADR 43): h2 would take ten times as long
for a frame, and grpc.aio a system call and a thread's wake-up for each message.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import cast

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import structlog
from hyperframe.frame import GoAwayFrame

from gateway.rpc import metadata
from gateway.rpc.call import Call
from gateway.rpc.framing import PREFIX_NBYTES, data_frame, message_frame, prefixed
from gateway.rpc.limits import Limits
from services.runtime.server import MAX_METADATA_NBYTES

_log = structlog.stdlib.get_logger(__name__)

# As every peer takes them (RFC 9113 section 6.5.2).
_MAX_FRAME_NBYTES = 16_384
# In a turn of the loop; the rest has to wait, and the client may not read at all.
_TURN_NBYTES = 256 * 1024
_PING = b"kvferry?"
_ERRORS = h2.errors.ErrorCodes
_CONTENT_TYPE = "application/grpc"

# Given the headers of a request: its call, or why there is none (grpc-status, grpc-message).
Begin = Callable[["Connection", int, metadata.Headers], "Call | tuple[int, str]"]


class Connection(asyncio.Protocol):
    """Owned by the event loop.  Ends with its client, or by ``close``."""

    def __init__(self, begin: Begin, limits: Limits, on_end: Callable[[Connection], None]) -> None:
        self.calls: dict[int, Call] = {}
        self._begin = begin
        self._limits = limits
        self._on_end = on_end
        config = h2.config.H2Configuration(client_side=False, header_encoding="latin-1")
        self._h2 = h2.connection.H2Connection(config)
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._out_nbytes = 0
        self._buffered_nbytes = 0
        self._flushes = False
        self._is_paused = False
        self._blocked: set[Call] = set()
        self._is_closing = False
        self._last_stream_id = 0
        self._has_begun = False
        self._pinged = False
        self._timer: asyncio.TimerHandle | None = None
        self._resets: deque[float] = deque(maxlen=limits.max_resets)

    # As asyncio sees it.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        codes = h2.settings.SettingCodes
        self._h2.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                codes.MAX_CONCURRENT_STREAMS: self._limits.max_streams,
                codes.MAX_HEADER_LIST_SIZE: self._limits.max_headers_nbytes,
                codes.INITIAL_WINDOW_SIZE: self._limits.window_nbytes,
                codes.ENABLE_CONNECT_PROTOCOL: 0,
            },
        )
        self._h2.decoder.max_header_list_size = self._limits.max_headers_nbytes
        self._h2.initiate_connection()
        self._take()
        self._later(self._limits.preface_timeout_s, self._see_whether_it_began)

    def data_received(self, data: bytes) -> None:
        self._has_begun = True
        try:
            events = self._h2.receive_data(data)
        except h2.exceptions.ProtocolError as error:
            _log.info("connection_broken", peer=self.peer, error=str(error) or type(error).__name__)
            self._take()
            self.hang_up()
            return
        # Before anything that the events bring: a client reckons with larger windows once it has read that they were noted.
        self._take()
        for event in events:
            self._on(event)
        self._take()

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._pump_all()

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        calls, self.calls = self.calls, {}
        self._blocked.clear()
        for call in calls.values():
            call.on_gone()
        self._on_end(self)

    # As its calls see it.

    @property
    def peer(self) -> str:
        name = None if self._transport is None else self._transport.get_extra_info("peername")
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "unknown"

    def send_message(self, call: Call, message: bytes) -> None:
        if self.calls.get(call.stream_id) is not call:
            return
        if not call.begun:
            call.begun = True
            self._send_headers(call.stream_id, [(":status", "200"), ("content-type", _CONTENT_TYPE)])
        nbytes = PREFIX_NBYTES + len(message)
        if call.unsent or nbytes > self._room(call):
            call.unsent.append(memoryview(prefixed(message)))
            self._pump(call)
        else:
            self._take_room(call, nbytes)
            self._send(message_frame(call.stream_id, message))

    def end(self, call: Call, headers: list[tuple[str, str]]) -> None:
        if self.calls.get(call.stream_id) is not call:
            return
        if not call.begun:
            headers = [(":status", "200"), ("content-type", _CONTENT_TYPE), *headers]
        if call.is_partly_sent:
            # The rest of a message has to come before the status, and what comes behind it need not.
            while len(call.unsent) > 1:
                call.unsent.pop()
            call.last_headers = headers
            asyncio.get_running_loop().call_later(self._limits.last_words_s, self._give_up, call)
        else:
            self._finish(call, headers)

    def _finish(self, call: Call, headers: list[tuple[str, str]]) -> None:
        self._forget(call)
        self._send_headers(call.stream_id, headers, ends=True)
        if not call.request_ended:
            self._reset(call.stream_id, _ERRORS.NO_ERROR)

    def _give_up(self, call: Call) -> None:
        """The client has not even taken what was left of a message, if it has not."""
        if self.calls.get(call.stream_id) is call:
            self._forget(call)
            self._reset(call.stream_id, _ERRORS.CANCEL)

    def _forget(self, call: Call) -> None:
        self.calls.pop(call.stream_id, None)
        self._blocked.discard(call)
        self._buffered_nbytes -= call.buffered_nbytes
        if self._is_closing and not self.calls:
            asyncio.get_running_loop().call_soon(self.hang_up)

    def taken(self, call: Call) -> None:
        if self.calls.get(call.stream_id) is not call:
            return
        nbytes, call.buffered_nbytes = call.buffered_nbytes, 0
        self._buffered_nbytes -= nbytes
        if nbytes and call.has_many_requests:
            self._acknowledge(call.stream_id, nbytes)

    # As its server sees it.

    def close(self) -> None:
        """Takes no new call, and hangs up when the last one has ended."""
        if self._is_closing or self._transport is None:
            return
        self._is_closing = True
        # h2 would send nothing more after a GOAWAY of its own.
        self._send(GoAwayFrame(last_stream_id=self._last_stream_id).serialize())
        if not self.calls:
            self.hang_up()

    def hang_up(self) -> None:
        """Once what was sent is gone; calls that are left hear nothing."""
        self._is_closing = True
        if self._transport is not None:
            if self._out:
                self._flush()
            self._transport.close()

    # HTTP/2.

    def _on(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                self._on_request(event)
            case h2.events.DataReceived():
                self._on_data(event)
            case h2.events.StreamEnded():
                if call := self.calls.get(event.stream_id):
                    call.on_request_end()
            case h2.events.StreamReset():
                self._on_reset(event.stream_id)
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                self._pump_all()
            case h2.events.PingAckReceived():
                self._pinged = False
            case h2.events.ConnectionTerminated():
                # The client opens no more streams, and still reads those that there are; h2 would send it nothing more.
                self._h2.state_machine.state = h2.connection.ConnectionState.SERVER_OPEN
                self._is_closing = True
                if not self.calls:
                    self.hang_up()

    def _on_request(self, event: h2.events.RequestReceived) -> None:
        stream_id, headers = event.stream_id, cast(metadata.Headers, event.headers)
        if self._is_closing:
            self._reset(stream_id, _ERRORS.REFUSED_STREAM)
            return
        self._last_stream_id = stream_id
        given = dict(headers)
        if given.get(":method") != "POST" or not given.get("content-type", "").startswith(_CONTENT_TYPE):
            status = "405" if given.get(":method") != "POST" else "415"
            self._send_headers(stream_id, [(":status", status)], ends=True)
            return
        if metadata.nbytes_of(headers) > MAX_METADATA_NBYTES:
            begun: Call | tuple[int, str] = (8, f"the metadata is larger than the limit of {MAX_METADATA_NBYTES} bytes")
        else:
            begun = self._begin(self, stream_id, headers)
        if isinstance(begun, Call):
            self.calls[stream_id] = begun
            return
        status, message = str(begun[0]), metadata.percent_encoded(begun[1])
        self._send_headers(
            stream_id,
            [(":status", "200"), ("content-type", _CONTENT_TYPE), ("grpc-status", status), ("grpc-message", message)],
            ends=True,
        )

    def _on_data(self, event: h2.events.DataReceived) -> None:
        nbytes = event.flow_controlled_length
        call = self.calls.get(event.stream_id)
        if call is None:  # has ended
            self._acknowledge(event.stream_id, nbytes)
            return
        call.buffered_nbytes += nbytes
        self._buffered_nbytes += nbytes
        if self._buffered_nbytes > self._limits.max_buffered_nbytes:
            self._abort("requests_too_large")
        # A request of one message may be larger than the window; of many, each is taken before more come.
        if not call.has_many_requests:
            self._acknowledge(call.stream_id, nbytes)
        call.on_data(event.data)

    def _on_reset(self, stream_id: int) -> None:
        if (call := self.calls.get(stream_id)) is not None:
            self._forget(call)
            call.on_gone()
        now_s = asyncio.get_running_loop().time()
        if len(self._resets) == self._limits.max_resets and now_s - self._resets[0] < self._limits.resets_within_s:
            self._abort("too_many_resets")
        self._resets.append(now_s)

    # Sending.

    def _room(self, call: Call) -> int:
        """How large a frame of the call may be now."""
        if self._is_paused or self._out_nbytes > _TURN_NBYTES:
            return 0
        stream = self._h2.streams.get(call.stream_id)
        if stream is None or stream.closed:
            return 0
        return min(self._h2.outbound_flow_control_window, stream.outbound_flow_control_window, _MAX_FRAME_NBYTES)

    def _take_room(self, call: Call, nbytes: int) -> None:
        self._h2.streams[call.stream_id].outbound_flow_control_window -= nbytes
        self._h2.outbound_flow_control_window -= nbytes

    # Of a stream that has been reset h2 knows before it has told: there is nobody to send to.

    def _send_headers(self, stream_id: int, headers: list[tuple[str, str]], *, ends: bool = False) -> None:
        with suppress(h2.exceptions.NoSuchStreamError):
            self._h2.send_headers(stream_id, headers, end_stream=ends)
        self._take()

    def _reset(self, stream_id: int, code: h2.errors.ErrorCodes) -> None:
        with suppress(h2.exceptions.NoSuchStreamError):
            self._h2.reset_stream(stream_id, code)
        self._take()

    def _acknowledge(self, stream_id: int, nbytes: int) -> None:
        with suppress(h2.exceptions.NoSuchStreamError):
            self._h2.acknowledge_received_data(nbytes, stream_id)
        self._take()

    def _pump(self, call: Call) -> None:
        """Sends as much of what is unsent as the windows take."""
        while call.unsent and (room := self._room(call)) > 0:
            payload = call.unsent[0]
            part = payload[:room]
            self._take_room(call, len(part))
            self._send(data_frame(call.stream_id, part))
            call.is_partly_sent = len(payload) > room
            if call.is_partly_sent:
                call.unsent[0] = payload[room:]
            else:
                call.unsent.popleft()
        if call.unsent:
            self._blocked.add(call)
        else:
            self._blocked.discard(call)
            call.on_drained()
            if call.last_headers is not None:
                self._finish(call, call.last_headers)

    def _pump_all(self) -> None:
        for call in list(self._blocked):
            self._pump(call)

    def _take(self) -> None:
        """What h2 has to send, in its place among what was sent before."""
        if data := self._h2.data_to_send():
            self._send(data)

    def _send(self, data: bytes) -> None:
        self._out.append(data)
        self._out_nbytes += len(data)
        if not self._flushes:
            self._flushes = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushes = False
        out, self._out, self._out_nbytes = b"".join(self._out), [], 0
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(out)
        # Only what asks for answers and reads none gets there: messages wait for the client.
        if self._transport.get_write_buffer_size() > self._limits.max_unread_nbytes:
            self._abort("answers_not_read")
        elif not self._is_paused:
            self._pump_all()

    def _abort(self, why: str) -> None:
        _log.warning("connection_ended", why=why, peer=self.peer)
        self._is_closing = True
        if self._transport is not None:
            self._transport.abort()

    # Time.

    def _later(self, delay_s: float, act: Callable[[], None]) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, act)

    def _see_whether_it_began(self) -> None:
        if not self._has_begun:
            self._abort("said_nothing")
        else:
            self._ask()

    def _ask(self) -> None:
        """Whether the client is still there."""
        self._pinged = True
        if self._transport is not None and not self._transport.is_closing():
            self._h2.ping(_PING)
            self._take()
            self._later(self._limits.ping_timeout_s, self._see_whether_it_answered)

    def _see_whether_it_answered(self) -> None:
        if self._pinged:
            self._abort("answered_no_ping")
        else:
            self._later(self._limits.ping_interval_s, self._ask)
