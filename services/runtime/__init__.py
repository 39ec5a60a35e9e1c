"""What every service has in common: configuration, logs, traces, metrics, the gRPC server and its channels, the proof
that a process has ended, and a worker's membership in the cluster."""
