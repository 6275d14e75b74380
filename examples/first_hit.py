import numpy as np
from kvpool import Client, Namespace

with Client("127.0.0.1:50088") as pool:
    model, keys = Namespace("demo", layers=2), [bytes([i]) * 32 for i in range(4)]  # 4 block hashes
    pool.put(model, keys, [np.full(65536, i, np.uint8) for i in range(4)])
    blocks = [np.empty(65536, np.uint8) for _ in keys]
    print(pool.get(model, keys, blocks))  # GetResult(prefix=4, ok=[True, True, True, True], ...)
