"""The cost model of this machine, from steps that the real engine takes: behind ``kvferry calibrate``."""
