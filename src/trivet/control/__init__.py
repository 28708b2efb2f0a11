"""Control: environments that answer an agent's actions, episodes with noisy observations, and attacks on policies."""
