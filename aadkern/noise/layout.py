"""The random numbers of ``noised_views``: where each comes from, and the constants that every backend computes it with.

Element e of sample b (row-major over frames, channels, rows, columns) takes word e % 4 of

    Philox4x32-10(key = (low, high word of the sample's seed), counter = (low, high word of e // 4, sample, stream))

with stream 0 for eps and 1 for delta; ``sample`` is first_sample + b under one seed, 0 under a seed per sample. Words (0, 1) and
(2, 3) become normals by Box and Muller's transform: sqrt(-2 ln u) (cos a, sin a), u from the first word of the two, a from the
second.

All arithmetic after the integers is float32 addition, multiplication and square root in the order that ``reference`` states. These
are exactly rounded on every device, so results agree to the last bit wherever no multiplication is fused with an addition; a
library's logarithm and cosine differ between devices in their last bits. Philox: Salmon and others, "Parallel random numbers: as
easy as 1, 2, 3" (2011).
"""

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
EPS_STREAM, DELTA_STREAM = 0, 1

# ln(1 + f) = f - f^2 / 2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1]; sine and cosine on [-pi/4, pi/4]. Minimax coefficients in
# float32, highest power first; errors measured in tests/noise/test_noise.py.
LOG: tuple[float, ...] = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1)
LOG += (-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
LN_2 = (0.693359375, -2.12194440e-4)  # its high part times any exponent is exact
SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
QUARTER_TURN = 1.5707963267948966 / 2**30  # radians per unit of an angle word's remainder
SQRT_HALF_BITS, ONE_BITS, MANTISSA_BITS = 0x3F3504F3, 0x3F800000, 23
