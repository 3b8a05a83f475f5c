"""Clients of a service: one that asks, and many at once that ask as fast as they are answered."""

import http.client
import threading
import time
import uuid


def post(
    port: int, data: bytes, query: str = "", token: str = "", wire: http.client.HTTPConnection | None = None
) -> tuple[int, str]:
    """Status and text of one image, over a connection of its own or over one that is kept."""
    mark = uuid.uuid4().hex
    body = f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'.encode()
    body += data + f"\r\n--{mark}--\r\n".encode()
    heads = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    heads |= {"Authorization": f"Bearer {token}"} if token else {}
    own = wire is None
    wire = wire or http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        wire.request("POST", f"/detect?{query}", body, heads)
        answer = wire.getresponse()
        return answer.status, answer.read().decode()
    finally:
        if own:
            wire.close()


def storm(port: int, images: list[bytes], clients: int, seconds: float) -> list[tuple]:
    """What all clients were told: status ("refused" where nobody listens, "lost" for a broken answer), seconds, and
    (number of the image, text). A client that is told that it is too much waits a little, as it is asked to."""
    answers: list[tuple] = []
    end = time.monotonic() + seconds

    def one(row: int) -> None:
        while time.monotonic() < end:
            begin = time.perf_counter()
            which = row % len(images)
            try:
                status, text = post(port, images[which])
            except ConnectionRefusedError:
                status, text = "refused", ""
            except (OSError, http.client.HTTPException) as error:
                status, text = "lost", repr(error)
            answers.append((status, time.perf_counter() - begin, (which, text)))
            time.sleep(0.05 if status != 200 else 0)

    threads = [threading.Thread(target=one, args=(row,)) for row in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers
