"""Imported by a server that forks peers: UCX is loaded once, not by each of them."""

from transport import ucp

ucp._load()
