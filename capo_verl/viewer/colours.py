# SPDX-License-Identifier: Apache-2.0
"""Colours of every figure, by Okabe and Ito.

They differ for every common form of colour blindness, and in print by lightness.
"""

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
