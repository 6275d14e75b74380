from kvpool.rpc.v1 import types_pb2 as _types_pb2
from kvpool.rpc.v1 import master_pb2 as _master_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("version", "master_epoch", "uptime_s", "blocks", "leases", "leased_blocks", "nodes_live", "nodes_known", "capacity_bytes", "used_bytes", "warming", "counters", "settings", "warnings", "removals", "removals_max", "engines", "engine_blocks", "backends", "transfers", "transfer_blocks", "engines_announced")
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
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    REMOVALS_FIELD_NUMBER: _ClassVar[int]
    REMOVALS_MAX_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ENGINES_ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
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
    warnings: _containers.RepeatedScalarFieldContainer[str]
    removals: int
    removals_max: int
    engines: int
    engine_blocks: int
    backends: _containers.RepeatedCompositeFieldContainer[BackendStatus]
    transfers: int
    transfer_blocks: int
    engines_announced: int
    def __init__(self, version: _Optional[str] = ..., master_epoch: _Optional[int] = ..., uptime_s: _Optional[float] = ..., blocks: _Optional[int] = ..., leases: _Optional[int] = ..., leased_blocks: _Optional[int] = ..., nodes_live: _Optional[int] = ..., nodes_known: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., warming: bool = ..., counters: _Optional[_Mapping[str, int]] = ..., settings: _Optional[_Mapping[str, str]] = ..., warnings: _Optional[_Iterable[str]] = ..., removals: _Optional[int] = ..., removals_max: _Optional[int] = ..., engines: _Optional[int] = ..., engine_blocks: _Optional[int] = ..., backends: _Optional[_Iterable[_Union[BackendStatus, _Mapping]]] = ..., transfers: _Optional[int] = ..., transfer_blocks: _Optional[int] = ..., engines_announced: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("digest", "descriptor", "blocks", "bytes", "disagrees_with")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    DISAGREES_WITH_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    descriptor: _types_pb2.NamespaceDescriptor
    blocks: int
    bytes: int
    disagrees_with: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, digest: _Optional[bytes] = ..., descriptor: _Optional[_Union[_types_pb2.NamespaceDescriptor, _Mapping]] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., disagrees_with: _Optional[_Iterable[bytes]] = ...) -> None: ...

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

class ExplainRequest(_message.Message):
    __slots__ = ("namespace", "keys")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: bytes
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ...) -> None: ...

class ExplainedBlock(_message.Message):
    __slots__ = ("verdict", "namespace", "holders", "missing", "leases", "last_use_s", "removals", "other", "differences")
    class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PRESENT: _ClassVar[ExplainedBlock.Verdict]
        OWNER_SUSPECT: _ClassVar[ExplainedBlock.Verdict]
        WARMING: _ClassVar[ExplainedBlock.Verdict]
        NOT_WHOLE: _ClassVar[ExplainedBlock.Verdict]
        BEING_WRITTEN: _ClassVar[ExplainedBlock.Verdict]
        UNREPORTED: _ClassVar[ExplainedBlock.Verdict]
        EVICTED: _ClassVar[ExplainedBlock.Verdict]
        OWNER_LOST: _ClassVar[ExplainedBlock.Verdict]
        NAMESPACE_DIFFERS: _ClassVar[ExplainedBlock.Verdict]
        NEVER_STORED: _ClassVar[ExplainedBlock.Verdict]
        UNKNOWN: _ClassVar[ExplainedBlock.Verdict]
    PRESENT: ExplainedBlock.Verdict
    OWNER_SUSPECT: ExplainedBlock.Verdict
    WARMING: ExplainedBlock.Verdict
    NOT_WHOLE: ExplainedBlock.Verdict
    BEING_WRITTEN: ExplainedBlock.Verdict
    UNREPORTED: ExplainedBlock.Verdict
    EVICTED: ExplainedBlock.Verdict
    OWNER_LOST: ExplainedBlock.Verdict
    NAMESPACE_DIFFERS: ExplainedBlock.Verdict
    NEVER_STORED: ExplainedBlock.Verdict
    UNKNOWN: ExplainedBlock.Verdict
    class Holder(_message.Message):
        __slots__ = ("name", "tier", "state", "shards")
        NAME_FIELD_NUMBER: _ClassVar[int]
        TIER_FIELD_NUMBER: _ClassVar[int]
        STATE_FIELD_NUMBER: _ClassVar[int]
        SHARDS_FIELD_NUMBER: _ClassVar[int]
        name: str
        tier: str
        state: str
        shards: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, name: _Optional[str] = ..., tier: _Optional[str] = ..., state: _Optional[str] = ..., shards: _Optional[_Iterable[int]] = ...) -> None: ...
    class Removal(_message.Message):
        __slots__ = ("why", "node", "age_s")
        class Why(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
            __slots__ = ()
            MASTER: _ClassVar[ExplainedBlock.Removal.Why]
            ROOM: _ClassVar[ExplainedBlock.Removal.Why]
            WATERMARK: _ClassVar[ExplainedBlock.Removal.Why]
            OPERATOR: _ClassVar[ExplainedBlock.Removal.Why]
            INCOMPLETE: _ClassVar[ExplainedBlock.Removal.Why]
            NODE_LOST: _ClassVar[ExplainedBlock.Removal.Why]
            NODE_RESTARTED: _ClassVar[ExplainedBlock.Removal.Why]
            NOT_REPORTED: _ClassVar[ExplainedBlock.Removal.Why]
            CAPACITY: _ClassVar[ExplainedBlock.Removal.Why]
            FILE_LOST: _ClassVar[ExplainedBlock.Removal.Why]
            TRANSFER: _ClassVar[ExplainedBlock.Removal.Why]
        MASTER: ExplainedBlock.Removal.Why
        ROOM: ExplainedBlock.Removal.Why
        WATERMARK: ExplainedBlock.Removal.Why
        OPERATOR: ExplainedBlock.Removal.Why
        INCOMPLETE: ExplainedBlock.Removal.Why
        NODE_LOST: ExplainedBlock.Removal.Why
        NODE_RESTARTED: ExplainedBlock.Removal.Why
        NOT_REPORTED: ExplainedBlock.Removal.Why
        CAPACITY: ExplainedBlock.Removal.Why
        FILE_LOST: ExplainedBlock.Removal.Why
        TRANSFER: ExplainedBlock.Removal.Why
        WHY_FIELD_NUMBER: _ClassVar[int]
        NODE_FIELD_NUMBER: _ClassVar[int]
        AGE_S_FIELD_NUMBER: _ClassVar[int]
        why: ExplainedBlock.Removal.Why
        node: str
        age_s: float
        def __init__(self, why: _Optional[_Union[ExplainedBlock.Removal.Why, str]] = ..., node: _Optional[str] = ..., age_s: _Optional[float] = ...) -> None: ...
    class Difference(_message.Message):
        __slots__ = ("field", "here", "there")
        FIELD_FIELD_NUMBER: _ClassVar[int]
        HERE_FIELD_NUMBER: _ClassVar[int]
        THERE_FIELD_NUMBER: _ClassVar[int]
        field: str
        here: str
        there: str
        def __init__(self, field: _Optional[str] = ..., here: _Optional[str] = ..., there: _Optional[str] = ...) -> None: ...
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    LAST_USE_S_FIELD_NUMBER: _ClassVar[int]
    REMOVALS_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    verdict: ExplainedBlock.Verdict
    namespace: bytes
    holders: _containers.RepeatedCompositeFieldContainer[ExplainedBlock.Holder]
    missing: _containers.RepeatedScalarFieldContainer[int]
    leases: int
    last_use_s: float
    removals: _containers.RepeatedCompositeFieldContainer[ExplainedBlock.Removal]
    other: bytes
    differences: _containers.RepeatedCompositeFieldContainer[ExplainedBlock.Difference]
    def __init__(self, verdict: _Optional[_Union[ExplainedBlock.Verdict, str]] = ..., namespace: _Optional[bytes] = ..., holders: _Optional[_Iterable[_Union[ExplainedBlock.Holder, _Mapping]]] = ..., missing: _Optional[_Iterable[int]] = ..., leases: _Optional[int] = ..., last_use_s: _Optional[float] = ..., removals: _Optional[_Iterable[_Union[ExplainedBlock.Removal, _Mapping]]] = ..., other: _Optional[bytes] = ..., differences: _Optional[_Iterable[_Union[ExplainedBlock.Difference, _Mapping]]] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("blocks", "memory_s", "overflowed", "silent")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_S_FIELD_NUMBER: _ClassVar[int]
    OVERFLOWED_FIELD_NUMBER: _ClassVar[int]
    SILENT_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[ExplainedBlock]
    memory_s: float
    overflowed: bool
    silent: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, blocks: _Optional[_Iterable[_Union[ExplainedBlock, _Mapping]]] = ..., memory_s: _Optional[float] = ..., overflowed: bool = ..., silent: _Optional[_Iterable[str]] = ...) -> None: ...

class BackendsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BackendStatus(_message.Message):
    __slots__ = ("id", "url", "state", "reason", "capacity_bytes", "used_bytes", "blocks", "removing_bytes", "full", "scanning", "scanned_files", "scan_expected", "servers", "complete")
    class Server(_message.Message):
        __slots__ = ("node", "backend")
        NODE_FIELD_NUMBER: _ClassVar[int]
        BACKEND_FIELD_NUMBER: _ClassVar[int]
        node: str
        backend: _types_pb2.Backend
        def __init__(self, node: _Optional[str] = ..., backend: _Optional[_Union[_types_pb2.Backend, _Mapping]] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REMOVING_BYTES_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    SCANNING_FIELD_NUMBER: _ClassVar[int]
    SCANNED_FILES_FIELD_NUMBER: _ClassVar[int]
    SCAN_EXPECTED_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    url: str
    state: _types_pb2.Backend.State
    reason: str
    capacity_bytes: int
    used_bytes: int
    blocks: int
    removing_bytes: int
    full: bool
    scanning: bool
    scanned_files: int
    scan_expected: int
    servers: _containers.RepeatedCompositeFieldContainer[BackendStatus.Server]
    complete: bool
    def __init__(self, id: _Optional[bytes] = ..., url: _Optional[str] = ..., state: _Optional[_Union[_types_pb2.Backend.State, str]] = ..., reason: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., removing_bytes: _Optional[int] = ..., full: bool = ..., scanning: bool = ..., scanned_files: _Optional[int] = ..., scan_expected: _Optional[int] = ..., servers: _Optional[_Iterable[_Union[BackendStatus.Server, _Mapping]]] = ..., complete: bool = ...) -> None: ...

class BackendsResponse(_message.Message):
    __slots__ = ("backends",)
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    backends: _containers.RepeatedCompositeFieldContainer[BackendStatus]
    def __init__(self, backends: _Optional[_Iterable[_Union[BackendStatus, _Mapping]]] = ...) -> None: ...

class PinBlocksRequest(_message.Message):
    __slots__ = ("namespace", "keys", "ttl_ms", "label")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: bytes
    ttl_ms: int
    label: str
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ..., label: _Optional[str] = ...) -> None: ...

class PinBlocksResponse(_message.Message):
    __slots__ = ("pin", "blocks")
    PIN_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    pin: int
    blocks: int
    def __init__(self, pin: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class UnpinBlocksRequest(_message.Message):
    __slots__ = ("pins", "label", "all")
    PINS_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    pins: _containers.RepeatedScalarFieldContainer[int]
    label: str
    all: bool
    def __init__(self, pins: _Optional[_Iterable[int]] = ..., label: _Optional[str] = ..., all: bool = ...) -> None: ...

class UnpinBlocksResponse(_message.Message):
    __slots__ = ("pins", "blocks")
    PINS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    pins: int
    blocks: int
    def __init__(self, pins: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class PinsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PinStatus(_message.Message):
    __slots__ = ("pin", "label", "namespace", "blocks", "present", "left_s")
    PIN_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
    pin: int
    label: str
    namespace: bytes
    blocks: int
    present: int
    left_s: float
    def __init__(self, pin: _Optional[int] = ..., label: _Optional[str] = ..., namespace: _Optional[bytes] = ..., blocks: _Optional[int] = ..., present: _Optional[int] = ..., left_s: _Optional[float] = ...) -> None: ...

class PinsResponse(_message.Message):
    __slots__ = ("pins",)
    PINS_FIELD_NUMBER: _ClassVar[int]
    pins: _containers.RepeatedCompositeFieldContainer[PinStatus]
    def __init__(self, pins: _Optional[_Iterable[_Union[PinStatus, _Mapping]]] = ...) -> None: ...

class CataloguedFilesRequest(_message.Message):
    __slots__ = ("backend",)
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    backend: bytes
    def __init__(self, backend: _Optional[bytes] = ...) -> None: ...

class CataloguedFilesResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    def __init__(self, blocks: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ...) -> None: ...

class CorrectCatalogRequest(_message.Message):
    __slots__ = ("backend", "removed", "added", "namespaces")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    backend: bytes
    removed: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    added: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    namespaces: _containers.RepeatedCompositeFieldContainer[_types_pb2.NamespaceDescriptor]
    def __init__(self, backend: _Optional[bytes] = ..., removed: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ..., added: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ..., namespaces: _Optional[_Iterable[_Union[_types_pb2.NamespaceDescriptor, _Mapping]]] = ...) -> None: ...

class CorrectCatalogResponse(_message.Message):
    __slots__ = ("removed", "added")
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    removed: int
    added: int
    def __init__(self, removed: _Optional[int] = ..., added: _Optional[int] = ...) -> None: ...

class ScanBackendRequest(_message.Message):
    __slots__ = ("backend",)
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    backend: bytes
    def __init__(self, backend: _Optional[bytes] = ...) -> None: ...

class ScanBackendResponse(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...
