"""kvferry serve: a cluster on this machine, until Ctrl-C."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from kvferry.bench import slo
from kvferry.cli import options, output
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.control import Control
from kvferry.cli.crew import Crew
from kvferry.cli.interrupts import Interrupts
from kvferry.cli.members import DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT, DEFAULT_MODEL, Autoscale, ClusterConfig
from kvferry.cli.ports import LOOPBACK
from kvferry.cli.progress import StartProgress
from kvferry.cli.service_tls import CertificateFolder
from kvferry.client import DEFAULT_ADDRESS, Client


def serve(
    model: options.ServedModel = DEFAULT_MODEL,
    dtype: options.Dtype = None,
    device: options.Devices = None,
    prefill_dtype: options.RoleDtype = None,
    decode_dtype: options.RoleDtype = None,
    prefill_block_size: options.RoleBlockSize = None,
    decode_block_size: options.RoleBlockSize = None,
    prefill_tp: options.RoleTp = 1,
    decode_tp: options.RoleTp = 1,
    prefill: options.NumPrefill = 1,
    decode: options.NumDecode = 1,
    host: Annotated[str, typer.Option(help="Where the gateway listens.", rich_help_panel="Cluster")] = LOOPBACK,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="The gateway's gRPC; 0 picks one.", rich_help_panel="Cluster")
    ] = DEFAULT_GRPC_PORT,
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="The gateway's HTTP; 0 picks one.", rich_help_panel="Cluster")
    ] = DEFAULT_HTTP_PORT,
    gateway_processes: Annotated[
        int,
        typer.Option(min=1, max=256, help="Processes of the gateway that share its ports.", rich_help_panel="Cluster"),
    ] = 1,
    threads: options.Threads = None,
    pin: options.Pin = None,
    kv_memory: options.KvMemory = None,
    host_kv_memory: options.HostKvMemory = None,
    speculate: options.WorkersSpeculate = None,
    api_keys: options.ApiKeys = None,
    tls: options.ServeTls = None,
    insecure: options.Insecure = False,
    autoscale: Annotated[
        bool,
        typer.Option(
            "--autoscale", help="Let a planner change workers' roles, and their number.", rich_help_panel="Planner"
        ),
    ] = False,
    min_workers: Annotated[
        int, typer.Option(min=2, help="Workers of both roles that stay.", rich_help_panel="Planner")
    ] = 2,
    max_workers: Annotated[
        int | None,
        typer.Option(
            help="Workers at most; as many as at first by default.", show_default=False, rich_help_panel="Planner"
        ),
    ] = None,
    objectives: Annotated[
        str, typer.Option("--slo", help="What is in time for clients: ttft and itl.", rich_help_panel="Planner")
    ] = "ttft=2s,itl=50ms",
    log_dir: options.LogDir = None,
    log_level: options.Level = options.LogLevel.INFO,
) -> None:
    """Run a whole cluster on this machine until Ctrl-C.

    Starts a directory, prefill workers, decode workers and a gateway, each as a process of its own, waits until they
    are healthy, and starts again whichever dies. Needs a clone of the repository.

    \b
    Examples:
      kvferry serve
      kvferry serve --prefill 2 --decode 2 --kv-memory 1GiB
      kvferry serve --autoscale --max-workers 6 --slo ttft=1s,itl=50ms
      kvferry serve --tls certs --host 0.0.0.0
      kvferry serve --model ./model.gguf --dtype bfloat16 --http-port 8000
      kvferry serve --prefill-dtype float32 --decode-dtype bfloat16 --decode-block-size 32
      kvferry serve --device cuda:0 --device cuda:1 --model ./Llama-3.1-8B-Instruct
    """
    if grpc_port == http_port != 0:
        raise typer.BadParameter(f"gRPC and HTTP cannot both have port {grpc_port}", param_hint="--http-port")
    with output.failures():
        bounds = slo.parse(objectives)
    if bounds.ttft is None or bounds.itl is None:
        raise typer.BadParameter("both ttft and itl, such as ttft=2s,itl=50ms", param_hint="--slo")
    if not autoscale and max_workers is not None:
        raise typer.BadParameter("it is for --autoscale", param_hint="--max-workers")
    planner = Autoscale(min_workers, max_workers or prefill + decode, bounds.ttft, bounds.itl) if autoscale else None
    config = ClusterConfig(
        model=model,
        dtype=dtype,
        devices=tuple(device or ()),
        prefill_dtype=prefill_dtype,
        decode_dtype=decode_dtype,
        prefill_block_size=prefill_block_size,
        decode_block_size=decode_block_size,
        prefill_tp=prefill_tp,
        decode_tp=decode_tp,
        num_prefill=prefill,
        num_decode=decode,
        gateway_processes=gateway_processes,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        threads=threads,
        pin=pin,
        kv_memory=kv_memory,
        host_kv_memory=host_kv_memory,
        speculate=None if speculate is None else speculate.value,
        api_keys=api_keys,
        tls=tls,
        insecure=insecure,
        log_level=log_level.value,
        autoscale=planner,
        log_dir=None if log_dir is None else log_dir.resolve(),
    )
    progress = StartProgress()
    is_up = False
    with output.failures():
        cluster = LocalCluster.from_config(config, log_dir=log_dir, on_event=progress.on_event)
        with Interrupts() as interrupts:
            try:
                with progress.show([member.name for member in cluster.members], cluster.doing):
                    cluster.start()
                is_up = True  # before it is announced: whoever waits for the words may stop us as soon as they are out
                with ExitStack() as stack:
                    if cluster.make_worker is not None:
                        stack.enter_context(Control(cluster.log_dir, Crew(cluster, cluster.make_worker).scale))
                    _announce(cluster, config)
                    interrupts.wait()
            except KeyboardInterrupt:
                output.say("\nstopping; Ctrl-C again kills at once")
            finally:
                stop(cluster)
    if not is_up:
        raise typer.Exit(130)


def stop(cluster: LocalCluster) -> None:
    """Stops the cluster cleanly; being interrupted meanwhile kills what is left at once."""
    try:
        cluster.stop()
    except KeyboardInterrupt:
        cluster.kill_now()
        cluster.stop()


def _announce(cluster: LocalCluster, config: ClusterConfig) -> None:
    model, key, with_key = config.model, "", ""
    ca = None if config.tls is None else CertificateFolder(config.tls).ca
    if config.api_keys is None:
        with Client(cluster.grpc_address, tls=options.client_tls(ca)) as client:
            model = client.models()[0].name
    else:
        key = ' -H "authorization: Bearer $KVFERRY_API_KEY"'
        with_key = ", with a key in KVFERRY_API_KEY"
    if ca is not None:
        key += f" --cacert {ca}"
        with_key += f"{' and' if with_key else ', with'} KVFERRY_TLS_CA={ca}"
    address = "" if cluster.grpc_address == DEFAULT_ADDRESS else f" --address {cluster.grpc_address}"
    metrics = "\n".join(
        f"  {'metrics' if first else '':9}{member.metrics_url}  ({member.name})"
        for first, member in zip((True, *(False,) * len(cluster.members)), reversed(cluster.members), strict=False)
    )
    print(
        f"""
kvferry serves {model}
  gRPC     {cluster.grpc_address}
  HTTP     {cluster.http_url}/v1  (OpenAI API)
{metrics}
  logs     {cluster.log_dir}

Try it{with_key}:
  kvferry chat{address}
  kvferry generate "The capital of France is" --temperature 0 --timeline{address}
  kvferry status{address}
  curl {cluster.http_url}/v1/chat/completions -H 'content-type: application/json'{key} \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}], "temperature": 0}}'

Ctrl-C stops everything.""",
        flush=True,
    )
