"""The messages and the service of the Open Inference Protocol over gRPC, as far as they are spoken.

Ray Serve imports `add_to_server` in processes of its own: knows gRPC and nothing else of ours. The
field numbers are the protocol's; messages have no names on the wire, so that a map is a list of
entries here, and no compiler has to be run.
"""

from typing import Any, Final

import grpc
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

SERVICE: Final = "inference.GRPCInferenceService"
METHODS: Final = (
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
    "ModelReady",
    "ModelMetadata",
    "ModelInfer",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)
"""Each with a message `<name>Request` and a message `<name>Response`."""

_CHOICE = "Parameter"
"""The message of whose fields one is set."""

_FIELDS: Final[dict[str, str]] = {
    "Parameter": "1 bool bool_param, 2 int64 int64_param, 3 string string_param, "
    "4 double double_param, 5 uint64 uint64_param",
    "Entry": "1 string key, 2 Parameter value",
    "Contents": "6 float[] fp32_contents, 8 bytes[] bytes_contents",
    "Tensor": "1 string name, 2 string datatype, 3 int64[] shape, 4 Entry[] parameters, "
    "5 Contents contents",
    "Wish": "1 string name, 2 Entry[] parameters",
    "TensorMetadata": "1 string name, 2 string datatype, 3 int64[] shape",
    "Index": "1 string name, 2 string version, 3 string state, 4 string reason",
    "ServerLiveRequest": "",
    "ServerLiveResponse": "1 bool live",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "1 bool ready",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "1 string name, 2 string version, 3 string[] extensions",
    "ModelReadyRequest": "1 string name, 2 string version",
    "ModelReadyResponse": "1 bool ready",
    "ModelMetadataRequest": "1 string name, 2 string version",
    "ModelMetadataResponse": "1 string name, 2 string[] versions, 3 string platform, "
    "4 TensorMetadata[] inputs, 5 TensorMetadata[] outputs",
    "ModelInferRequest": "1 string model_name, 2 string model_version, 3 string id, "
    "4 Entry[] parameters, 5 Tensor[] inputs, 6 Wish[] outputs, 7 bytes[] raw_input_contents",
    "ModelInferResponse": "1 string model_name, 2 string model_version, 3 string id, "
    "4 Entry[] parameters, 5 Tensor[] outputs, 6 bytes[] raw_output_contents",
    "RepositoryIndexRequest": "1 string repository_name, 2 bool ready",
    "RepositoryIndexResponse": "1 Index[] models",
    "RepositoryModelLoadRequest": "1 string repository_name, 2 string model_name, "
    "3 Entry[] parameters",
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": "1 string repository_name, 2 string model_name, "
    "3 Entry[] parameters",
    "RepositoryModelUnloadResponse": "",
}


def _described(name: str, fields: str) -> DescriptorProto:
    """A message from its line above."""
    message = DescriptorProto(name=name)
    if name == _CHOICE:
        message.oneof_decl.add(name="choice")
    for text in filter(None, fields.split(", ")):
        number, kind, field_name = text.split(" ")
        field = message.field.add(name=field_name, number=int(number))
        repeated = kind.endswith("[]")
        field.label = (
            FieldDescriptorProto.LABEL_REPEATED if repeated else FieldDescriptorProto.LABEL_OPTIONAL
        )
        kind = kind.removesuffix("[]")
        if kind in _FIELDS:
            field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".inference.{kind}"
        else:
            field.type = getattr(FieldDescriptorProto, f"TYPE_{kind.upper()}")
        if name == _CHOICE:
            field.oneof_index = 0
    return message


def _classes() -> dict[str, Any]:
    """A class for each message, in a pool of their own: other packages may describe them, too."""
    pool = DescriptorPool()
    file = FileDescriptorProto(name="inference.proto", package="inference", syntax="proto3")
    file.message_type.extend(_described(name, fields) for name, fields in _FIELDS.items())
    pool.Add(file)
    return {
        name: GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}")) for name in _FIELDS
    }


MESSAGES: Final = _classes()
"""The class of each message by its name."""


def add_to_server(servicer: Any, server: Any) -> None:
    """Register the service, as code that a compiler makes would."""
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name),
            request_deserializer=MESSAGES[f"{name}Request"].FromString,
            response_serializer=MESSAGES[f"{name}Response"].SerializeToString,
        )
        for name in METHODS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
