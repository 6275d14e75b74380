from kvpool.rpc.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HandshakeRequest(_message.Message):
    __slots__ = ("protocol", "client")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    client: str
    def __init__(self, protocol: _Optional[int] = ..., client: _Optional[str] = ...) -> None: ...

class HandshakeResponse(_message.Message):
    __slots__ = ("protocol", "version", "master_epoch", "data_port", "lease_ttl_ms", "nodes")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MASTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    DATA_PORT_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    master_epoch: int
    data_port: int
    lease_ttl_ms: int
    nodes: _containers.RepeatedCompositeFieldContainer[_types_pb2.NodeAddress]
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., master_epoch: _Optional[int] = ..., data_port: _Optional[int] = ..., lease_ttl_ms: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[_types_pb2.NodeAddress, _Mapping]]] = ...) -> None: ...

class RegisterNamespaceResponse(_message.Message):
    __slots__ = ("digest", "warnings")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, digest: _Optional[bytes] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("namespace", "hashes", "known_prefix", "lease", "groups")
    class Rule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        FULL: _ClassVar[LookupRequest.Rule]
        LAST_N: _ClassVar[LookupRequest.Rule]
        LAST: _ClassVar[LookupRequest.Rule]
    FULL: LookupRequest.Rule
    LAST_N: LookupRequest.Rule
    LAST: LookupRequest.Rule
    class Group(_message.Message):
        __slots__ = ("namespace", "rule", "last_n")
        NAMESPACE_FIELD_NUMBER: _ClassVar[int]
        RULE_FIELD_NUMBER: _ClassVar[int]
        LAST_N_FIELD_NUMBER: _ClassVar[int]
        namespace: bytes
        rule: LookupRequest.Rule
        last_n: int
        def __init__(self, namespace: _Optional[bytes] = ..., rule: _Optional[_Union[LookupRequest.Rule, str]] = ..., last_n: _Optional[int] = ...) -> None: ...
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    KNOWN_PREFIX_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    hashes: bytes
    known_prefix: int
    lease: bool
    groups: _containers.RepeatedCompositeFieldContainer[LookupRequest.Group]
    def __init__(self, namespace: _Optional[bytes] = ..., hashes: _Optional[bytes] = ..., known_prefix: _Optional[int] = ..., lease: bool = ..., groups: _Optional[_Iterable[_Union[LookupRequest.Group, _Mapping]]] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("prefix", "runs", "nodes", "lease", "reason", "detail", "residents")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        COMPLETE: _ClassVar[LookupResponse.Reason]
        NOT_STORED: _ClassVar[LookupResponse.Reason]
        NOT_WHOLE: _ClassVar[LookupResponse.Reason]
        OWNER_SUSPECT: _ClassVar[LookupResponse.Reason]
        WARMING: _ClassVar[LookupResponse.Reason]
        NAMESPACE_UNKNOWN: _ClassVar[LookupResponse.Reason]
        NAMESPACE_MISMATCH: _ClassVar[LookupResponse.Reason]
        MASTER_UNREACHABLE: _ClassVar[LookupResponse.Reason]
    COMPLETE: LookupResponse.Reason
    NOT_STORED: LookupResponse.Reason
    NOT_WHOLE: LookupResponse.Reason
    OWNER_SUSPECT: LookupResponse.Reason
    WARMING: LookupResponse.Reason
    NAMESPACE_UNKNOWN: LookupResponse.Reason
    NAMESPACE_MISMATCH: LookupResponse.Reason
    MASTER_UNREACHABLE: LookupResponse.Reason
    class Owner(_message.Message):
        __slots__ = ("node", "tier", "shards", "backend")
        NODE_FIELD_NUMBER: _ClassVar[int]
        TIER_FIELD_NUMBER: _ClassVar[int]
        SHARDS_FIELD_NUMBER: _ClassVar[int]
        BACKEND_FIELD_NUMBER: _ClassVar[int]
        node: int
        tier: str
        shards: bytes
        backend: bytes
        def __init__(self, node: _Optional[int] = ..., tier: _Optional[str] = ..., shards: _Optional[bytes] = ..., backend: _Optional[bytes] = ...) -> None: ...
    class Run(_message.Message):
        __slots__ = ("blocks", "owners")
        BLOCKS_FIELD_NUMBER: _ClassVar[int]
        OWNERS_FIELD_NUMBER: _ClassVar[int]
        blocks: int
        owners: _containers.RepeatedCompositeFieldContainer[LookupResponse.Owner]
        def __init__(self, blocks: _Optional[int] = ..., owners: _Optional[_Iterable[_Union[LookupResponse.Owner, _Mapping]]] = ...) -> None: ...
    class Resident(_message.Message):
        __slots__ = ("engine", "tier", "ranges", "owner")
        ENGINE_FIELD_NUMBER: _ClassVar[int]
        TIER_FIELD_NUMBER: _ClassVar[int]
        RANGES_FIELD_NUMBER: _ClassVar[int]
        OWNER_FIELD_NUMBER: _ClassVar[int]
        engine: str
        tier: str
        ranges: _containers.RepeatedCompositeFieldContainer[LookupResponse.Range]
        owner: int
        def __init__(self, engine: _Optional[str] = ..., tier: _Optional[str] = ..., ranges: _Optional[_Iterable[_Union[LookupResponse.Range, _Mapping]]] = ..., owner: _Optional[int] = ...) -> None: ...
    class Range(_message.Message):
        __slots__ = ("first", "blocks")
        FIRST_FIELD_NUMBER: _ClassVar[int]
        BLOCKS_FIELD_NUMBER: _ClassVar[int]
        first: int
        blocks: int
        def __init__(self, first: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RESIDENTS_FIELD_NUMBER: _ClassVar[int]
    prefix: int
    runs: _containers.RepeatedCompositeFieldContainer[LookupResponse.Run]
    nodes: _containers.RepeatedCompositeFieldContainer[_types_pb2.NodeAddress]
    lease: int
    reason: LookupResponse.Reason
    detail: str
    residents: _containers.RepeatedCompositeFieldContainer[LookupResponse.Resident]
    def __init__(self, prefix: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[LookupResponse.Run, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[_types_pb2.NodeAddress, _Mapping]]] = ..., lease: _Optional[int] = ..., reason: _Optional[_Union[LookupResponse.Reason, str]] = ..., detail: _Optional[str] = ..., residents: _Optional[_Iterable[_Union[LookupResponse.Resident, _Mapping]]] = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, leases: _Optional[_Iterable[int]] = ...) -> None: ...

class LeaseResponse(_message.Message):
    __slots__ = ("unknown",)
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    unknown: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, unknown: _Optional[_Iterable[int]] = ...) -> None: ...

class PlaceRequest(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class PlaceResponse(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: _types_pb2.NodeAddress
    def __init__(self, node: _Optional[_Union[_types_pb2.NodeAddress, _Mapping]] = ...) -> None: ...

class ResidencyRequest(_message.Message):
    __slots__ = ("owner", "engine", "sequence", "first", "namespace", "cleared", "removed", "bye", "keys")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    BYE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    owner: int
    engine: str
    sequence: int
    first: bool
    namespace: bytes
    cleared: bool
    removed: int
    bye: bool
    keys: bytes
    def __init__(self, owner: _Optional[int] = ..., engine: _Optional[str] = ..., sequence: _Optional[int] = ..., first: bool = ..., namespace: _Optional[bytes] = ..., cleared: bool = ..., removed: _Optional[int] = ..., bye: bool = ..., keys: _Optional[bytes] = ...) -> None: ...

class ResidencyResponse(_message.Message):
    __slots__ = ("again",)
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    again: bool
    def __init__(self, again: bool = ...) -> None: ...

class TransferPart(_message.Message):
    __slots__ = ("namespace", "keys", "drop_last", "blocks")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    DROP_LAST_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: bytes
    drop_last: int
    blocks: int
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., drop_last: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class OpenTransferRequest(_message.Message):
    __slots__ = ("transfer", "parts", "nodes", "producer")
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    transfer: int
    parts: _containers.RepeatedCompositeFieldContainer[TransferPart]
    nodes: _containers.RepeatedScalarFieldContainer[str]
    producer: str
    def __init__(self, transfer: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[TransferPart, _Mapping]]] = ..., nodes: _Optional[_Iterable[str]] = ..., producer: _Optional[str] = ...) -> None: ...

class OpenTransferResponse(_message.Message):
    __slots__ = ("ttl_ms",)
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ttl_ms: int
    def __init__(self, ttl_ms: _Optional[int] = ...) -> None: ...

class SealTransferRequest(_message.Message):
    __slots__ = ("transfer", "ttl_ms")
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    transfer: int
    ttl_ms: int
    def __init__(self, transfer: _Optional[int] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class SealTransferResponse(_message.Message):
    __slots__ = ("known",)
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: bool
    def __init__(self, known: bool = ...) -> None: ...

class ClaimTransferRequest(_message.Message):
    __slots__ = ("transfer", "consumer")
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_FIELD_NUMBER: _ClassVar[int]
    transfer: int
    consumer: str
    def __init__(self, transfer: _Optional[int] = ..., consumer: _Optional[str] = ...) -> None: ...

class ClaimTransferResponse(_message.Message):
    __slots__ = ("state", "namespaces", "nodes", "ttl_ms")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[ClaimTransferResponse.State]
        OPEN: _ClassVar[ClaimTransferResponse.State]
        SEALED: _ClassVar[ClaimTransferResponse.State]
        ENDED: _ClassVar[ClaimTransferResponse.State]
    UNKNOWN: ClaimTransferResponse.State
    OPEN: ClaimTransferResponse.State
    SEALED: ClaimTransferResponse.State
    ENDED: ClaimTransferResponse.State
    STATE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    state: ClaimTransferResponse.State
    namespaces: _containers.RepeatedScalarFieldContainer[bytes]
    nodes: _containers.RepeatedCompositeFieldContainer[_types_pb2.NodeAddress]
    ttl_ms: int
    def __init__(self, state: _Optional[_Union[ClaimTransferResponse.State, str]] = ..., namespaces: _Optional[_Iterable[bytes]] = ..., nodes: _Optional[_Iterable[_Union[_types_pb2.NodeAddress, _Mapping]]] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class TransfersRequest(_message.Message):
    __slots__ = ("transfers", "consumed", "consumer", "back")
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    CONSUMED_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_FIELD_NUMBER: _ClassVar[int]
    BACK_FIELD_NUMBER: _ClassVar[int]
    transfers: _containers.RepeatedScalarFieldContainer[int]
    consumed: _containers.RepeatedScalarFieldContainer[int]
    consumer: str
    back: bool
    def __init__(self, transfers: _Optional[_Iterable[int]] = ..., consumed: _Optional[_Iterable[int]] = ..., consumer: _Optional[str] = ..., back: bool = ...) -> None: ...

class TransfersResponse(_message.Message):
    __slots__ = ("unknown",)
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    unknown: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, unknown: _Optional[_Iterable[int]] = ...) -> None: ...

class EngineAnnouncement(_message.Message):
    __slots__ = ("owner", "engine", "address", "role", "model", "namespaces", "tensor_parallel", "pipeline_parallel", "data_parallel_rank", "host", "boot_id", "devices", "transfers", "layerwise", "bye", "loads", "residency")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    DATA_PARALLEL_RANK_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    LAYERWISE_FIELD_NUMBER: _ClassVar[int]
    BYE_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    owner: int
    engine: str
    address: str
    role: str
    model: str
    namespaces: _containers.RepeatedScalarFieldContainer[bytes]
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel_rank: int
    host: str
    boot_id: str
    devices: _containers.RepeatedScalarFieldContainer[str]
    transfers: bool
    layerwise: bool
    bye: bool
    loads: bool
    residency: bool
    def __init__(self, owner: _Optional[int] = ..., engine: _Optional[str] = ..., address: _Optional[str] = ..., role: _Optional[str] = ..., model: _Optional[str] = ..., namespaces: _Optional[_Iterable[bytes]] = ..., tensor_parallel: _Optional[int] = ..., pipeline_parallel: _Optional[int] = ..., data_parallel_rank: _Optional[int] = ..., host: _Optional[str] = ..., boot_id: _Optional[str] = ..., devices: _Optional[_Iterable[str]] = ..., transfers: bool = ..., layerwise: bool = ..., bye: bool = ..., loads: bool = ..., residency: bool = ...) -> None: ...

class AnnounceEngineResponse(_message.Message):
    __slots__ = ("ttl_ms",)
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ttl_ms: int
    def __init__(self, ttl_ms: _Optional[int] = ...) -> None: ...

class EnginesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineStatus(_message.Message):
    __slots__ = ("engine", "last_seen_s", "blocks")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_S_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    engine: EngineAnnouncement
    last_seen_s: float
    blocks: int
    def __init__(self, engine: _Optional[_Union[EngineAnnouncement, _Mapping]] = ..., last_seen_s: _Optional[float] = ..., blocks: _Optional[int] = ...) -> None: ...

class EnginesResponse(_message.Message):
    __slots__ = ("engines",)
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[EngineStatus]
    def __init__(self, engines: _Optional[_Iterable[_Union[EngineStatus, _Mapping]]] = ...) -> None: ...

class MasterFrame(_message.Message):
    __slots__ = ("id", "lookup", "renew", "release", "residency", "open_transfer", "seal_transfer", "claim_transfer", "renew_transfers", "end_transfers")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    OPEN_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    SEAL_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    CLAIM_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    RENEW_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    END_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    id: int
    lookup: LookupRequest
    renew: LeaseRequest
    release: LeaseRequest
    residency: ResidencyRequest
    open_transfer: OpenTransferRequest
    seal_transfer: SealTransferRequest
    claim_transfer: ClaimTransferRequest
    renew_transfers: TransfersRequest
    end_transfers: TransfersRequest
    def __init__(self, id: _Optional[int] = ..., lookup: _Optional[_Union[LookupRequest, _Mapping]] = ..., renew: _Optional[_Union[LeaseRequest, _Mapping]] = ..., release: _Optional[_Union[LeaseRequest, _Mapping]] = ..., residency: _Optional[_Union[ResidencyRequest, _Mapping]] = ..., open_transfer: _Optional[_Union[OpenTransferRequest, _Mapping]] = ..., seal_transfer: _Optional[_Union[SealTransferRequest, _Mapping]] = ..., claim_transfer: _Optional[_Union[ClaimTransferRequest, _Mapping]] = ..., renew_transfers: _Optional[_Union[TransfersRequest, _Mapping]] = ..., end_transfers: _Optional[_Union[TransfersRequest, _Mapping]] = ...) -> None: ...

class MasterFrameReply(_message.Message):
    __slots__ = ("id", "error", "lookup", "lease", "residency", "open_transfer", "seal_transfer", "claim_transfer", "transfers")
    ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    OPEN_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    SEAL_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    CLAIM_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    id: int
    error: _types_pb2.Error
    lookup: LookupResponse
    lease: LeaseResponse
    residency: ResidencyResponse
    open_transfer: OpenTransferResponse
    seal_transfer: SealTransferResponse
    claim_transfer: ClaimTransferResponse
    transfers: TransfersResponse
    def __init__(self, id: _Optional[int] = ..., error: _Optional[_Union[_types_pb2.Error, _Mapping]] = ..., lookup: _Optional[_Union[LookupResponse, _Mapping]] = ..., lease: _Optional[_Union[LeaseResponse, _Mapping]] = ..., residency: _Optional[_Union[ResidencyResponse, _Mapping]] = ..., open_transfer: _Optional[_Union[OpenTransferResponse, _Mapping]] = ..., seal_transfer: _Optional[_Union[SealTransferResponse, _Mapping]] = ..., claim_transfer: _Optional[_Union[ClaimTransferResponse, _Mapping]] = ..., transfers: _Optional[_Union[TransfersResponse, _Mapping]] = ...) -> None: ...
