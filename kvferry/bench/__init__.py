"""Load for a gateway, and what its clients would have felt: behind ``kvferry bench``.  Needs the light client only."""
