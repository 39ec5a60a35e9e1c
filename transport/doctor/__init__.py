"""What this host gives the transport, and what to change: ``python -m transport.doctor``, or ``kvferry doctor``.

``host`` and ``ucx`` collect facts, ``trial`` moves blocks between two processes, ``advice`` judges both and is pure.
"""
