"""Which protocol speaks at which path, and how each tells an error."""

from typing import Any

from serving.protocols.faults import Fault, Shape


def native(fault: Fault) -> tuple[int, dict[str, Any]]:
    """The native routes'."""
    told = {"type": fault.type, "message": fault.message, "request_id": fault.request_id}
    return fault.code, {"error": told}


def oip(fault: Fault) -> tuple[int, dict[str, Any]]:
    """The Open Inference Protocol's."""
    return fault.code, {"error": fault.message}


_OPENAI_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


def openai(fault: Fault) -> tuple[int, dict[str, Any]]:
    """OpenAI's, with vLLM's numbers: whatever is wrong with a body is 400."""
    code = 400 if fault.code in (413, 422) else fault.code
    kind = _OPENAI_TYPES.get(code, "InternalServerError" if code >= 500 else "BadRequestError")
    return code, {"error": {"message": fault.message, "type": kind, "param": None, "code": code}}


_TEI_TYPES = {
    "not_ready": (503, "Unhealthy"),
    "overloaded": (429, "Overloaded"),
    "rate_limited": (429, "Overloaded"),
    "invalid_input": (422, "Tokenizer"),
}


def tei(fault: Fault) -> tuple[int, dict[str, Any]]:
    """Text Embeddings Inference's: too much at once is 429, a failed forward 424."""
    code, kind = _TEI_TYPES.get(fault.type, (fault.code, "Validation"))
    if fault.code == 500:
        code, kind = 424, "Backend"
    return code, {"error": fault.message, "error_type": kind}


def shape_of(path: str) -> Shape:
    """How errors are told at a path."""
    if path == "/v2" or path.startswith("/v2/"):
        return oip
    if path in ("/classify", "/v1/models") or path.startswith("/v1/models/"):
        return openai
    if path in ("/predict", "/info"):
        return tei
    return native
