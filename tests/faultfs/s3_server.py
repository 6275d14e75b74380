"""moto's S3 server, which begins with a bucket and what it is given: ``python -m tests.faultfs.s3_server PORT FILE``.

Nobody is listened to before that is in place: moto does not bear its first requests from several at once.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
from werkzeug.test import Client

BUCKET = "kvpool-test"


def main(port: str, kept: str) -> None:
    """Serve until killed."""
    application = DomainDispatcherApplication(create_backend_app)
    client = Client(application)
    held: dict[str, bytes] | None = pickle.loads(Path(kept).read_bytes())
    if held is not None:
        for path, data in {BUCKET: b"", **{f"{BUCKET}/{name}": data for name, data in held.items()}}.items():
            answer = client.put(f"/{path}", data=data, base_url=f"http://127.0.0.1:{port}")
            if answer.status_code != 200:
                sys.exit(f"{path}: {answer.status}")
    run_simple("127.0.0.1", int(port), application, threaded=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
