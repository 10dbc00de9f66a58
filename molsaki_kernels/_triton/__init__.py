"""The project's own kernels: fused flash attention with the stepwise map, the map alone, and pooled values."""
