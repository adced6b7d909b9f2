# SPDX-License-Identifier: Apache-2.0
"""``capo-verl doctor --gpu``: what one GPU of 24 GB can tell about CAPO in ten minutes.

``parts``     the parts, their time, what is refused; each runs in a process of its own
``kernels``   every kernel against float64, its outputs filled with NaN before
``waits``     does the host wait for the device in evaluate or step?
``speed``     the filter at the sizes of a 7B model: the benchmark's targets, its share
``layer``     the time of that update, from one layer of the model
``training``  verl's Megatron engine in bfloat16: CAPO's steps against float64, the KL budget's
              share

``--device cpu`` rehearses it: small sizes, no figure of a GPU.
"""
