from kvpool.rpc.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodeMessage(_message.Message):
    __slots__ = ("hello", "inventory", "delta", "heartbeat", "probed", "storage", "scanned", "files_removed")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    INVENTORY_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PROBED_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    SCANNED_FIELD_NUMBER: _ClassVar[int]
    FILES_REMOVED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    inventory: Inventory
    delta: Delta
    heartbeat: Heartbeat
    probed: Probed
    storage: Storage
    scanned: Scanned
    files_removed: FilesRemoved
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., inventory: _Optional[_Union[Inventory, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., probed: _Optional[_Union[Probed, _Mapping]] = ..., storage: _Optional[_Union[Storage, _Mapping]] = ..., scanned: _Optional[_Union[Scanned, _Mapping]] = ..., files_removed: _Optional[_Union[FilesRemoved, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("address", "epoch", "capacity_bytes", "used_bytes", "sequence", "master_epoch", "namespaces", "backends", "kept_by", "generation")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MASTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    KEPT_BY_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    address: _types_pb2.NodeAddress
    epoch: int
    capacity_bytes: int
    used_bytes: int
    sequence: int
    master_epoch: int
    namespaces: _containers.RepeatedCompositeFieldContainer[_types_pb2.NamespaceDescriptor]
    backends: _containers.RepeatedCompositeFieldContainer[_types_pb2.Backend]
    kept_by: int
    generation: int
    def __init__(self, address: _Optional[_Union[_types_pb2.NodeAddress, _Mapping]] = ..., epoch: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., sequence: _Optional[int] = ..., master_epoch: _Optional[int] = ..., namespaces: _Optional[_Iterable[_Union[_types_pb2.NamespaceDescriptor, _Mapping]]] = ..., backends: _Optional[_Iterable[_Union[_types_pb2.Backend, _Mapping]]] = ..., kept_by: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class Inventory(_message.Message):
    __slots__ = ("sequence", "chunk", "last", "added")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    chunk: int
    last: bool
    added: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    def __init__(self, sequence: _Optional[int] = ..., chunk: _Optional[int] = ..., last: bool = ..., added: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("sequence", "added", "removed", "used_bytes", "evictions_done", "namespaces")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_DONE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    added: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    removed: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    used_bytes: int
    evictions_done: int
    namespaces: _containers.RepeatedCompositeFieldContainer[_types_pb2.NamespaceDescriptor]
    def __init__(self, sequence: _Optional[int] = ..., added: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ..., removed: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ..., used_bytes: _Optional[int] = ..., evictions_done: _Optional[int] = ..., namespaces: _Optional[_Iterable[_Union[_types_pb2.NamespaceDescriptor, _Mapping]]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("used_bytes", "sequence")
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    used_bytes: int
    sequence: int
    def __init__(self, used_bytes: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class Probed(_message.Message):
    __slots__ = ("id", "states")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    id: int
    states: bytes
    def __init__(self, id: _Optional[int] = ..., states: _Optional[bytes] = ...) -> None: ...

class Storage(_message.Message):
    __slots__ = ("backends",)
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    backends: _containers.RepeatedCompositeFieldContainer[_types_pb2.Backend]
    def __init__(self, backends: _Optional[_Iterable[_Union[_types_pb2.Backend, _Mapping]]] = ...) -> None: ...

class Scanned(_message.Message):
    __slots__ = ("backend", "last", "files", "files_expected", "added", "namespaces", "error")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    FILES_EXPECTED_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    backend: bytes
    last: bool
    files: int
    files_expected: int
    added: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    namespaces: _containers.RepeatedCompositeFieldContainer[_types_pb2.NamespaceDescriptor]
    error: str
    def __init__(self, backend: _Optional[bytes] = ..., last: bool = ..., files: _Optional[int] = ..., files_expected: _Optional[int] = ..., added: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ..., namespaces: _Optional[_Iterable[_Union[_types_pb2.NamespaceDescriptor, _Mapping]]] = ..., error: _Optional[str] = ...) -> None: ...

class FilesRemoved(_message.Message):
    __slots__ = ("id", "gone")
    ID_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    id: int
    gone: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    def __init__(self, id: _Optional[int] = ..., gone: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ...) -> None: ...

class MasterMessage(_message.Message):
    __slots__ = ("welcome", "victims", "evict", "superseded", "send_inventory", "ack", "probe", "remove_files", "scan", "storage_limits", "keep", "look_for_files")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    VICTIMS_FIELD_NUMBER: _ClassVar[int]
    EVICT_FIELD_NUMBER: _ClassVar[int]
    SUPERSEDED_FIELD_NUMBER: _ClassVar[int]
    SEND_INVENTORY_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FILES_FIELD_NUMBER: _ClassVar[int]
    SCAN_FIELD_NUMBER: _ClassVar[int]
    STORAGE_LIMITS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    LOOK_FOR_FILES_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    victims: Victims
    evict: Evict
    superseded: Superseded
    send_inventory: SendInventory
    ack: Ack
    probe: Probe
    remove_files: RemoveFiles
    scan: Scan
    storage_limits: StorageLimits
    keep: Keep
    look_for_files: LookForFiles
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., victims: _Optional[_Union[Victims, _Mapping]] = ..., evict: _Optional[_Union[Evict, _Mapping]] = ..., superseded: _Optional[_Union[Superseded, _Mapping]] = ..., send_inventory: _Optional[_Union[SendInventory, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ..., remove_files: _Optional[_Union[RemoveFiles, _Mapping]] = ..., scan: _Optional[_Union[Scan, _Mapping]] = ..., storage_limits: _Optional[_Union[StorageLimits, _Mapping]] = ..., keep: _Optional[_Union[Keep, _Mapping]] = ..., look_for_files: _Optional[_Union[LookForFiles, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("master_epoch", "resume_after", "inventory")
    MASTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    RESUME_AFTER_FIELD_NUMBER: _ClassVar[int]
    INVENTORY_FIELD_NUMBER: _ClassVar[int]
    master_epoch: int
    resume_after: int
    inventory: bool
    def __init__(self, master_epoch: _Optional[int] = ..., resume_after: _Optional[int] = ..., inventory: bool = ...) -> None: ...

class Victims(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    def __init__(self, blocks: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ...) -> None: ...

class Evict(_message.Message):
    __slots__ = ("id", "blocks")
    ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    id: int
    blocks: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    def __init__(self, id: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ...) -> None: ...

class Superseded(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SendInventory(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Ack(_message.Message):
    __slots__ = ("sequence", "generation")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    generation: int
    def __init__(self, sequence: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("id", "namespace", "keys")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    id: int
    namespace: bytes
    keys: bytes
    def __init__(self, id: _Optional[int] = ..., namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ...) -> None: ...

class RemoveFiles(_message.Message):
    __slots__ = ("id", "backend", "blocks")
    ID_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    id: int
    backend: bytes
    blocks: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    def __init__(self, id: _Optional[int] = ..., backend: _Optional[bytes] = ..., blocks: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ...) -> None: ...

class LookForFiles(_message.Message):
    __slots__ = ("id", "backend", "blocks")
    ID_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    id: int
    backend: bytes
    blocks: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    def __init__(self, id: _Optional[int] = ..., backend: _Optional[bytes] = ..., blocks: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ...) -> None: ...

class Scan(_message.Message):
    __slots__ = ("backend",)
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    backend: bytes
    def __init__(self, backend: _Optional[bytes] = ...) -> None: ...

class StorageLimits(_message.Message):
    __slots__ = ("limits",)
    class Limit(_message.Message):
        __slots__ = ("backend", "full")
        BACKEND_FIELD_NUMBER: _ClassVar[int]
        FULL_FIELD_NUMBER: _ClassVar[int]
        backend: bytes
        full: bool
        def __init__(self, backend: _Optional[bytes] = ..., full: bool = ...) -> None: ...
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    limits: _containers.RepeatedCompositeFieldContainer[StorageLimits.Limit]
    def __init__(self, limits: _Optional[_Iterable[_Union[StorageLimits.Limit, _Mapping]]] = ...) -> None: ...

class Keep(_message.Message):
    __slots__ = ("keep", "release")
    KEEP_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    keep: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    release: _containers.RepeatedCompositeFieldContainer[_types_pb2.BlockRun]
    def __init__(self, keep: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ..., release: _Optional[_Iterable[_Union[_types_pb2.BlockRun, _Mapping]]] = ...) -> None: ...

class NodeFrame(_message.Message):
    __slots__ = ("id", "attach", "register", "reserve", "commit", "write", "abort", "pin", "release", "get", "local_prefix", "abandon", "prefetch", "progress", "touch")
    ID_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    WRITE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    GET_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFIX_FIELD_NUMBER: _ClassVar[int]
    ABANDON_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    TOUCH_FIELD_NUMBER: _ClassVar[int]
    id: int
    attach: Attach
    register: _types_pb2.NamespaceDescriptor
    reserve: Reserve
    commit: Commit
    write: Write
    abort: ReleaseReservation
    pin: Pin
    release: ReleasePin
    get: Get
    local_prefix: LocalPrefix
    abandon: Abandon
    prefetch: Prefetch
    progress: Progress
    touch: Touch
    def __init__(self, id: _Optional[int] = ..., attach: _Optional[_Union[Attach, _Mapping]] = ..., register: _Optional[_Union[_types_pb2.NamespaceDescriptor, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., write: _Optional[_Union[Write, _Mapping]] = ..., abort: _Optional[_Union[ReleaseReservation, _Mapping]] = ..., pin: _Optional[_Union[Pin, _Mapping]] = ..., release: _Optional[_Union[ReleasePin, _Mapping]] = ..., get: _Optional[_Union[Get, _Mapping]] = ..., local_prefix: _Optional[_Union[LocalPrefix, _Mapping]] = ..., abandon: _Optional[_Union[Abandon, _Mapping]] = ..., prefetch: _Optional[_Union[Prefetch, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., touch: _Optional[_Union[Touch, _Mapping]] = ...) -> None: ...

class NodeFrameReply(_message.Message):
    __slots__ = ("id", "error", "attached", "reserved", "committed", "pinned", "got", "local_prefix")
    ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    GOT_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFIX_FIELD_NUMBER: _ClassVar[int]
    id: int
    error: _types_pb2.Error
    attached: Attached
    reserved: Reserved
    committed: Committed
    pinned: Pinned
    got: Got
    local_prefix: LocalPrefixReply
    def __init__(self, id: _Optional[int] = ..., error: _Optional[_Union[_types_pb2.Error, _Mapping]] = ..., attached: _Optional[_Union[Attached, _Mapping]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., pinned: _Optional[_Union[Pinned, _Mapping]] = ..., got: _Optional[_Union[Got, _Mapping]] = ..., local_prefix: _Optional[_Union[LocalPrefixReply, _Mapping]] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("client",)
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    client: str
    def __init__(self, client: _Optional[str] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("node_id", "epoch", "segment_bytes", "backends")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    epoch: int
    segment_bytes: int
    backends: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, node_id: _Optional[str] = ..., epoch: _Optional[int] = ..., segment_bytes: _Optional[int] = ..., backends: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("namespace", "shards", "shard_bytes", "layers", "writer", "transfer")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    SHARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    WRITER_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    shards: _containers.RepeatedScalarFieldContainer[int]
    shard_bytes: int
    layers: int
    writer: int
    transfer: int
    def __init__(self, namespace: _Optional[bytes] = ..., shards: _Optional[_Iterable[int]] = ..., shard_bytes: _Optional[int] = ..., layers: _Optional[int] = ..., writer: _Optional[int] = ..., transfer: _Optional[int] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("reservation",)
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    reservation: int
    def __init__(self, reservation: _Optional[int] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("reservation", "keep")
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    reservation: int
    keep: bytes
    def __init__(self, reservation: _Optional[int] = ..., keep: _Optional[bytes] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("reservation", "layers")
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    reservation: int
    layers: int
    def __init__(self, reservation: _Optional[int] = ..., layers: _Optional[int] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("stored",)
    STORED_FIELD_NUMBER: _ClassVar[int]
    stored: int
    def __init__(self, stored: _Optional[int] = ...) -> None: ...

class Write(_message.Message):
    __slots__ = ("reservation",)
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    reservation: int
    def __init__(self, reservation: _Optional[int] = ...) -> None: ...

class ReleaseReservation(_message.Message):
    __slots__ = ("reservation",)
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    reservation: int
    def __init__(self, reservation: _Optional[int] = ...) -> None: ...

class Abandon(_message.Message):
    __slots__ = ("writer",)
    WRITER_FIELD_NUMBER: _ClassVar[int]
    writer: int
    def __init__(self, writer: _Optional[int] = ...) -> None: ...

class Pin(_message.Message):
    __slots__ = ("namespace", "shards", "fetch_ms", "backend", "transfer", "wait_ms", "first_layer")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    FETCH_MS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    shards: _containers.RepeatedScalarFieldContainer[int]
    fetch_ms: int
    backend: bytes
    transfer: int
    wait_ms: int
    first_layer: int
    def __init__(self, namespace: _Optional[bytes] = ..., shards: _Optional[_Iterable[int]] = ..., fetch_ms: _Optional[int] = ..., backend: _Optional[bytes] = ..., transfer: _Optional[int] = ..., wait_ms: _Optional[int] = ..., first_layer: _Optional[int] = ...) -> None: ...

class Pinned(_message.Message):
    __slots__ = ("pin", "layers", "ready")
    PIN_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    pin: int
    layers: int
    ready: int
    def __init__(self, pin: _Optional[int] = ..., layers: _Optional[int] = ..., ready: _Optional[int] = ...) -> None: ...

class ReleasePin(_message.Message):
    __slots__ = ("pin",)
    PIN_FIELD_NUMBER: _ClassVar[int]
    pin: int
    def __init__(self, pin: _Optional[int] = ...) -> None: ...

class Get(_message.Message):
    __slots__ = ("namespace", "shards", "first_layer", "layer_count", "fetch_ms", "backend", "transfer", "wait_ms")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    FETCH_MS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    shards: _containers.RepeatedScalarFieldContainer[int]
    first_layer: int
    layer_count: int
    fetch_ms: int
    backend: bytes
    transfer: int
    wait_ms: int
    def __init__(self, namespace: _Optional[bytes] = ..., shards: _Optional[_Iterable[int]] = ..., first_layer: _Optional[int] = ..., layer_count: _Optional[int] = ..., fetch_ms: _Optional[int] = ..., backend: _Optional[bytes] = ..., transfer: _Optional[int] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class Got(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: int
    def __init__(self, layers: _Optional[int] = ...) -> None: ...

class LocalPrefix(_message.Message):
    __slots__ = ("namespace", "shards")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    shards: int
    def __init__(self, namespace: _Optional[bytes] = ..., shards: _Optional[int] = ...) -> None: ...

class LocalPrefixReply(_message.Message):
    __slots__ = ("prefix",)
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    prefix: int
    def __init__(self, prefix: _Optional[int] = ...) -> None: ...

class Prefetch(_message.Message):
    __slots__ = ("namespace", "shards", "backend")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    shards: _containers.RepeatedScalarFieldContainer[int]
    backend: bytes
    def __init__(self, namespace: _Optional[bytes] = ..., shards: _Optional[_Iterable[int]] = ..., backend: _Optional[bytes] = ...) -> None: ...

class Touch(_message.Message):
    __slots__ = ("namespace", "shards")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    shards: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, namespace: _Optional[bytes] = ..., shards: _Optional[_Iterable[int]] = ...) -> None: ...
