"""What the master remembers across restarts: an LMDB file on local disk (never on a network filesystem)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import lmdb

from kvpool.errors import ConfigError, InvalidArgumentError
from kvpool.model import Namespace

log = logging.getLogger(__name__)

MAP_BYTES = 1 << 30
_NAMESPACES = b"namespaces"


class Catalog:
    """Namespace descriptors by digest. Raises ConfigError naming ``data_dir`` when it cannot be opened."""

    def __init__(self, data_dir: str) -> None:
        try:
            Path(data_dir).mkdir(parents=True, exist_ok=True)
            self._env = lmdb.open(str(Path(data_dir) / "catalog.lmdb"), map_size=MAP_BYTES, max_dbs=8, subdir=False)
            self._namespaces = self._env.open_db(_NAMESPACES)
        except (OSError, lmdb.Error) as exc:
            raise ConfigError("data_dir", f"cannot keep the catalog in {data_dir}: {exc}") from exc

    def namespaces(self) -> list[Namespace]:
        """Return every descriptor that was kept; what cannot be read is named in the log and left alone."""
        found = []
        with self._env.begin() as txn:
            for digest, text in txn.cursor(self._namespaces):
                try:
                    namespace = Namespace(**json.loads(text))
                except (ValueError, TypeError, InvalidArgumentError) as exc:
                    log.warning("the catalog has a namespace that cannot be read (%s): %s", bytes(digest).hex(), exc)
                    continue
                if namespace.digest == bytes(digest):
                    found.append(namespace)
        return found

    def keep(self, namespace: Namespace) -> None:
        """Keep a descriptor. A full or failing disk costs the memory of it, nothing else."""
        try:
            with self._env.begin(write=True) as txn:
                txn.put(namespace.digest, json.dumps(namespace.as_dict()).encode(), db=self._namespaces)
        except lmdb.Error as exc:
            log.warning("the catalog cannot keep namespace %s: %s", namespace.digest.hex(), exc)

    def close(self) -> None:
        """Close the file."""
        self._env.close()
