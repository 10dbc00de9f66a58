"""The check of wgmma descriptors, on excerpts of compiled kernels."""

from __future__ import annotations

import pytest

from molsaki_kernels._triton.descriptors import wrong_descriptors

# A loop reads a ring of buffers; its descriptors depend on the counter %r9. Then products of constant ones: the base
# is (0x400 + 0xc000) >> 4 = 0xc40, its fields above are 0x40000040 in the loop and 0xc0000010 after it.
PTX = """
\tmov.b32 \t%r1, global_smem;
\tadd.s32 \t%r2, %r1, 49152;
\tbfe.u32 \t%r3, %r2, 4, 14;
\tcvt.u64.u32 \t%rd1, %r3;
\tadd.s64 \t%rd2, %rd1, 4611686293305294848;
\tor.b64 \t%rd3, %rd1, -4611685949707911168;
\tadd.s64 \t%rd4, %rd1, -4611685949707911136;
\tmov.b32 \t%r9, 0;
$L__BB0_1:
\tshl.b32 \t%r4, %r9, 13;
\tadd.s32 \t%r5, %r1, %r4;
\tbfe.u32 \t%r6, %r5, 4, 14;
\tcvt.u64.u32 \t%rd5, %r6;
\tor.b64 \t%rd6, %rd5, 4611686293305294848;
\tadd.s64 \t%rd7, %rd5, 4611686293305294850;
\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r20,%r21}, %rd2, %rd6, 0, 1, 1, 0, 0;
\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r20,%r21}, %rd2, %rd7, %p1, 1, 1, 0, 0;
\tadd.s32 \t%r9, %r9, 1;
\t@%p2 bra \t$L__BB0_1;
\twgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r22,%r23}, {%r24,%r25}, %rd3, 0, 1, 1, 1;
\twgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r22,%r23}, {%r24,%r25}, %rd4, %p1, 1, 1, 1;
"""
SASS = """
S2UR UR9, SR_CgaCtaId
UMOV UR8, 0x400
ULEA UR10, UR9, UR8, 0x18
UIADD3 UR4, UR10, 0xc000, URZ
USHF.R.U32.HI UR4, URZ, 0x4, UR4
USGXT.U32 UR12, UR4, 0xe
UMOV UR13, 0x40000040
MOV R40, UR12
UMOV UR7, 0xffffffff
loop: UIADD3 UR7, UR7, 0x1, URZ
ULEA UR5, UR7, UR10, 0xd
USHF.R.U32.HI UR5, URZ, 0x4, UR5
USGXT.U32 UR14, UR5, 0xe
UMOV UR15, 0x40000040
HGMMA.64x64x16.F32.BF16 R56, gdesc[UR12], RZ, !UPT
UMOV UR16, UR12
UMOV UR17, UR13
UIADD3 UR18, UP0, UR14, 0x2, URZ
UIADD3.X UR19, URZ, 0x40000040, URZ, UP0, !UPT
HGMMA.64x64x16.F32.BF16 R56, gdesc[UR16], R56, gsb0
UIADD3.64 UR22, UR18, 0x4, URZ
@P0 BRA loop
R2UR UR26, R40
UMOV UR27, 0xc0000010
UIADD3 UR22, UP0, UR26, 0x20, URZ
UMOV UR6, URZ
UIADD3.X UR23, UR6, -0x3ffffff0, URZ, UP0, !UPT
HGMMA.64x16x16.F32.BF16 R24, R108, gdesc[UR24].tnspB, RZ, !UPT
HGMMA.64x16x16.F32.BF16 R24, R84, gdesc[UR20].tnspB, R24, gsb0
EXIT
"""


def faults(sass: str, ptx: str = PTX) -> list[str]:
    """With addresses, as cuobjdump prints them."""
    lines = sass.strip().splitlines()
    (loop,) = [16 * i for i, line in enumerate(lines) if line.startswith("loop:")]
    lines = [line.removeprefix("loop: ").replace("loop", f"{loop:#x}") for line in lines]
    dump = [f"        /*{16 * i:04x}*/                   {x} ;   /* 0x0123456789abcdef */" for i, x in enumerate(lines)]
    return wrong_descriptors(ptx, "\n".join(dump))


def test_right_ones():
    assert faults(SASS) == []
    assert faults(SASS, "no wgmma") == []


@pytest.mark.parametrize(
    "right, wrong, message",
    [
        # Triton 3.6's ptxas, seen on an H200: the base is not UR26 but what the loop left in UR22 ...
        ("UP0, UR26, 0x20", "UP0, UR22, 0x20", "B of the product 64x16x16 at 0x1c0: its descriptor is not a constant"),
        # ... or nothing at all.
        ("UP0, UR26, 0x20", "UP0, UR30, 0x20", "its descriptor is built from a register that was never set"),
        ("UP0, UR26, 0x20", "UP0, UR26, 0x40", "is 0xc000001000000c80, expected 0xc000001000000c60"),
        # A carry into the upper half; the carry of another sum.
        ("UIADD3 UR22, UP0, UR26, 0x20", "UMOV UR2, -0x3a0\nUIADD3 UR22, UP0, UR2, 0x1000", "0xc000001100000c60"),
        ("UP0, !UPT\nHGMMA.64x64", "UP1, !UPT\nHGMMA.64x64", "built from a register that was never set"),
        ("MOV R40, UR12", "MOV R41, UR12", "its descriptor is built from a register that was never set"),
        ("UMOV UR13, 0x40000040", "UMOV UR13, 0x40000080", "64x64x16 at 0xe0: its descriptor is 0x400000"),
        ("UP0, UR14, 0x2,", "UP0, UR14, 0x4,", "B of the product 64x64x16 at 0x130: its descriptor does not differ"),
        ("UP0, UR14, 0x2,", "UP0, UR5, 0x2,", "does not differ from the others' as in the PTX"),
        ("HGMMA.64x16x16.F32.BF16 R24, R84,", "HGMMA.64x16x16.F32.BF16 R24,", "is in registers or in shared memory"),
        ("HGMMA.64x16x16.F32.BF16 R24, R108, gdesc[UR24].tnspB, RZ, !UPT\n", "", "4 wgmma in the PTX, 3 in the SASS"),
    ],
)
def test_wrong_ones(right, wrong, message):
    assert SASS.count(right) == 1
    found = faults(SASS.replace(right, wrong))
    assert any(message in line for line in found), found


@pytest.mark.parametrize(
    "one, other",
    [
        ("UIADD3 UR4, UR10, 0xc000, URZ", "UMOV UR3, 0xc000\nUIADD3 UR4, UR10, UR3, URZ"),
        ("MOV R40, UR12", "MOV R40, UR12\nSTL [R1+0x8], R40\nMOV R40, RZ\nLDL R40, [R1+0x8]"),
        ("MOV R40, UR12", "MOV R40, UR12\nLDS.128 R36, [UR10]\nMOV R41, RZ"),
        (  # a swap
            "UIADD3.64 UR22, UR18, 0x4, URZ",
            "\n".join(f"ULOP3.LUT UR{x}, UR18, UR19, URZ, 0x3c, !UPT" for x in (18, 19, 18, 18, 19, 18)),
        ),
        ("UP0, UR26, 0x20", "UP0, UR26, 0x10, URZ\nUIADD3 UR22, UP0, UR22, 0x10"),
    ],
)
def test_other_ways_to_compute_the_same(one, other):
    assert SASS.count(one) == 1
    assert faults(SASS.replace(one, other)) == []
