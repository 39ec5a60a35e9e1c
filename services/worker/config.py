"""What a prefill or a decode worker is told at start."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from kvferry.errors import InvalidRequestError
from services.engine.kernels.cache import default_folder
from services.runtime.config import option
from services.runtime.cpus import Cpus, parse_cpus, require_allowed
from services.runtime.logs import LogLevel
from services.runtime.tls import TlsOptions
from services.worker.labels import parse_labels
from services.worker.share import Share

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


# Most tokens of a step where nothing is said.  A GPU takes many before its sums take longer than reading the weights, which
# each step does once; a CPU few.
CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 256, 2048
# Of a chunk, one of a step in which others decode, on CPUs where nothing is said: one part in.
MIXED_SHARE = 4


class Kernels(Enum):
    TORCH = "torch"
    COMPILED = "compiled"


class Speculate(Enum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class WorkerConfig(TlsOptions):
    """A worker: the model, a KV pool that other workers can reach, and a gRPC server that says who may write into it."""

    listen: str = option("127.0.0.1:0", help="host:port of the gRPC server; port 0 picks a free one")
    directory: tuple[str, ...] = option(
        ("127.0.0.1:8472",), help="host:port of the cache directory, or of several that share a store"
    )
    worker_id: str = option("", help="name that stays the same across restarts (default: role and address)")
    label: tuple[str, ...] = option(
        (), help="where this worker runs, such as zone=a or rack=12, repeated; host is its name unless it is given"
    )
    model: str = option(
        "smollm2-135m-instruct",
        help="a .gguf file, a Hugging Face directory or id, or a name that ships with a package",
    )
    dtype: str = option(
        "auto",
        help="type of weights and KV: float32, bfloat16, float16, int8 (weights alone; KV is bfloat16), or auto: int8 on "
        "CPUs with the compiled kernels, float32 without, bfloat16 on a GPU",
    )
    device: str = option(
        "cpu",
        help="what computes and holds the KV pool: cpu, cuda, cuda:N, or auto: a GPU where there is one",
    )
    kernels: Kernels = option(
        Kernels.COMPILED,
        help="what computes: compiled, which on a GPU are FlashInfer's, or plain torch, slower and without int8",
    )
    speculate: Speculate = option(
        Speculate.OFF,
        help="guess tokens from the text so far and verify several a step, where a request does not say: auto is on with "
        "the compiled kernels of CPUs, whose answers it does not change; elsewhere sums and so now and then a token depend "
        "on how many are computed at once",
    )
    tp: int = option(
        1,
        help="ranks that share this worker's model and pool (tensor parallelism): GPUs, from the one that --device names "
        "on, or on CPU processes, which compute with plain torch",
        minimum=1,
    )
    threads: int = option(1, help="CPU threads for the model, on each rank", minimum=1)
    cpus: str = option(
        "", help="processors for those threads alone, such as 0-3,6; the rest of the process keeps to the others"
    )
    weights_cache: str = option(
        "auto", help="folder that keeps packed weights for the next start: auto is ~/.cache/kvferry/weights; or none"
    )
    peak_tflops: float = option(
        0.0,
        help="TFLOP/s that this worker's processors or GPUs do at most, of which its utilization (MFU) is a share; 0 "
        "measures it at start, on CPUs and one rank only",
        minimum=0,
    )
    memory_bandwidth: float = option(
        0.0, help="GB/s that they read from memory at most, for the share of that (MBU); 0: likewise", minimum=0
    )
    kv_memory: str = option("512MiB", help="memory of the KV pool, on all ranks together, such as 512MiB or 4GiB")
    host_kv_memory: str = option(
        "0", help="memory of the host for blocks that the KV pool evicts, which come back by a copy; 0 is off"
    )
    convert_memory: str = option(
        "24MiB", help="memory of a prefill worker for KV on its way to decode workers of another dtype"
    )
    block_size: int = option(16, help="tokens in a KV block", minimum=1)
    chunk_tokens: int = option(
        0,
        help="most tokens computed in one step, and so the size of a prefill chunk; 0: "
        f"{CPU_CHUNK_TOKENS} on CPUs, {GPU_CHUNK_TOKENS} on GPUs",
        minimum=0,
    )
    mixed_chunk_tokens: int = option(
        0,
        help="most prompt tokens computed in a step in which others get their next token, and wait for it that long; 0: a "
        "quarter of --chunk-tokens on CPUs, all of them on GPUs",
        minimum=0,
    )
    max_running: int = option(64, help="most sequences in one step", minimum=1)
    max_waiting: int = option(256, help="most requests queued; more are refused", minimum=1)
    ticket_lifetime_s: float = option(300.0, help="how long a writer may take from ticket to commit", minimum=0.1)
    verify_transfers: str = option(
        "1/16", help="share of the transfers into a decode worker whose blocks are verified: all, none or a fraction"
    )
    pair_quarantine_s: float = option(
        300.0, help="how long a decode worker takes nothing from a writer whose blocks arrived damaged", minimum=0
    )
    pin_lifetime_s: float = option(
        30.0, help="how long another worker may read cached blocks under one pin", minimum=0.1, maximum=600
    )
    lease_ttl_s: float = option(
        6.0, help="how long the directory believes in this worker without hearing from it", minimum=1
    )
    drain_timeout_s: float = option(20.0, help="how long running requests may take to finish after SIGTERM", minimum=0)
    metrics_port: int = option(0, help="port of the Prometheus endpoint; 0 is off", minimum=0, maximum=65535)
    metrics_host: str = option(
        "127.0.0.1", help="host of that endpoint, which is plain HTTP: whoever reaches it reads the counters"
    )
    health_port: int = option(
        0,
        help="port of gRPC health on the same host, in the clear for probes that have no certificate; 0 is off",
        minimum=0,
        maximum=65535,
    )
    log_level: LogLevel = option(LogLevel.INFO, help="least severe lines to log")

    def __post_init__(self) -> None:
        if not self.directory:
            raise ValueError("--directory must name at least one address")
        try:
            Share.parse(self.verify_transfers)
        except ValueError as e:
            raise ValueError(f"--verify-transfers: {e}") from e
        try:
            parse_labels(self.label)
        except ValueError as e:
            raise ValueError(f"--label: {e}") from e
        try:
            cpus = self.compute_cpus
            require_allowed(cpus)
        except ValueError as e:
            raise ValueError(f"--cpus: {e}") from e
        num_threads = self.threads * self.tp
        if 0 < len(cpus) < num_threads:
            raise ValueError(
                f"--cpus {self.cpus} names {len(cpus)} processors for {num_threads} threads; name more, or lower --threads"
            )

    def num_step_tokens(self, *, on_gpu: bool) -> int:
        """At most, in one step."""
        return self.chunk_tokens or (GPU_CHUNK_TOKENS if on_gpu else CPU_CHUNK_TOKENS)

    def num_mixed_tokens(self, *, on_gpu: bool) -> int:
        """Of prompts, at most, in a step in which others decode."""
        return self.mixed_chunk_tokens or max(1, self.num_step_tokens(on_gpu=on_gpu) // (1 if on_gpu else MIXED_SHARE))

    @property
    def compiled(self) -> bool:
        return self.kernels is Kernels.COMPILED

    @property
    def compute_cpus(self) -> Cpus:
        """Empty: wherever the system puts them."""
        return parse_cpus(self.cpus)


def weights_cache_folder(text: str) -> Path | None:
    if text == "none":
        return None
    return default_folder() if text == "auto" else Path(text).expanduser()


def parse_nbytes(text: str) -> int:
    """Bytes of a size such as "512MiB", "4G" or "1048576" (binary units).  Raises InvalidRequestError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise InvalidRequestError(f"{text!r} is not a size; write it like 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
