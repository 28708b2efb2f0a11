"""Bound propagation: what a network can answer on a whole ball of inputs, from its layers."""
