from kvpool.rpc.v1 import types_pb2 as _types_pb2
from kvpool.rpc.v1 import master_pb2 as _master_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("version", "master_epoch", "uptime_s", "blocks", "leases", "leased_blocks", "nodes_live", "nodes_known", "capacity_bytes", "used_bytes", "warming", "counters", "settings")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MASTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    LEASED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NODES_LIVE_FIELD_NUMBER: _ClassVar[int]
    NODES_KNOWN_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WARMING_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    version: str
    master_epoch: int
    uptime_s: float
    blocks: int
    leases: int
    leased_blocks: int
    nodes_live: int
    nodes_known: int
    capacity_bytes: int
    used_bytes: int
    warming: bool
    counters: _containers.ScalarMap[str, int]
    settings: _containers.ScalarMap[str, str]
    def __init__(self, version: _Optional[str] = ..., master_epoch: _Optional[int] = ..., uptime_s: _Optional[float] = ..., blocks: _Optional[int] = ..., leases: _Optional[int] = ..., leased_blocks: _Optional[int] = ..., nodes_live: _Optional[int] = ..., nodes_known: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., warming: bool = ..., counters: _Optional[_Mapping[str, int]] = ..., settings: _Optional[_Mapping[str, str]] = ...) -> None: ...

class NodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("address", "state", "capacity_bytes", "used_bytes", "blocks", "last_seen_s", "epoch")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_S_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    address: _types_pb2.NodeAddress
    state: str
    capacity_bytes: int
    used_bytes: int
    blocks: int
    last_seen_s: float
    epoch: int
    def __init__(self, address: _Optional[_Union[_types_pb2.NodeAddress, _Mapping]] = ..., state: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., last_seen_s: _Optional[float] = ..., epoch: _Optional[int] = ...) -> None: ...

class NodesResponse(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeStatus]
    def __init__(self, nodes: _Optional[_Iterable[_Union[NodeStatus, _Mapping]]] = ...) -> None: ...

class NamespacesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NamespaceStatus(_message.Message):
    __slots__ = ("digest", "descriptor", "blocks", "bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    descriptor: _types_pb2.NamespaceDescriptor
    blocks: int
    bytes: int
    def __init__(self, digest: _Optional[bytes] = ..., descriptor: _Optional[_Union[_types_pb2.NamespaceDescriptor, _Mapping]] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class NamespacesResponse(_message.Message):
    __slots__ = ("namespaces",)
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStatus]
    def __init__(self, namespaces: _Optional[_Iterable[_Union[NamespaceStatus, _Mapping]]] = ...) -> None: ...

class EvictBlocksRequest(_message.Message):
    __slots__ = ("namespace", "keys", "coldest_bytes")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    COLDEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: bytes
    coldest_bytes: int
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., coldest_bytes: _Optional[int] = ...) -> None: ...

class EvictBlocksResponse(_message.Message):
    __slots__ = ("blocks", "bytes")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...
