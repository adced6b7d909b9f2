# SPDX-License-Identifier: Apache-2.0
"""The method, in torch alone: support -> optimizer model -> curvature -> trust region, put in order by ``filter``."""
