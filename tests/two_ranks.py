"""Two processes that are the ranks of one training, with an end to waiting for them."""

import socket


def start(processes, target, *args):
    """`target(*args, rank, port)` in two processes; `wait_for` them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [processes.Process(target=target, args=(*args, rank, port)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    return ranks


def wait_for(ranks, seconds=300):
    for rank in ranks:
        rank.join(seconds)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
            rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
