"""A further rank of a tensor-parallel worker, ``python -m services.worker.rank``: computes its share of each step that the
first rank tells it of.  Only the first rank starts it, with the number of an open socket, and it ends with that one."""

from __future__ import annotations

import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import structlog

from kvferry.errors import Error
from services.engine.layout import KvLayout
from services.engine.model_files import open_model
from services.engine.parallel.frames import FrameError, Kind, Pipe, Setup, unpack_step
from services.engine.parallel.shard import Shard
from services.engine.runners import ShardRunner, create_shard_runner
from services.engine.weights import Weights, load_weights
from services.runtime import logs
from services.runtime.cpus import pinned
from services.worker.leash import end_with
from transport import TransportError, borrow

log = structlog.get_logger(__name__)

TELL_EVERY_S = 1.0


def main() -> int:
    # The first rank decides when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    pipe = Pipe(connection)
    try:
        setup = Setup.unpack(_next(pipe, Kind.SETUP))
    except EOFError:
        return 1
    end_with(connection, lambda: _forget(setup))
    logs.configure(setup.log_name, level=setup.log_level)
    try:
        with pinned(frozenset(setup.cpus)):
            _follow(pipe, _begin(pipe, setup))
    except EOFError:
        _forget(setup)
        return 1
    except (Error, TransportError) as e:
        pipe.send(Kind.FAILED, str(e).encode())
        return 1
    except Exception as e:
        log.exception("rank_failed")
        pipe.send(Kind.FAILED, f"{e!r}; the worker's log has the details".encode())
        return 1
    return 0


def _forget(setup: Setup) -> None:
    """What a first rank that was killed left of the group."""
    shutil.rmtree(Path(setup.store).parent, ignore_errors=True)


def _begin(pipe: Pipe, setup: Setup) -> ShardRunner:
    """Loads and meets the others."""
    files = open_model(setup.model)
    model = files.config
    if model.revision != setup.revision:
        raise Error(f"the files at {files.path} have changed since the first rank read them; start the worker again")
    shard = Shard.of(model, setup.rank, setup.size)
    told_s = 0.0

    def tell(share: float) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= TELL_EVERY_S:
            told_s = time.monotonic()
            pipe.send(Kind.PROGRESS)

    weights: Weights = load_weights(model, files.path, setup.dtype, tell, shard)
    layout = KvLayout(
        model.revision, setup.dtype, setup.block_size, model.num_layers, model.num_kv_heads, model.head_dim, setup.size
    )
    pool = borrow(bytes.fromhex(setup.pool))
    pipe.send(Kind.LOADED)
    _next(pipe, Kind.JOIN)
    runner = create_shard_runner(
        model, weights, layout, pool, setup.num_blocks, shard, setup.store,
        compiled=setup.compiled, num_threads=setup.threads, max_running=setup.max_running,
        returns_early=setup.returns_early,
    )  # fmt: skip
    runner.warm_up()
    pipe.send(Kind.READY)
    return runner


def _follow(pipe: Pipe, runner: ShardRunner) -> None:
    """Until there are no more steps.  They may be far apart; ``end_with`` sees when none will come."""
    while True:
        kind, payload = pipe.receive()
        if kind is Kind.STOP:
            return
        if kind is not Kind.STEP:
            raise FrameError(f"{kind.name} instead of a step")
        runner.follow(unpack_step(payload))


def _next(pipe: Pipe, kind: Kind) -> bytes:
    found, payload = pipe.receive()
    if found is Kind.STOP:
        raise EOFError
    if found is not kind:
        raise FrameError(f"{found.name} instead of {kind.name}")
    return payload


if __name__ == "__main__":
    sys.exit(main())
