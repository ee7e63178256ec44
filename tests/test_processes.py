"""Processes started together: what Ctrl-C, an error and a warning in one of them lead to."""

import os
import signal
import socket
import threading
import time
import warnings
from multiprocessing import forkserver

import pytest
import torch.distributed as dist

from gut_fast.study import processes
from gut_fast.study.processes import Child, RankError, ToldError, launch


def sleep(folder, process_group):
    """Rank 1 is deaf, as in a wait for another rank."""
    rank = dist.get_rank()
    if rank == 1:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / f"here-{rank}").touch()
    time.sleep(30)
    (folder / f"finished-{rank}").touch()


def test_ctrl_c_before_the_ranks_have_begun_does_not_wait_for_those_that_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "SECONDS_TO_STOP", 0.3)

    def interrupt():
        while not all((tmp_path / f"here-{rank}").exists() for rank in range(3)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        launch(3, 1, sleep, tmp_path)
    assert not list(tmp_path.glob("finished-*"))


def fail(process_group):
    warnings.warn("something else", UserWarning, stacklevel=1)
    warnings.warn("a file is corrupt; it counts as missing", UserWarning, stacklevel=1)
    raise ToldError("the file is of another configuration")


@pytest.mark.slow
def test_what_the_user_did_wrong_is_said_in_a_line_and_a_damaged_checkpoint_too(own_forkserver, capfd):
    with pytest.raises(RankError, match=r"^rank [01] failed: the file is of another configuration; the other ranks"):
        launch(2, 1, fail)
    said = capfd.readouterr().err
    assert "a file is corrupt; it counts as missing" in said
    assert "Traceback" not in said
    assert "something else" not in said


def tell(connection):
    while True:
        connection.send("a row")


def listen(connection):
    connection.send("a row")
    connection.recv()


@pytest.mark.slow
def test_ctrl_c_does_not_end_the_server_of_processes_while_it_loads(own_forkserver, capfd):
    def interrupt():
        while (pid := forkserver.ensure_running.__self__._forkserver_pid) is None:
            time.sleep(0.001)
        for _ in range(200):
            time.sleep(0.01)
            os.kill(pid, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    child = Child("child", 1, tell)
    assert child.connection.recv() == "a row"
    child.process.kill()
    child.process.join()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("function", [tell, listen])
def test_a_child_to_which_nobody_listens_any_more_ends_without_a_word(own_forkserver, capfd, function):
    """As after a second Ctrl-C, on which its parent does not wait for it."""
    child = Child("child", 1, function)
    assert child.connection.recv() == "a row"
    child.connection.close()
    child.process.join(60)
    assert child.process.exitcode == 1
    assert "Traceback" not in capfd.readouterr().err


def test_the_store_of_launched_ranks_listens_on_the_loopback_interface_only():
    store = processes.host_store()
    dist.TCPStore(processes.HOST, store.port, None, False).set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(ConnectionRefusedError):  # another address of this machine
        socket.create_connection(("127.0.0.2", store.port), timeout=10)
