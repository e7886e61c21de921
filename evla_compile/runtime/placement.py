"""Find operators that ONNX Runtime runs on the CPU although another provider was asked for; no torch.

ONNX Runtime silently assigns operators that a provider does not take to the CPU: results are right, but the policy is
many times slower, since values are copied to the CPU and back.
"""

import logging
from pathlib import Path
from typing import Any

from evla_compile.errors import EvlaError
from evla_compile.runtime.providers import PROVIDERS, OnnxProvider

logger = logging.getLogger(__name__)

_REFUSAL = "fallback to CPU EP has been explicitly disabled"
_NAMED = 5
_ADVICE = (
    "export with opset=20, whose operators more providers know, take another provider, or allow it: allow_cpu=True, or"
    " evla run --allow-cpu"
)


def prepare_placement(options: Any, onnxruntime: Any, *, allow_cpu: bool) -> None:
    """Set the options of a session for which operators on the CPU are an error, or a warning with `allow_cpu`.

    Newer versions of ONNX Runtime list the provider of each operator; older ones can only refuse to open the session.
    """
    if _lists_operators(onnxruntime):
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    elif not allow_cpu:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")


def check_placement(session: Any, model: Path, provider: OnnxProvider, onnxruntime: Any, *, allow_cpu: bool) -> None:
    """Refuse operators on the CPU, or name them in a warning where they are allowed.

    Raises:
        EvlaError: there are some, and `allow_cpu` is false.
    """
    if not _lists_operators(onnxruntime):
        if allow_cpu:
            logger.warning(
                "provider=%r: ONNX Runtime %s does not say which operators of %s it runs on the CPU; a newer one does",
                provider,
                onnxruntime.__version__,
                model,
            )
        return
    assigned = session.get_provider_graph_assignment_info()
    operators = [(part.ep_name, node) for part in assigned for node in part.get_nodes()]
    on_cpu = [f"{node.name} ({node.op_type})" for name, node in operators if name == PROVIDERS["cpu"].name]
    if not on_cpu:
        return
    found = f"{len(on_cpu)} of {len(operators)} operators of {model} on the CPU: {', '.join(on_cpu[:_NAMED])}"
    if len(on_cpu) > _NAMED:
        found += f" and {len(on_cpu) - _NAMED} more"
    if not allow_cpu:
        raise EvlaError(f"provider={provider!r}: ONNX Runtime {onnxruntime.__version__} puts {found}; {_ADVICE}")
    logger.warning("provider=%r: ONNX Runtime %s puts %s", provider, onnxruntime.__version__, found)


def is_refusal(error: Exception) -> bool:
    """Tell whether ONNX Runtime raised an error because operators would run on the CPU."""
    return _REFUSAL in str(error)


def refusal(model: Path, provider: OnnxProvider, onnxruntime: Any) -> str:
    """Return the message for a version that refuses operators without naming them."""
    return (
        f"provider={provider!r}: ONNX Runtime {onnxruntime.__version__} puts operators of {model} on the CPU, which a"
        f" newer one would name; {_ADVICE}"
    )


def _lists_operators(onnxruntime: Any) -> bool:
    return hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")
