# SPDX-License-Identifier: Apache-2.0
"""Measurements of the filter, for the benchmark and for ``capo-verl doctor --gpu``.

``workload``    presets: sizes, dtypes, how many tokens
``batch``       random logits with a realistic support, hidden states, actions
``naive``       the method as published, with tensors ``[tokens, k, H]``, in two forms
``oracle``      the method as the formulas are, float64, one token at a time
``contenders``  the formulations that are measured, under one interface
``agreement``   before anything is timed, all contenders must give the same numbers
``memory``      exact peak and held memory of a call
``clock``       seconds of each stage
``machine``     the machine of the measurements, its copy bandwidth, its free memory
``provenance``  the source tree and the processor
``results``     the numbers and what follows from them; JSON
``targets``     the targets of the filter
``runner``      the order of all this
"""
