"""What the documentation says of the routes that change what is served; their bodies, answers."""

from typing import Annotated, Any, Literal

from pydantic import Field

from model_store.audit import AuditEntry
from model_store.manifest import Frozen
from serving.protocols.routes import (
    TASK_IN_PATH,
    VERSION_IN_PATH,
    VERSION_NUMBER,
    RouteText,
    answers,
    extra,
    flag_parameter,
    json_body,
    record,
)
from serving.types import Operation

AUDIT_LIMIT, MAX_AUDIT_LIMIT = 100, 10_000

Number = Annotated[int, Field(ge=1, le=999_999_999)]


class Chosen(Frozen):
    """The body that names a version."""

    version: Number


class CanaryShare(Frozen):
    """The body that gives a version a share of its task's requests."""

    version: Number
    percent: Annotated[float, Field(gt=0, lt=100)]


class Problem(Frozen):
    """Why an operation failed, for programs (`type`) and for people (`message`)."""

    type: str
    message: str


class Change(Frozen):
    """A change of what is served, and how far it is."""

    operation: str
    kind: str = Field(
        description="`register`, `activate`, `rollback`, `deactivate`, `canary`, `shadow`, `delete`"
    )
    task: str
    version: int | None
    digest: str | None
    created: bool = Field(description="Whether a new version came into being.")
    by: str = Field(description="The name of the key that asked for it.")
    started_at: str
    state: Literal["running", "done", "failed"]
    step: str = Field(
        description="What is being done: `verify`, `stage`, `publish`, `serve`, `drain`."
    )
    replicas: int = Field(description="Live replicas.")
    ready: int = Field(description="Those that have done the step.")
    status: str = Field(examples=["ready 3/3"])
    error: Problem | None


class ChangeList(Frozen):
    """The latest changes, oldest first."""

    operations: tuple[Change, ...]


class AuditList(Frozen):
    """Entries of the audit log, newest last."""

    entries: tuple[AuditEntry, ...]


def change_of(operation: Operation) -> Change:
    """An operation as clients see it."""
    failed = operation.state == "failed"
    return Change(
        operation=operation.id,
        kind=operation.kind,
        task=operation.task,
        version=operation.version,
        digest=operation.digest,
        created=operation.created,
        by=operation.by,
        started_at=operation.started_at,
        state=operation.state,
        step=operation.step,
        replicas=operation.replicas,
        ready=operation.ready,
        status=_status(operation),
        error=Problem(type=operation.error_type, message=operation.error) if failed else None,
    )


def _status(operation: Operation) -> str:
    """In words: how many of the replicas are how far."""
    count = f"{operation.ready}/{operation.replicas}"
    match operation.state:
        case "running":
            return f"{operation.step or 'accepted'} {count}"
        case "done":
            return f"ready {count}"
        case "failed":
            return f"failed at {operation.step or 'once'} {count}"


_REGISTER = """\
The body is the artifact file itself (`curl --data-binary @overlay.safetensors`). It is checked
completely, tried on every replica with its golden inputs, kept in the store and, unless
`activate=false`, made the task's active version. When the answer comes, every live replica answers
with it. Sending the same file again makes no new version and answers 200 instead of 201.
"""
_CANARY = """\
This version answers `percent` of the task's requests. The request id decides: the same
`x-request-id` gets the same version.
"""
_SHADOW = """\
This version answers the task's requests, too; its answers are compared and counted, and never
returned.
"""
_DELETE = "Requests under way are answered first. Numbers of versions are not given out again."
_ACCEPTED = "Accepted; `Location` names the operation to follow."

_CHANGING = (401, 403, 404, 408, 409, 413, 422, 500, 503)
_WAIT = flag_parameter("wait", True, "Answer when the change is done; else as soon as accepted.")
SIGNATURE = b"x-taskbone-signature"
_SIGNATURE: dict[str, Any] = {
    "name": SIGNATURE.decode(),
    "in": "header",
    "description": "The artifact's signature in Base64, where the server asks for one.",
    "schema": {"type": "string", "format": "byte"},
}
_ACTIVATE = flag_parameter("activate", True, "Make it the version that answers.")
_OPERATION_IN_PATH: dict[str, Any] = {
    "name": "operation",
    "in": "path",
    "required": True,
    "description": "The id of an operation.",
    "schema": {"type": "string"},
}
_LIMIT = {
    "name": "limit",
    "in": "query",
    "description": f"How many at most; {MAX_AUDIT_LIMIT} is the most.",
    "schema": {**VERSION_NUMBER, "default": AUDIT_LIMIT},
}
_LOCATION = {"Location": {"description": "The operation.", "schema": {"type": "string"}}}
_FILE = {
    "required": True,
    "description": "The artifact, a `.safetensors` file.",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}
_VERSION = {**VERSION_NUMBER, "description": "A version of the task."}
_PERCENT = {
    "type": "number",
    "minimum": 0,
    "exclusiveMinimum": True,
    "maximum": 100,
    "exclusiveMaximum": True,
}
_CHOSEN = json_body(record(("version",), version=_VERSION), {"a version": {"version": 3}})
_SHARE = json_body(
    record(("version", "percent"), version=_VERSION, percent=_PERCENT),
    {"a tenth": {"version": 3, "percent": 10}},
)


def _change(
    method: str,
    path: str,
    summary: str,
    description: str = "",
    *parameters: dict[str, Any],
    body: dict[str, Any] | None = None,
) -> RouteText:
    """A route that changes a task."""
    documented = answers(200, Change, "Done on every live replica.", *_CHANGING)
    documented[202] = {"model": Change, "description": _ACCEPTED, "headers": _LOCATION}
    told = extra(TASK_IN_PATH, *parameters, _WAIT, body=body)
    return RouteText(method, path, "lifecycle", summary, documented, description, told)


REGISTER = _change(
    "POST",
    "/v1/tasks/{task}/versions",
    "Register a version",
    _REGISTER,
    _ACTIVATE,
    _SIGNATURE,
    body=_FILE,
)
REGISTER.answers[200]["description"] = "This very file was registered already."
REGISTER.answers[201] = {"model": Change, "description": "New, and on every live replica."}
ACTIVATE = _change(
    "POST",
    "/v1/tasks/{task}/activate",
    "Make a version the active one",
    "Any published version.",
    body=_CHOSEN,
)
ROLL_BACK = _change(
    "POST",
    "/v1/tasks/{task}/rollback",
    "Go back to the version before",
    "The version that was active before the present one; again: the one before that.",
)
DEACTIVATE = _change(
    "POST",
    "/v1/tasks/{task}/deactivate",
    "Have a task answer no more",
    "Its versions stay. Requests under way are answered first; `rollback` brings it back.",
)
SET_CANARY = _change(
    "PUT", "/v1/tasks/{task}/canary", "Try a version on a share", _CANARY, body=_SHARE
)
CLEAR_CANARY = _change("DELETE", "/v1/tasks/{task}/canary", "End the trial")
SET_SHADOW = _change(
    "PUT", "/v1/tasks/{task}/shadow", "Compare a version unseen", _SHADOW, body=_CHOSEN
)
CLEAR_SHADOW = _change("DELETE", "/v1/tasks/{task}/shadow", "End the comparison")
DELETE_VERSION = _change(
    "DELETE",
    "/v1/tasks/{task}/versions/{version}",
    "Delete a version",
    _DELETE + " The active version is not deleted.",
    VERSION_IN_PATH,
)
DELETE_TASK = _change("DELETE", "/v1/tasks/{task}", "Delete a task and all its versions", _DELETE)
OPERATION = RouteText(
    "GET",
    "/v1/operations/{operation}",
    "lifecycle",
    "Follow a change",
    answers(200, Change, "How far it is.", 401, 403, 404, 422, 500),
    extra=extra(_OPERATION_IN_PATH),
)
OPERATIONS = RouteText(
    "GET",
    "/v1/operations",
    "lifecycle",
    "List the latest changes",
    answers(200, ChangeList, "Those that the key may see.", 401, 403, 422, 500),
)
AUDIT = RouteText(
    "GET",
    "/v1/audit",
    "lifecycle",
    "Read the audit log",
    answers(200, AuditList, "The latest entries, newest last.", 401, 403, 422, 500, 503),
    "Who changed what, when, and with what result; of the tasks that the key is for.",
    extra(_LIMIT),
)
