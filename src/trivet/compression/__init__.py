"""How a model is made small, and what it honestly costs: bytes, parameters, FLOPs, measured latency."""
