"""One file an engine, each with the same small shape; engines never import each other.

``NAME``, ``available() -> None | reason``, ``why_not(call) -> None | reason``,
``forward(q, k, v, sinks, cu_seqlens, options) -> out, lse`` and
``backward(dout, dlse, q, k, v, out, lse, sinks, cu_seqlens, options) -> dq, dk, dv``.
"""
