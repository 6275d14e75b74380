from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OK: _ClassVar[ErrorCode]
    INVALID_ARGUMENT: _ClassVar[ErrorCode]
    UNKNOWN_NAMESPACE: _ClassVar[ErrorCode]
    TOO_LARGE: _ClassVar[ErrorCode]
    ALL_PINNED: _ClassVar[ErrorCode]
    UNKNOWN_ID: _ClassVar[ErrorCode]
    OVERLOADED: _ClassVar[ErrorCode]
    REFUSED: _ClassVar[ErrorCode]
    INTERNAL: _ClassVar[ErrorCode]
OK: ErrorCode
INVALID_ARGUMENT: ErrorCode
UNKNOWN_NAMESPACE: ErrorCode
TOO_LARGE: ErrorCode
ALL_PINNED: ErrorCode
UNKNOWN_ID: ErrorCode
OVERLOADED: ErrorCode
REFUSED: ErrorCode
INTERNAL: ErrorCode

class NamespaceDescriptor(_message.Message):
    __slots__ = ("model", "revision", "dtype", "kv_quant", "block_tokens", "layers", "kv_heads", "head_size", "layout", "isa", "kv_group", "layer_groups", "head_groups", "hash_algorithm", "hash_fingerprint", "format_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_QUANT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ISA_FIELD_NUMBER: _ClassVar[int]
    KV_GROUP_FIELD_NUMBER: _ClassVar[int]
    LAYER_GROUPS_FIELD_NUMBER: _ClassVar[int]
    HEAD_GROUPS_FIELD_NUMBER: _ClassVar[int]
    HASH_ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    HASH_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    dtype: str
    kv_quant: str
    block_tokens: int
    layers: int
    kv_heads: int
    head_size: int
    layout: str
    isa: str
    kv_group: str
    layer_groups: int
    head_groups: int
    hash_algorithm: str
    hash_fingerprint: str
    format_version: int
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., dtype: _Optional[str] = ..., kv_quant: _Optional[str] = ..., block_tokens: _Optional[int] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_size: _Optional[int] = ..., layout: _Optional[str] = ..., isa: _Optional[str] = ..., kv_group: _Optional[str] = ..., layer_groups: _Optional[int] = ..., head_groups: _Optional[int] = ..., hash_algorithm: _Optional[str] = ..., hash_fingerprint: _Optional[str] = ..., format_version: _Optional[int] = ...) -> None: ...

class BlockRun(_message.Message):
    __slots__ = ("namespace", "shards", "shard_bytes", "keys", "commanded", "backend")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    SHARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    COMMANDED_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    shards: bytes
    shard_bytes: int
    keys: bytes
    commanded: bool
    backend: bytes
    def __init__(self, namespace: _Optional[bytes] = ..., shards: _Optional[bytes] = ..., shard_bytes: _Optional[int] = ..., keys: _Optional[bytes] = ..., commanded: bool = ..., backend: _Optional[bytes] = ...) -> None: ...

class NodeAddress(_message.Message):
    __slots__ = ("node_id", "host", "port", "socket_path", "boot_id")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    SOCKET_PATH_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    host: str
    port: int
    socket_path: str
    boot_id: str
    def __init__(self, node_id: _Optional[str] = ..., host: _Optional[str] = ..., port: _Optional[int] = ..., socket_path: _Optional[str] = ..., boot_id: _Optional[str] = ...) -> None: ...

class Backend(_message.Message):
    __slots__ = ("id", "url", "capacity_bytes", "state", "reason")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UP: _ClassVar[Backend.State]
        DOWN: _ClassVar[Backend.State]
        READ_ONLY: _ClassVar[Backend.State]
    UP: Backend.State
    DOWN: Backend.State
    READ_ONLY: Backend.State
    ID_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    url: str
    capacity_bytes: int
    state: Backend.State
    reason: str
    def __init__(self, id: _Optional[bytes] = ..., url: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., state: _Optional[_Union[Backend.State, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "field", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: ErrorCode
    field: str
    message: str
    def __init__(self, code: _Optional[_Union[ErrorCode, str]] = ..., field: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
