# SPDX-License-Identifier: Apache-2.0
"""What happens around a run: planning it, checking it, starting it."""
