# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine with CAPO: where hidden states, logits and the loss meet the filter."""
