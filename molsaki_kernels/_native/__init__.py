"""The stepwise map on a CPU in C, compiled by the machine's C compiler on first use."""
