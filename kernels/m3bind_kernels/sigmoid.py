"""The loss of one pair, log(1 + e^t), and its derivative, to the last bits of float32."""

import triton
import triton.language as tl


@triton.jit
def exp_below_zero(t):
    """e^t for t <= 0. Of t * log2(e) only the fraction is rounded: rounded as a whole it would be
    wrong by 1e-6 at t = -50, in all pairs alike, and with it a nearly separated batch's loss."""
    t = tl.where(t < -110.0, -110.0, t)  # 0 in float32; -inf has no fraction
    whole = (t * 1.4426950408889634 + 12582912.0) - 12582912.0  # the nearest integer: 1.5 * 2^23
    # ln(2) in two parts, of which the first times `whole` is exact.
    rest = (t - whole * 0.693359375) + whole * 2.1219444005469057e-4
    return tl.exp2(whole) * tl.exp2(rest * 1.4426950408889634)


@triton.jit
def log_one_plus(e):
    """log(1 + e) for 0 <= e <= 1: a polynomial, whose relative error is 5e-9 before rounding."""
    p = e * -0.0032440212089568377 + 0.01985144428908825
    p = p * e - 0.056959498673677444
    p = p * e + 0.10603651404380798
    p = p * e - 0.15305590629577637
    p = p * e + 0.1967593878507614
    p = p * e - 0.24954134225845337
    p = p * e + 0.3332996368408203
    p = p * e - 0.4999990165233612
    p = p * e + 1.0
    return p * e


@triton.jit
def softplus_of(t, power):
    """log(1 + e^t), where power = e^-|t|."""
    return tl.where(t > 0.0, t, 0.0) + log_one_plus(power)


@triton.jit
def sigmoid_of(t, power):
    """1 / (1 + e^-t), where power = e^-|t|."""
    return tl.where(t < 0.0, power, 1.0) / (1.0 + power)
