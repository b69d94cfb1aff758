"""Messages of two published standards, declared here so that the client needs no package for them.

`grpc.health.v1` (gRPC health checking protocol) and the parts of `google.rpc` that ride in the trailing
metadata `grpc-status-details-bin` (richer error model). They live in a descriptor pool of their own: a program
that also imports the published packages sees no clash. Field numbers are those of the published .proto files.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2, message_factory

Field = descriptor_pb2.FieldDescriptorProto

# message -> field -> (number, type, message type if any, repeated)
SHAPES: dict[str, dict[str, tuple[int, Field.Type.ValueType, str, bool]]] = {
    "Status": {
        "code": (1, Field.TYPE_INT32, "", False),
        "message": (2, Field.TYPE_STRING, "", False),
        "details": (3, Field.TYPE_MESSAGE, ".google.protobuf.Any", True),
    },
    "RetryInfo": {"retry_delay": (1, Field.TYPE_MESSAGE, ".google.protobuf.Duration", False)},
    "ErrorInfo": {"reason": (1, Field.TYPE_STRING, "", False), "domain": (2, Field.TYPE_STRING, "", False)},
    "FieldViolation": {
        "field": (1, Field.TYPE_STRING, "", False),
        "description": (2, Field.TYPE_STRING, "", False),
    },
    "BadRequest": {"field_violations": (1, Field.TYPE_MESSAGE, ".pdserve.standard.FieldViolation", True)},
    "HealthCheckRequest": {"service": (1, Field.TYPE_STRING, "", False)},
    "HealthCheckResponse": {"status": (1, Field.TYPE_INT32, "", False)},
}


def _declare() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    for published in (any_pb2, duration_pb2):
        pool.AddSerializedFile(published.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(
        name="pdserve/standard.proto",
        package="pdserve.standard",
        syntax="proto3",
        dependency=["google/protobuf/any.proto", "google/protobuf/duration.proto"],
    )
    for name, fields in SHAPES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, type_name, repeated) in fields.items():
            label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
            message.field.add(name=field, number=number, type=kind, type_name=type_name or None, label=label)
    pool.AddSerializedFile(file.SerializeToString())
    found = (pool.FindMessageTypeByName(f"pdserve.standard.{name}") for name in SHAPES)
    return {descriptor.name: message_factory.GetMessageClass(descriptor) for descriptor in found}


MESSAGES = _declare()
