"""Triton kernels: attention with the stepwise map in the same pass, the map alone, pooled values, the gradient of lse.

Imports go in one direction: a file imports only files from the lines above its own.

    support                                   whether this machine can run Triton; imports no Triton
    descriptors                               checks the wgmma descriptors that ptxas computed; imports no Triton
    integers                                  integer functions of the launchers
    launch                                    launches of compiled kernels with little work on the host
    decorators                                ``@jit`` for helpers, ``@kernel`` for kernels
    configs                                   tile sizes per architecture, dtype and shape
    tiles                                     jit helpers that several kernels share
    variants                                  descriptions of kernels for ahead-of-time compilation
    lse_gradient, value_pooling               kernels that need no scores
    plan_tables                               what depends on a plan alone
    map_forward, map_backward                 the map alone
    attention_forward, attention_backward     the fused kernels, which share the map's second stages

A kernel's file has the maths with shapes as its docstring, then the kernels, then the launcher, then the variants that
:mod:`molsaki_kernels.aot` compiles. Launchers take q, k, v with a contiguous head dimension and any other strides.
"""
