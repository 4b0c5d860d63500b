"""Flow matching: the noise schedule, the stochastic transition and guidance. Pure functions."""
